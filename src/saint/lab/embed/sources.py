"""Images where people keep them: folders, parquet files with bytes or paths, webdataset shards; listed, then read one by one."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from ...extras import require
from ..images import mark, read_image
from ..sources import shards
from ..sources.listing import Left, one_kind, printable, tell

FORMS = "a folder of images, .parquet files, or .tar shards (a file, or a folder of one kind)"
NAMES = (
    "image",
    "bytes",
    "path",
    "image_path",
    "file",
    "file_name",
    "filename",
    "url",
    "uri",
)  # of columns with images
_LONGEST_PATH = 1024  # characters; longer text is a picture in base64


@dataclass(frozen=True, slots=True)
class Item:
    """An image that is not read yet; plain data, so that it can be sent to another process.

    Attributes:
        key: unique within the source, and the same wherever the source lies.
        path: file to look at.
        size: bytes, where known; of a row of bytes those of its parquet file.
        place: inside ``path``: offset in a shard, or row in a parquet file; -1 for a whole file.
        column: of a parquet file with bytes; "" elsewhere.
        error: why there is no image; "" where there may be one.
    """

    key: str
    path: str
    size: int = -1
    place: int = -1
    column: str = ""
    error: str = ""


def find_items(source: str | os.PathLike[str], *, column: str | None = None, left: Left | None = None) -> list[Item]:
    """The images at ``source``, in an order that never changes.

    Args:
        source: a folder (its subfolders included) of images, of ``.parquet`` files or of ``.tar`` shards, or one such file.
        column: of parquet files: the images' bytes, their paths (from the file's folder) or ``file://`` URLs. None means the one
            that is called like an image, or holds structs with ``bytes`` and ``path`` as the library datasets writes them.
        left: gets what is left out: reason -> names.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no image in it, several kinds of files, or no single column with images.
        MissingExtraError: parquet, and pyarrow is not installed.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such source: {path}; give {FORMS}")
    left = {} if left is None else left
    kind, files = one_kind(path, left, FORMS, ".parquet", ".tar")
    if column is not None and kind != ".parquet":
        raise ValueError(f"a column is of parquet files, and {path} holds {kind} files: leave it out")
    root = path.parent if path.is_file() else path
    items: list[Item] = []
    inside: Left = {}
    for file in files:
        name = printable(file.relative_to(root).as_posix())
        if kind == "image":
            items.append(Item(name, str(file), mark(file)))
        else:
            items += _shard(file, name, inside) if kind == ".tar" else _parquet(file, name, column)
    tell(path, inside)
    left.update(inside)
    if not items:
        raise ValueError(f"{path} holds no image; give {FORMS}")
    return items


def _shard(file: Path, name: str, left: Left) -> Iterator[Item]:
    groups, broken = shards.groups(file, left)
    for key, members in groups.items():
        image = shards.picture(members)
        if image is None:
            yield Item(f"{name}/{key}", str(file), error=f"no image among {', '.join(members)}")
        else:
            yield Item(f"{name}/{key}", str(file), image.size, image.offset)
    if broken is not None:
        yield Item(name, str(file), error=broken)


def _parquet(file: Path, name: str, column: str | None) -> Iterator[Item]:
    parquet = require("pyarrow.parquet", "embed")
    opened = parquet.ParquetFile(file)
    column, paths = _column(opened.schema_arrow, file, column)
    if not paths:
        size = mark(file)
        for row in range(opened.metadata.num_rows):
            yield Item(f"{name}/{row}", str(file), size, row, column)
        return
    values = opened.read(columns=[column]).column(0).to_pylist()
    for row, value in enumerate(values):
        yield located(f"{name}/{row}", value, file.parent)


def located(key: str, value: str | None, folder: Path) -> Item:
    """The item of a path (from ``folder``) or a ``file://`` URL."""
    if not value:
        return Item(key, "", error="the path is empty")
    if value.startswith("data:"):
        return Item(key, "", error="a picture as a data URI: decode it, and store its bytes in the column")
    if len(value) > _LONGEST_PATH:
        raw = f"text of {len(value)} characters is no path"
        return Item(key, "", error=f"{raw}; if it is base64, decode it, and store the bytes in the column")
    try:
        url = urlsplit(value)
    except ValueError as error:
        return Item(key, "", error=f"no path or URL ({error}): {value[:100]}")
    if url.scheme == "file":
        return _file(key, unquote(url.path))
    if url.scheme and "://" in value:
        return Item(key, value, error=f"not on disk: {url.scheme} is not fetched; download it and give the path")
    return _file(key, str(folder / value))


def _file(key: str, path: str) -> Item:
    return Item(key, path, mark(Path(path)))


def _column(schema: Any, file: Path, wanted: str | None) -> tuple[str, bool]:
    """The column with images, and whether it holds paths."""
    types = require("pyarrow.types", "embed")

    def holds(kind: Any) -> bool | None:  # True: paths, False: bytes, None: no images
        if types.is_dictionary(kind):  # categories of pandas
            kind = kind.value_type
        if types.is_struct(kind):
            return False if kind.get_field_index("bytes") >= 0 else None
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
            return False
        return True if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else None

    held = {field.name: holds(field.type) for field in schema}
    if wanted is not None:
        if held.get(wanted) is None:
            said = "is not there" if wanted not in held else f"is of type {schema.field(wanted).type}"
            raise ValueError(
                f"the column {wanted!r} of {file} {said}; expected bytes, a path, or a struct with bytes, in one of {list(held)}"
            )
        return wanted, bool(held[wanted])
    fitting = [name for name, paths in held.items() if paths is False]
    fitting = fitting or [name for name, paths in held.items() if paths and name.lower() in NAMES]
    if len(fitting) != 1:
        raise ValueError(
            f"{file} has {'several columns' if fitting else 'no column'} that may hold images "
            f"({', '.join(fitting or held)}): name one (--column)"
        )
    return fitting[0], bool(held[fitting[0]])


class Reader:
    """Reads items; keeps the last row groups of parquet files. Threads may share it."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def __call__(self, item: Item) -> Image.Image:
        """The image: upright, opaque, 8-bit RGB.

        Raises:
            ValueError: there is none, or it cannot be decoded.
            OSError: it cannot be read.
        """
        if item.error:
            raise ValueError(item.error)
        if item.column:
            return self._row(item)
        if item.place >= 0:
            return read_image(shards.contents(Path(item.path), shards.Member(item.key, item.place, item.size)))
        return read_image(Path(item.path))

    def _row(self, item: Item) -> Image.Image:
        with self._lock:
            values, first = self._group(item)
            value = values[item.place - first].as_py()
        if isinstance(value, dict):
            if not value.get("bytes"):
                return self(located(item.key, value.get("path"), Path(item.path).parent))
            value = value["bytes"]
        if not value:
            raise ValueError("the row holds no bytes")
        return read_image(bytes(value))

    def _group(self, item: Item) -> tuple[Any, int]:
        """The row group that holds ``item``, and its first row."""
        parquet = require("pyarrow.parquet", "embed")
        if item.path not in self._starts:
            metadata = parquet.read_metadata(item.path)
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._starts[item.path] = [sum(rows[:i]) for i in range(len(rows))]
        starts = self._starts[item.path]
        group = max(i for i, start in enumerate(starts) if start <= item.place)
        if (item.path, group) not in self._groups:
            if len(self._groups) == 2:  # batches go through rows in order, and may lie across a border
                self._groups.popitem(last=False)
            table = parquet.ParquetFile(item.path).read_row_group(group, columns=[item.column])
            self._groups[item.path, group] = table.column(0)
        return self._groups[item.path, group], starts[group]
