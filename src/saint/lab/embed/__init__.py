"""Embeddings and answers of many images as parquet parts: one row per image, resumable, every row once."""

from .parts import OutputError as OutputError
from .run import Rows as Rows
from .run import embed as embed
from .sources import find_items as find_items
