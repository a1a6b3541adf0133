"""The pictures of a folder, found in one way by every command; what is left out is told."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..images import endings

# of photographs that Pillow alone does not read: they are listed, and become errors with a reason
FOREIGN = {".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".svg", ".jxl"}
_NAMED = 5  # of what is left out, for each reason


def walk(folder: Path, left: dict[str, list[str]]) -> Iterator[Path]:
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


def find_pictures(folder: Path) -> list[Path]:
    """The pictures below ``folder``, sorted: by their ending, or by their contents where they have none.

    Those of formats that only other programs read are among them, and fail when they are read. Warns of all that is left out.
    """
    left: dict[str, list[str]] = {}
    files = [file for file in walk(folder, left) if _told(file, folder, left)]
    tell(folder, left)
    return files


def _told(file: Path, folder: Path, left: dict[str, list[str]]) -> bool:
    if is_picture(file):
        return True
    reason = f"the ending {file.suffix} is no picture's" if file.suffix else "no ending, and no picture by its contents"
    left.setdefault(reason, []).append(printable(file.relative_to(folder).as_posix()))
    return False


def is_picture(file: Path) -> bool:
    """Whether a file is one by its ending, or by its contents where it has none."""
    if file.suffix:
        return file.suffix.lower() in endings() | FOREIGN
    try:
        with Image.open(file):
            return True
    except (UnidentifiedImageError, OSError):
        return False


def tell(folder: Path, left: dict[str, list[str]]) -> None:
    """Warn of what was left out: how many, why, and the first names."""
    for reason, names in left.items():
        some = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        warnings.warn(f"{len(names)} left out of {printable(str(folder))} ({reason}): {some}", stacklevel=3)


def printable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes that are no UTF-8 as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
