"""A smaller picture in front of the tower, which is what people do who do not prune; as a method, to be compared and combined."""

import dataclasses
import math
from typing import ClassVar

import torch

from .. import grids
from ..tokens import Candidates, Selection
from .base import Method, check_budget


@dataclasses.dataclass(frozen=True)
class Resize(Method):
    """The encoder is shown a smaller picture: of R x C patches, round(R sqrt(keep)) x round(C sqrt(keep)) are left.

    The picture is resized (bicubic, antialiased) in front of the convolution that makes tokens of patches. Each of the fewer
    patches stands where its centre lies on the grid that the picture had, with the position of the patch there, so the model
    needs no other table of positions, and takes any size. Where a model joins squares of patches, squares are counted.
    ``Plan(pixels=...)`` puts this in front of whatever else a plan does.

    Deviation from resizing in front of the model: positions are those of the nearest patch and not interpolated.
    """

    name: ClassVar[str] = "resize"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"  # image downsampling as a baseline of pruning
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs: ClassVar[frozenset[str]] = frozenset({"resized"})

    keep: int | float = 0.5  # share of the pixels (float), or how many patches at most (int; of a smaller picture all)

    def __post_init__(self) -> None:
        check_budget(self.keep)

    def final(self, total: int) -> int:
        edge = math.isqrt(total)
        if edge**2 == total:
            return math.prod(grids.smaller(edge, edge, self.keep))
        return min(total, self.keep) if isinstance(self.keep, int) else max(1, round(self.keep * total))

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, laid = candidates.tokens, candidates.facts.grids
        if laid is None:
            raise ValueError("Resize needs the grid that patches lie on, which this model does not show")
        fewer = [grids.smaller(*grid, self.keep) for grid in laid]
        if list(laid) == fewer:
            return None
        # one row for all where pictures are of one size, however many: an exported graph has any number of samples
        pairs = list(zip(laid, fewer, strict=True))[: 1 if len(set(laid)) == 1 else None]
        rows = [[*_into(*grid, *smaller), *range(math.prod(grid), tokens.slots)] for grid, smaller in pairs]
        into = torch.tensor(rows, device=tokens.index.device).expand_as(tokens.index)
        return Selection.merging(into, tuple(map(math.prod, fewer)), tokens)


def _into(rows: int, columns: int, fewer_rows: int, fewer_columns: int) -> list[int]:
    """For each patch, row by row, the one that shows it in the smaller picture, where that stands."""
    places = [
        [where[cell] for cell in grids.under(count, fewer)]
        for count, fewer, where in (
            (rows, fewer_rows, grids.at(rows, fewer_rows)),
            (columns, fewer_columns, grids.at(columns, fewer_columns)),
        )
    ]
    return [row * columns + column for row in places[0] for column in places[1]]
