"""Models by name and images by path, for the command line.

A model comes from its own library's loader with its own preprocessing: ``timm:NAME``, ``hf:NAME_OR_PATH``,
``open_clip:NAME/TAG`` or ``demo:NAME`` (works offline).
"""

from .failures import DownloadError as DownloadError
from .failures import UnsafeCheckpointError as UnsafeCheckpointError
from .models import FORMS as FORMS
from .models import load_model as load_model
from .models import resolve_device as resolve_device
from .photos import Photo as Photo
from .photos import Unreadable as Unreadable
from .photos import load_images as load_images
from .plans import read_plan as read_plan
from .source import Loaded as Loaded
from .source import Source as Source
