"""The records that the commands write as sheets, on a terminal, as one HTML file or as Markdown. Loads no model and no torch."""

from .page import LIMIT as LIMIT
from .page import make_markdown as make_markdown
from .page import make_report as make_report
from .reading import KINDS as KINDS
from .reading import Record as Record
from .reading import read_records as read_records
