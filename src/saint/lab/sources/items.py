"""One thing that a model is to look at, and one that could not be looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Item:
    """An image that is not read yet, with what is asked about it, nothing of an encoder; or a prompt without an image.

    Attributes:
        id: unique among the items of a run.
        where: file (and line) to look at when something is wrong with it.
        load: reads the image: upright, opaque, 8-bit RGB; None of a prompt without one.
        prompt: what is asked.
        mark: tells the image from another with its id; see :func:`saint.lab.images.mark`.
        label: class index, None where there is none.
    """

    id: str
    where: str
    load: Callable[[], Image.Image | None]
    prompt: str = ""
    mark: int = -1
    label: int | None = None

    @staticmethod
    def photo(name: str, image: Image.Image, prompt: str = "") -> "Item":
        """Make an item of an image that has been read."""
        return Item(name, name, lambda: image, prompt)


@dataclass(frozen=True)
class Failure:
    """Something that was given and could not be used."""

    id: str
    where: str
    reason: str


def evenly(items: list[Any], limit: int | None) -> list[Any]:
    """Return at most ``limit`` of ``items``, evenly spaced; None: all."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
