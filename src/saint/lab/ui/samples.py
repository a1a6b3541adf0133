"""Pictures that ship with installed packages, for a page that has no picture yet."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from PIL import Image

from ...errors import MissingExtraError
from ..demo import photos
from ..demo.scenes import HELD_OUT, scene

_SHOWN = ("chelsea", "coffee", "astronaut", "rocket", "china")  # photographs of things that are told at a glance
_SIDE = 640  # pixels of a picture at most: no model here looks closer
_SCENE = HELD_OUT + 3
_ASKED = "what word is written"


@dataclass(frozen=True)
class Sample:
    """A picture to begin with.

    Attributes:
        name: of it.
        question: that a model can be asked of it; "" for a photograph, which most small models were not trained on.
        make: reads or draws it.
    """

    name: str
    question: str
    make: Callable[[], Image.Image]

    def jpeg(self) -> bytes:
        """Return a file of it."""
        image = self.make()
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        return buffer.getvalue()


@cache
def samples() -> Mapping[str, Sample]:
    """Samples by name; empty where the packages that ship them are not installed."""
    try:
        there = dict(photos())
    except MissingExtraError:
        return {}
    found = {name: Sample(name, "", there[name].copy) for name in _SHOWN if name in there}
    return {**found, "scene": Sample("scene", _ASKED, scene(_SCENE).image)}
