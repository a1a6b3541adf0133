"""One HTML file from the records that the commands write: `saint report`. Loads no model and no torch."""

from .page import LIMIT as LIMIT
from .page import make_report as make_report
from .reading import KINDS as KINDS
from .reading import Record as Record
from .reading import read_records as read_records
