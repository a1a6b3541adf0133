"""What the vision tower of a vision-language model sees, and where its visual tokens lie on it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ...vision.derive import with_tower
from ...vision.locate import locate_tower
from ...vlm.locate import locate

_SIDE = 448  # pixels a tile is drawn with at least


class Tile(NamedTuple):
    """An image, or the part of one that the tower is shown as a sample of its own."""

    picture: Image.Image
    grid: tuple[int, int]  # rows and columns of the tokens that the language model receives of it


def tiles(model: Any, processor: Any, inputs: Mapping[str, Any]) -> list[Tile]:
    """The tiles of one prompt with images, in the order of the tower.

    Args:
        model: a supported vision-language model.
        processor: its own.
        inputs: what the processor made of the prompt.

    Raises:
        ValueError: the model takes its pixels in a way that shows no grid.
    """
    _, vlm, spec = locate(model, "language")
    spec = with_tower(vlm, spec)
    _, tower, tower_spec = locate_tower(vlm, spec)
    config: Any = tower.config
    side = spec.merge_size(vlm) or 1
    pixels: Tensor = inputs["pixel_values"].float().cpu()
    images = getattr(processor, "image_processor", processor)
    mean, std = (torch.tensor(getattr(images, name, None) or [default] * 3) for name, default in _NORM)
    patch: Any = config.patch_size
    if "image_grid_thw" in inputs:
        found = []
        for count, (frames, rows, columns) in zip(
            inputs["image_grid_thw"].prod(1).tolist(), inputs["image_grid_thw"].tolist(), strict=True
        ):
            own, pixels = pixels[:count], pixels[count:]
            found += [
                Tile(
                    _picture(_laid(own, (frames, rows, columns), side, patch), mean, std),
                    (rows // side, columns // side),
                )
            ]
        return found
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        raise ValueError(
            f"{type(vlm).__name__} takes pixels of shape {tuple(pixels.shape)}: there is no grid to draw on"
        )
    high, wide = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if tower_spec.patch is not None:
        stride: Any = tower.get_submodule(tower_spec.patch).stride
        high, wide = stride
    pixels = pixels.flatten(0, -4)  # [tiles, 3, height, width]
    grid = pixels.shape[-2] // high // side, pixels.shape[-1] // wide // side
    return [Tile(_picture(tile.permute(1, 2, 0), mean, std), grid) for tile in pixels]


_NORM = (("image_mean", 0.0), ("image_std", 1.0))


def _laid(patches: Tensor, grid: tuple[int, int, int], side: int, patch: int) -> Tensor:
    """Flattened patches, square by square [F * R * C, 3 * T * patch * patch], as the first frame [height, width, 3]."""
    frames, rows, columns = grid
    x = patches.view(frames, rows // side, columns // side, side, side, 3, -1, patch, patch)[0, ..., 0, :, :]
    return x.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)


def _picture(values: Tensor, mean: Tensor, std: Tensor) -> Image.Image:
    """Normalised pixels [height, width, 3] for people, large enough to draw on."""
    array = ((values * std + mean) * 255).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(array)
    times = max(1, -(-_SIDE // min(image.size)))
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def placed(tiles: list[Tile], kept: Tensor, total: int) -> list[Tensor] | None:
    """Tell which tokens of each tile are among the visual tokens ``kept`` of the prompt; None where the model has others.

    Args:
        tiles: of the prompt.
        kept: indices into all visual tokens of the prompt, as the trace of the language stage has them.
        total: visual tokens of the prompt.
    """
    counts = [rows * columns for rows, columns in (tile.grid for tile in tiles)]
    if sum(counts) != total:  # unpadded tiles, newlines
        return None
    found, first = [], 0
    for count in counts:
        found.append(kept[(kept >= first) & (kept < first + count)] - first)
        first += count
    return found
