"""The pictures of a folder, found in one way by every command; what is left out is told."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..images import endings

# of photographs that Pillow alone does not read: they are listed, and become errors with a reason
FOREIGN = {".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".svg", ".jxl"}
_SAID = 5  # names of what is left out, for each reason
_RECORDED = 100  # the same in a record

Left = dict[str, list[str]]  # what a listing leaves out: reason -> names


def walk(folder: Path, left: Left) -> Iterator[Path]:
    """The files below ``folder``, links to folders followed once; links to nowhere are files.

    Args:
        folder: where to look.
        left: gets what is left out: reason -> names.
    """

    def down(inside: Path, above: tuple[str, ...]) -> Iterator[Path]:
        real = os.path.realpath(inside)
        for path in sorted(inside.iterdir()):
            name = printable(path.relative_to(folder).as_posix())
            if path.name.startswith("."):
                left.setdefault("hidden", []).append(name)
            elif not path.is_dir():
                yield path
            elif os.path.realpath(path) in (*above, real):
                left.setdefault("a link to a folder that it lies in", []).append(name)
            else:
                yield from down(path, (*above, real))

    yield from sorted(down(folder, ()))


def find_pictures(folder: Path, left: Left) -> list[Path]:
    """The pictures below ``folder``, sorted: by their ending, or by their contents where they have none.

    Those of formats that only other programs read are among them, and fail when they are read. Warns of all that is left out.
    """
    return _by_kind(folder, left, ()).get("image", [])


def one_kind(source: Path, left: Left, forms: str, *others: str) -> tuple[str, list[Path]]:
    """The files of ``source``, a folder or a file, that are pictures ("image") or have one of the endings ``others``; sorted.

    Args:
        source: where to look.
        left: gets what is left out: reason -> names.
        forms: what a source may be, for the message.
        others: endings of the other kinds, with the dot, in lower case.

    Returns:
        The kind, and its files.

    Raises:
        ValueError: none, or several kinds.
    """
    found = _by_kind(source, left, others)
    if len(found) != 1:
        held = f"files of several kinds ({', '.join(sorted(found))})" if found else "no image"
        raise ValueError(f"{printable(str(source))} holds {held}; give {forms}")
    return next(iter(found.items()))


def _by_kind(source: Path, left: Left, others: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in [source] if source.is_file() else walk(source, left):
        ending = file.suffix.lower()
        if ending in others or is_picture(file):
            found.setdefault(ending if ending in others else "image", []).append(file)
            continue
        told = f"the ending {file.suffix} is no picture's" if ending else "no ending, and no picture by its contents"
        name = file.name if file == source else file.relative_to(source).as_posix()
        left.setdefault(told, []).append(printable(name))
    tell(source, left)
    return found


def known() -> set[str]:
    """The endings of pictures, with the dot, in lower case."""
    return endings() | FOREIGN


def is_picture(file: Path) -> bool:
    """Whether a file is one by its ending, or by its contents where it has none."""
    if file.suffix:
        return file.suffix.lower() in known()
    try:
        with Image.open(file):
            return True
    except (UnidentifiedImageError, OSError):
        return False


def left_facts(left: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What was left out, for a record: why, how many, and the first names."""
    return [{"reason": why, "count": len(names), "names": list(names[:_RECORDED])} for why, names in left.items()]


def tell(folder: Path, left: Left) -> None:
    """Warn of what was left out: how many, why, and the first names."""
    for reason, names in left.items():
        some = ", ".join(names[:_SAID]) + (", ..." if len(names) > _SAID else "")
        warnings.warn(f"{len(names)} left out of {printable(str(folder))} ({reason}): {some}", stacklevel=3)


def printable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes that are no UTF-8 as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
