"""Photographs with the dropped patches darkened and hatched, and sheets of them."""

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...files import write_whole

_PAPER = (255, 255, 255)
_INK = (24, 28, 36)
_FAINT = (112, 118, 130)
# What a dropped patch becomes has to be told from a kept one on any picture. Darkening alone says nothing on black, fading alone
# nothing on white, and flat areas of either colour are common; stripes of a light and a dark tone show on both.
_SHADE = 0.35  # share of its brightness that a dropped patch keeps
_STRIPE = (150, 158, 172)  # blended over it, along diagonals
_STRIPE_SHARE = 0.55
_EDGE = (255, 196, 0)  # amber: neither dark nor white, and rare in photographs; runs inside the dropped patches

# dark violet to light yellow, evenly spaced in lightness (anchors of matplotlib's "inferno")
_HEAT = [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39)]
_HEAT += [(252, 255, 164)]


class Cell(NamedTuple):
    """A picture of a sheet and the two lines under it."""

    image: Image.Image
    title: str
    note: str = ""


def overlay(photo: Image.Image, kept: Tensor | Sequence[int], grid: tuple[int, int]) -> Image.Image:
    """``photo`` with the dropped patches darkened and hatched, and an amber line around what was kept.

    Args:
        photo: RGB, entirely covered by the grid.
        kept: indices of the surviving patches, row by row.
        grid: (rows, columns) of patches.

    Returns:
        RGB of the same size. Pixels of kept patches are those of ``photo``; the line runs inside the dropped ones.

    Raises:
        ValueError: an index beyond the grid.
    """
    rows, columns = grid
    index = np.asarray(kept, dtype=np.int64).reshape(-1)
    if index.size and (index.min() < 0 or index.max() >= rows * columns):
        raise ValueError(f"kept patches must be in 0..{rows * columns - 1} of the {rows} x {columns} grid")
    cells = np.zeros(rows * columns, dtype=bool)
    cells[index] = True
    pixels = np.asarray(photo.convert("RGB"))
    height, width = pixels.shape[:2]
    lines = np.arange(height) * rows // height
    posts = np.arange(width) * columns // width
    stays = cells.reshape(grid)[lines[:, None], posts]  # [height, width]

    patch = min(height // rows, width // columns)
    period = max(4, patch // 3)
    diagonal = (np.arange(height)[:, None] + np.arange(width)) % period < max(1, period // 4)
    share = np.where(diagonal, _STRIPE_SHARE, 0.0)[..., None]
    dropped = (pixels * _SHADE * (1 - share) + np.array(_STRIPE) * share).round().astype(np.uint8)
    out = np.where(stays[..., None], pixels, dropped)
    reach = max(1, patch // 16)
    near = np.zeros_like(stays)
    for step in range(1, reach + 1):
        near[step:] |= stays[:-step]
        near[:-step] |= stays[step:]
        near[:, step:] |= stays[:, :-step]
        near[:, :-step] |= stays[:, step:]
    out[near & ~stays] = _EDGE
    return Image.fromarray(out)


def heatmap(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map of values in [0, 1] in colour, dark to light.

    Args:
        values: [H, W].
        size: width and height of the picture.
    """
    array = values.detach().float().cpu().clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(array, stops, [c[channel] for c in _HEAT]) for channel in range(3)], -1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def sheet(rows: Sequence[Sequence[Cell]], title: str, legend: str = "", cell: int = 224) -> Image.Image:
    """Rows of pictures under one title.

    Args:
        rows: of cells, left-aligned.
        title: first line.
        legend: second line.
        cell: width of a picture in pixels; its height follows from its shape.

    Returns:
        RGB.
    """
    gap, margin = cell // 14, cell // 9
    big, mid, small = (font(round(cell * f)) for f in (0.098, 0.072, 0.062))
    head = margin + round(cell * (0.16 + (0.11 if legend else 0.0))) + gap // 2
    caption = round(cell * 0.21)
    sized = [[(content, _scaled(content.image, cell)) for content in row] for row in rows]
    heights = [max(image.height for _, image in row) for row in sized]
    columns = max(map(len, rows))
    text_width = max(big.getlength(title), mid.getlength(legend))
    width = max(2 * margin + columns * cell + (columns - 1) * gap, round(text_width) + 2 * margin)
    height = head + sum(heights) + len(rows) * (caption + gap) + margin - gap
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin - gap // 2), title, _INK, big)
    if legend:
        draw.text((margin, margin + round(cell * 0.125)), legend, _FAINT, mid)
    top = head
    for row, row_height in zip(sized, heights, strict=True):
        for column, (content, image) in enumerate(row):
            left = margin + column * (cell + gap)
            page.paste(image, (left, top))
            draw.text((left, top + row_height + cell // 40), content.title, _INK, mid)
            draw.text((left, top + row_height + cell // 40 + round(cell * 0.09)), content.note, _FAINT, small)
        top += row_height + caption + gap
    return page


def _scaled(image: Image.Image, width: int) -> Image.Image:
    return image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def save_png(image: Image.Image, path: str | os.PathLike[str], limit: int = 1_000_000) -> None:
    """Write a PNG of at most ``limit`` bytes, scaled down as far as that needs; completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= limit or min(image.size) < 64:
            break
        factor = max(0.5, min(0.92, (limit / buffer.tell()) ** 0.5))
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    write_whole(path, buffer.getvalue())
