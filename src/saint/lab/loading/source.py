"""A model with its own preprocessing, as every library's loader gives it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ...plans import Plan
from ...vision.locate import locate


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


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run, with its own preprocessing.

    Attributes:
        model: eval mode, on ``device``.
        spec: what the user typed.
        title: for tables and messages.
        device: where it is.
        plan: a plan that suits it.
        licence: of the weights, where known.
    """

    model: nn.Module
    spec: str
    title: str
    device: torch.device
    plan: Plan
    licence: str | None
    source: Source

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the model sees."""
        return self.source.image_size

    def preprocess(self, image: Image.Image) -> Tensor:
        """[3, height, width], float32, on the CPU."""
        return self.source.pixels(image, self.image_size)

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keyword arguments of ``model.forward``: B images as [B, 3, height, width] in the model's dtype and place."""
        if self.source.batch is not None:
            return self._placed(self.source.batch(list(images)))
        return self.inputs_of([self.preprocess(image) for image in images])

    def inputs_of(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """:meth:`inputs` of B images that :meth:`preprocess` has seen, each [3, height, width]."""
        return self._placed({self.source.argument: torch.stack(list(pixels))})

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        moved = {k: t.to(self.device, dtype if t.is_floating_point() else None) for k, t in tensors.items()}
        return {**moved, **self.source.extra}

    def picture(self, image: Image.Image, scale: int = 2) -> Image.Image:
        """What the model sees of ``image``, to be drawn on: the same crop, ``scale`` times the resolution.

        Raises:
            ValueError: the model takes its patches flattened.
        """
        if self.source.batch is not None:
            raise ValueError(f"{self.spec} takes its patches flattened, in any shape: there is no fixed crop to draw")
        height, width = self.image_size
        values = self.source.pixels(image, (height * scale, width * scale))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in self.source.norm())
        array = ((values * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            ValueError: the model shows none.
        """
        _, encoder, found = locate(self.model)
        if found.patch is None:
            raise ValueError(f"{self.spec} shows no patch grid, so there is nothing to draw on")
        stride: Any = encoder.get_submodule(found.patch).stride
        return self.image_size[0] // stride[0], self.image_size[1] // stride[1]
