"""The images of a file or a folder, those that cannot be read told apart."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..images import read_image, reason
from .listing import Left, find_pictures, printable


class Photo(NamedTuple):
    """An image that could be read."""

    name: str  # the file's without its ending, or with it where two files would share a name
    image: Image.Image  # upright, opaque, 8-bit RGB


class Unreadable(NamedTuple):
    """An image that could not."""

    name: str
    reason: str


def load_images(
    path: str | Path, limit: int | None = None, left: Left | None = None
) -> tuple[list[Photo], list[Unreadable]]:
    """Read an image, or those of a folder and its subfolders, by name.

    Args:
        path: a file, or a folder, see :func:`saint.lab.loading.listing.find_pictures`.
        limit: at most so many files.
        left: gets what is left out: reason -> names.

    Returns:
        Those that could be read, and those that could not with the reason.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: an empty folder, or nothing that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such image or folder: {path}")
    if path.is_dir():
        files = find_pictures(path, {} if left is None else left)
        if not files:
            raise ValueError(f"no images in the folder {path}: looked for .jpg, .png, .webp and the like")
    else:
        files = [path]
    good: list[Photo] = []
    bad: list[Unreadable] = []
    files = files[:limit]
    for name, file in zip(names_of(files), files, strict=True):
        try:
            good.append(Photo(name, read_image(file)))
        except (OSError, ValueError) as error:
            bad.append(Unreadable(printable(file.name), reason(error)))
    if not good:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
        raise ValueError(f"none of the {len(bad)} image(s) at {path} can be read ({reasons})")
    return good, bad


def names_of(files: Sequence[Path]) -> list[str]:
    """A name per file, no two alike (also where upper and lower case are the same): pictures are written under them."""
    stems = Counter(file.stem.casefold() for file in files)
    names = [printable(file.stem if stems[file.stem.casefold()] == 1 else file.name) for file in files]
    whole = [printable(file.name) for file in files]  # a.jpg, a.png and a.jpg.png
    for some in (names, whole):
        if len({name.casefold() for name in some}) == len(files):
            return some
    return [f"{i}-{name}" for i, name in enumerate(whole)]  # of several folders
