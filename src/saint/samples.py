"""Inputs of a model, one sample each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of ``model.forward`` for one image: tensors with a batch of one, and what else it takes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def read_samples(images: Any) -> list[Sample]:
    """Read what :func:`saint.tune` takes as images, one by one.

    Raises:
        TypeError: something else.
    """
    expected = (
        "images must be a tensor [n, 3, H, W] as the model takes it, or a list of such tensors [3, H, W] or of the keyword "
        "arguments of model.forward for one image each"
    )
    if isinstance(images, Tensor):
        images = list(images)
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise TypeError(f"{expected}; got {type(images).__name__}")
    samples = []
    for image in images:
        if isinstance(image, Mapping):
            samples.append(Sample((), dict(image)))
        elif isinstance(image, Tensor) and image.ndim == 3:
            samples.append(Sample((image.unsqueeze(0),), {}))
        else:
            got = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"{expected}; got {got} in it (an image file is read by `saint tune` on the command line)")
    return samples
