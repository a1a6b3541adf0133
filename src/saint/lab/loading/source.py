"""An encoder with its own preprocessing, as every library's loader gives it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

from ...plans import Plan


class Source(NamedTuple):
    """What a library's loader gives."""

    model: nn.Module
    image_size: tuple[int, int]  # height, width
    pixels: Callable[[Image.Image, tuple[int, int]], Tensor]  # image, (height, width) -> [3, height, width]
    norm: Callable[[], tuple[Sequence[float], Sequence[float]]]  # mean and std of the preprocessing
    argument: str  # name of the forward's picture argument
    extra: Mapping[str, Any] = MappingProxyType({})  # further arguments of the forward
    batch: Callable[[list[Image.Image]], dict[str, Tensor]] | None = None  # where pictures are not [B, 3, H, W]
    plan: Plan | None = None
    title: str = ""
    licence: str | None = None
