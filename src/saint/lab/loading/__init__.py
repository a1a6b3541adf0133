"""Encoders by name, through their own libraries' loaders, and what goes wrong on the way."""

from .failures import DownloadError as DownloadError
from .failures import UnsafeCheckpointError as UnsafeCheckpointError
from .models import FORMS as FORMS
from .plans import read_plan as read_plan
