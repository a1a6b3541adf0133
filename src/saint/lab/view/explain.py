"""Pictures that say why patches were dropped: when, what stands for them, how many neighbours they had.

Letters: N candidates at a drop point, D head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ... import graph
from ...gathers import similar_survivor
from ...runtime.observe import Observer
from ...tokens import Candidates, Selection
from .overlay import font, heatmap

# colours of Okabe and Ito, which colour-blind eyes tell apart; the number on a patch says the layer all the same
_LAYERS = [(86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)]
_TINT = 0.72  # share of a layer's colour over the patches that were dropped there
_LINE = (255, 255, 255)
_INK = (16, 16, 16)
_SIDE = 560  # pixels of a picture's shorter side, at least


@dataclass(frozen=True)
class Step:
    """What a drop point of one image saw and chose.

    Attributes:
        layer: 0-based.
        index: original index of each candidate, int64 [N].
        keys: head-mean attention keys, float32 [N, D].
        stays: whether each candidate stays, bool [N].
        into: for each candidate the original index of what it is part of or what stands for it: itself for a survivor, [N].
    """

    layer: int
    index: Tensor
    keys: Tensor
    stays: Tensor
    into: Tensor


class Witness(Observer):
    """Keeps the drop points of the vision stage of one image; give it to ``saint.apply(..., observers=[witness])``."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._seen: Candidates | None = None

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        self._seen = candidates if stage == "vision" else None

    def selected(self, stage: str, layer: int, selection: Selection) -> None:
        seen = self._seen
        if seen is None:
            return
        count = seen.tokens.lengths[0]
        index, keys = seen.tokens.index[0, :count].cpu(), seen.keys[0, :count].float().cpu()
        kept = selection.slots[0, : selection.lengths[0]].cpu()
        stays = torch.zeros(count, dtype=torch.bool).scatter(0, kept, True)
        if selection.merges(0):
            assert selection.owner is not None
            stands = selection.owner[0, :count].cpu()
        else:
            stands = similar_survivor(graph.metric(keys[None]), Selection(kept[None], (len(kept),)))[0]
        into = index[kept][stands]
        self.steps.append(Step(layer, index, keys, stays, into))

    def take(self) -> list[Step]:
        """The steps since they were taken last."""
        steps, self.steps = self.steps, []
        return steps


def dropped(photo: Image.Image, grid: tuple[int, int], steps: Sequence[Step], *, lines: bool = True) -> Image.Image:
    """The photo with every dropped patch in the colour of the layer that dropped it, and that layer's number on it.

    Args:
        photo: RGB, the whole of it covered by the grid.
        grid: (rows, columns) of patches.
        steps: of one image, in the order of the layers.
        lines: a thin line from each dropped patch to the survivor it is part of, or that is most similar to it.
    """
    photo = _large(photo)
    colours = layer_colours([step.layer for step in steps])
    canvas = photo.copy()
    draw = ImageDraw.Draw(canvas)
    for step in steps:
        for n in step.index[~step.stays].tolist():
            box = _box(photo, grid, n)
            inside = photo.crop(box)
            canvas.paste(Image.blend(inside, Image.new("RGB", inside.size, colours[step.layer]), _TINT), box[:2])
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_INK)
            _number(draw, box, step.layer, colours[step.layer])
    if lines:
        gone = {int(n): int(to) for step in steps for n, to in zip(step.index, step.into, strict=True) if n != to}
        for n, to in gone.items():
            while to in gone:  # what stood for it was dropped later
                to = gone[to]
            draw.line([_centre(photo, grid, n), _centre(photo, grid, to)], fill=_LINE, width=1)
            _dot(draw, _centre(photo, grid, to))
    return canvas


def degrees(
    photo: Image.Image, grid: tuple[int, int], step: Step, threshold: float, neighbors: int, *, center: bool = False
) -> Image.Image:
    """Heat map of the voting graph: neighbours at or above the threshold of each source; sources that vote have a white frame.

    Targets of the graph and patches that are gone are grey: they have no degree. ``center`` is the method's own.
    """
    edges = graph.connect(step.keys[None], threshold, center=center)
    degree = edges.degree[0]
    top = max(1.0, float(degree.max()))
    canvas = Image.blend(
        _large(photo).convert("L").convert("RGB"), Image.new("RGB", _large(photo).size, (128,) * 3), 0.6
    )
    draw = ImageDraw.Draw(canvas)
    for n, c in zip(step.index[0::2].tolist(), degree.tolist(), strict=True):
        box = _box(canvas, grid, n)
        canvas.paste(heatmap(torch.tensor([[c / top]]), (box[2] - box[0], box[3] - box[1])), box[:2])
        if c >= neighbors:
            draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2), outline=_LINE, width=2)
    return canvas


def around(
    photo: Image.Image, grid: tuple[int, int], step: Step, patch: tuple[int, int], threshold: float
) -> Image.Image:
    """The similarity graph around one patch: cosine of its key with every other as a heat map, its edges as lines.

    Raises:
        ValueError: the patch is not on the grid, or was dropped before this drop point.
    """
    rows, columns = grid
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(
            f"patch {patch[0]},{patch[1]} is not on the grid of {rows} rows and {columns} columns (from 0)"
        )
    number = patch[0] * columns + patch[1]
    where = (step.index == number).nonzero().flatten()
    if not len(where):
        raise ValueError(
            f"patch {patch[0]},{patch[1]} was dropped in front of layer {step.layer}: choose an earlier layer"
        )
    points = graph.metric(step.keys[None])[0]
    similarity = (points @ points[int(where)]).clamp(0, 1)
    canvas = Image.blend(
        _large(photo).convert("L").convert("RGB"), Image.new("RGB", _large(photo).size, (128,) * 3), 0.6
    )
    for n, value in zip(step.index.tolist(), similarity.tolist(), strict=True):
        box = _box(canvas, grid, n)
        colour = heatmap(torch.tensor([[value]]), (box[2] - box[0], box[3] - box[1]))
        canvas.paste(Image.blend(photo.crop(box), colour, 0.75), box[:2])
    draw = ImageDraw.Draw(canvas)
    centre = _centre(canvas, grid, number)
    for n, value in zip(step.index.tolist(), similarity.tolist(), strict=True):
        if value >= threshold and n != number:
            draw.line([centre, _centre(canvas, grid, n)], fill=_LINE, width=1)
    box = _box(canvas, grid, number)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_LINE, width=3)
    return canvas


def split(step: Step, grid: tuple[int, int], method: Any, *, board: bool) -> Step:
    """Draw what the voting graph drops at ``step`` with its sources chosen by position in the sequence, or as on a chessboard.

    The published graph takes every second *position* as a source. On a grid with an even number of columns those are whole
    columns, and only these can lose patches. On a chessboard the sources are the cells of one colour. Both drop the number that
    the published split votes for.

    Raises:
        ValueError: the step has not the whole grid any more.
    """
    rows, columns = grid
    if len(step.index) != rows * columns:
        raise ValueError("the split is shown at a drop point that still has the whole grid: the first one")
    edges = graph.connect(step.keys[None], method.threshold, center=method.center)
    count = int(graph.count_votes(edges, method.neighbors))
    order = torch.arange(rows * columns)
    if board:
        order = graph.snake(order, columns).argsort()
        edges = graph.connect(step.keys[None, order], method.threshold, center=method.center)
    score = graph.redundancy(edges, method.gamma)
    go = order[0::2][graph.descending(score)[0, :count]]
    stays = torch.ones(len(step.index), dtype=torch.bool).scatter(0, go, False)
    kept = stays.nonzero().flatten()
    stands = similar_survivor(graph.metric(step.keys[None]), Selection(kept[None], (len(kept),)))[0]
    return replace(step, stays=stays, into=step.index[kept][stands])


def layer_colours(layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """A colour for each layer."""
    stops, places = np.linspace(0, 1, len(_LAYERS)), np.linspace(0, 1, max(2, len(layers)))
    return {
        layer: tuple(round(float(np.interp(place, stops, [c[i] for c in _LAYERS]))) for i in range(3))
        for layer, place in zip(layers, places, strict=False)
    }


def _large(photo: Image.Image) -> Image.Image:
    times = max(1, math.ceil(_SIDE / min(photo.size)))
    return photo.convert("RGB").resize((photo.width * times, photo.height * times), Image.Resampling.BICUBIC)


def _grey(photo: Image.Image) -> Image.Image:
    """A pale grey version, for heat maps to lie on."""
    return Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, (128,) * 3), 0.6)


def _box(image: Image.Image, grid: tuple[int, int], number: int) -> tuple[int, int, int, int]:
    row, column = divmod(number, grid[1])
    across, down = image.width / grid[1], image.height / grid[0]
    return round(column * across), round(row * down), round((column + 1) * across), round((row + 1) * down)


def _centre(image: Image.Image, grid: tuple[int, int], number: int) -> tuple[int, int]:
    box = _box(image, grid, number)
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2


def _dot(draw: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    draw.ellipse((at[0] - 3, at[1] - 3, at[0] + 3, at[1] + 3), fill=_LINE)


def _number(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], layer: int, colour: tuple[int, ...]) -> None:
    size = (box[3] - box[1]) // 2
    if size < 7:
        return
    light = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True)) > 140
    draw.text((box[0] + 2, box[1] + 1), str(layer), _INK if light else (255, 255, 255), font(size))
