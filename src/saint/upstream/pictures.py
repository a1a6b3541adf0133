"""Random pictures in the form that the class of a vision-language model takes them in, read off its arguments and its tower.

Letters: I pictures, N patches of all of them, C channels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .names import (
    IMAGE_FEATURES,
    IMAGE_GRID,
    IMAGE_SIDE,
    JOINED_SIDE,
    PATCH,
    PICTURE_SIZES,
    PINPOINTS,
    PIXELS,
    VISION_CONFIG,
    Parameters,
    Role,
)

_SHAPES = Role("spatial_shapes")  # rows and columns of patches of each picture
_SEEN = Role("pixel_attention_mask")
_SIDES = Role("image_merge_sizes")  # of the squares of each picture


_Form = tuple[dict[str, Any], list[tuple[int, int]]]


class Pictures(NamedTuple):
    """Keyword inputs of the method that computes features, and the rows and columns of patches of each picture."""

    inputs: dict[str, Any]
    grids: list[tuple[int, int]]


def pictures(model: Any, tower: nn.Module, seed: int = 0) -> Iterator[Pictures]:
    """The forms of two random pictures that the class of ``model`` may take, likely ones first.

    Args:
        model: has the method that computes features of images.
        tower: inside it, which embeds patches.
        seed: of a private generator.
    """
    names = Parameters(getattr(type(model), IMAGE_FEATURES.of(model) or "")).names
    convolution = first_convolution(tower)
    if convolution is None:
        return
    weight = next(convolution.parameters())
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    own = Parameters(type(tower).forward).names
    forms = [_packed, _of_own_size, _one_row if PICTURE_SIZES.among(own) else _tiled, _squares]
    for form in forms:
        for inputs, grids in form(model, names, weight, noise):
            yield Pictures({str(PIXELS): inputs.pop(str(PIXELS)), **inputs}, grids)


def first_convolution(tower: nn.Module) -> nn.Module | None:
    """The module that makes tokens of patches: the first convolution or, where there is none, the first linear map."""
    for kinds in ((nn.Conv2d, nn.Conv3d), (nn.Linear,)):
        found = next((module for module in tower.modules() if isinstance(module, kinds)), None)
        if found is not None:
            return found
    return None


def merge_side(config: Any) -> int | None:
    """Side of the squares of patches that become one token, where the config of a model or of its tower tells it."""
    for one in (VISION_CONFIG.get(config), config):
        side = JOINED_SIDE.get(one)
        if side is not None:
            return side if isinstance(side, int) else side[0]
    return None


def _packed(model: Any, names: Any, weight: Tensor, noise: Any) -> Iterator[_Form]:
    """All patches in one sequence, and a table with the grid of each picture."""
    name = IMAGE_GRID.among(names)
    if name is None:
        return
    side = merge_side(model.config) or 2
    grids = [(2 * side, 4 * side), (4 * side, 4 * side)]
    count = sum(rows * columns for rows, columns in grids)
    more: dict[str, Any] = {name: torch.tensor([(1, *grid) for grid in grids], device=weight.device)}
    if (sides := _SIDES.among(names)) is not None:
        more[sides] = torch.tensor([side] * len(grids), device=weight.device)
    patch = weight.shape[1:]
    for shape in ((count, patch.numel()), (count, *patch), (1, count, patch.numel())):
        yield {str(PIXELS): noise(*shape), **more}, grids


def _of_own_size(model: Any, names: Any, weight: Tensor, noise: Any) -> Iterator[_Form]:
    """Patches of each picture in a row of their own, padded, with its grid."""
    name = _SHAPES.among(names)
    if name is None:
        return
    side = merge_side(model.config) or 2
    grids = [(4 * side, 2 * side), (2 * side, 2 * side)]
    most = max(rows * columns for rows, columns in grids)
    seen = torch.tensor([[place < rows * columns for place in range(most)] for rows, columns in grids])
    pixels = noise(len(grids), most, weight.shape[1:].numel())
    yield {
        str(PIXELS): pixels, name: torch.tensor(grids, device=weight.device), str(_SEEN): seen.long().to(weight.device)
    }, grids  # fmt: skip


def _one_row(model: Any, names: Any, weight: Tensor, noise: Any) -> Iterator[_Form]:
    """Pictures of several sizes, padded to the largest, with the size of each."""
    name, side = PICTURE_SIZES.among(names), merge_side(model.config) or 2
    if name is None:
        return
    grids, patch = [(4 * side, 4 * side), (4 * side, 2 * side)], weight.shape[-1]
    sizes = torch.tensor(grids, device=weight.device) * patch
    yield {str(PIXELS): noise(2, weight.shape[1], *sizes[0].tolist()), name: sizes}, grids


def _tiled(model: Any, names: Any, weight: Tensor, noise: Any) -> Iterator[_Form]:
    """Pictures cut into tiles, one of the whole in front, with the size of each."""
    name, shapes, square = PICTURE_SIZES.among(names), PINPOINTS.get(model.config), _square(model, weight)
    if name is None or not shapes or square is None:
        return
    height, width = shapes[0]
    size, patches = square
    tiles = 1 + (height // size) * (width // size)
    sizes = torch.tensor([[height, width]] * 2, device=weight.device)
    yield {str(PIXELS): noise(2, tiles, weight.shape[1], size, size), name: sizes}, [(patches, patches)] * 2 * tiles


def _squares(model: Any, names: Any, weight: Tensor, noise: Any) -> Iterator[_Form]:
    """Pictures of the size that the config tells."""
    square = _square(model, weight)
    if square is None:
        return
    size, patches = square
    channels = weight.shape[1] if weight.ndim == 4 else 3
    for shape in ((2, channels, size, size), (2, 1, channels, size, size)):
        yield {str(PIXELS): noise(*shape)}, [(patches, patches)] * 2


def _square(model: Any, weight: Tensor) -> tuple[int, int] | None:
    """Side of the pictures that a tower is made for, in pixels and in patches."""
    config = VISION_CONFIG.get(model.config) or model.config
    size, patch = IMAGE_SIDE.get(config), PATCH.get(config) or weight.shape[-1]
    if size is None:
        return None
    size, patch = (one if isinstance(one, int) else one[0] for one in (size, patch))
    return size, size // patch
