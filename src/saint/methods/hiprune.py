"""HiPrune: anchors of a middle layer of the vision tower, what lies beside them, and registers. arXiv 2508.00553."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import descending
from ..needs import TOWER_RECEIVED
from ..tokens import Candidates, Selection, Tower, leading
from .base import FixedBudget, check_number, tower_of


@dataclasses.dataclass(frozen=True)
class HiPrune(FixedBudget):
    """Keep what a middle layer of the vision tower attends to, with its neighbours, and what a late layer attends to.

    With a_i the attention that a token gets at a layer, averaged over heads and all tokens of its picture, the anchors are the
    n = round(alpha * T / 5) tokens with the highest a_i of the middle layer, for T tokens to keep. They stay with the four
    tokens beside, above and below them: places p - 1, p + 1, p - columns and p + columns of the picture, row by row, each
    cut to its first and last place. So the neighbour of the end of a row is the beginning of the next, as published. The
    other tokens that stay have the highest a_i of the layer whose output the language model reads (registers).

    Needs no class token. Published middle layers, which are the default: 9 of 24 of LLaVA's tower, as in all towers with a class
    token (0.375); 16 of 32 of Qwen2.5-VL's, as in all others (0.5).
    """

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_RECEIVED})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    alpha: float = 0.1  # share of the survivors that are anchors or beside them, in [0, 1]
    middle: float | None = (
        None  # where the middle layer lies, as a share of the tower's depth, in [0, 1]; None: as published
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 1, "the published value is 0.1")
        if self.middle is not None:
            check_number("middle", self.middle, 0, 1, "the published value is 9 of 24 layers")

    def tower_layers(self, depth: int, read: int, prefix: int) -> tuple[int, ...]:
        middle = self.middle if self.middle is not None else 0.375 if prefix else 0.5
        return min(depth - 1, math.floor(middle * depth + 0.5)), read

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tower, real = tower_of(candidates), candidates.tokens.real
        layers = self.tower_layers(tower.depth, tower.read, tower.prefix)
        middle, late = (tower.attention(TOWER_RECEIVED, layer) for layer in layers)
        # a half rounds up; a few tokens hold no anchor with all four beside it
        counts = [min(math.floor(self.alpha * k / 5 + 0.5), k // 5) for k in goal]
        order = descending(middle.masked_fill(~real, -torch.inf))[:, : max(counts)]  # [B, A]
        anchors = leading(counts, order.shape[1], order.device).expand_as(order)
        near = _beside(tower, order, anchors) & real
        keep = near.scatter(1, order, near.gather(1, order) | anchors)
        rest = torch.tensor(goal, device=keep.device) - keep.sum(1)
        registers = descending(late.masked_fill(keep | ~real, -torch.inf))
        more = torch.arange(keep.shape[1], device=keep.device) < rest.unsqueeze(1)
        return Selection.from_mask(keep.scatter(1, registers, keep.gather(1, registers) | more), goal)


def _beside(tower: Tower, anchors: Tensor, real: Tensor) -> Tensor:
    """Mark the neighbours of anchors on the grids of their pictures, bool [B, N].

    Args:
        tower: of the candidates.
        anchors: slots, int64 [B, A].
        real: which of them are anchors, bool [B, A].

    Raises:
        ValueError: the grid of a picture is not known.
    """
    if not bool(tower.grid.all()):
        raise ValueError("HiPrune needs the grid that patches lie on, which this tower does not show: use VisPruner")
    place, columns, last = tower.place, tower.grid[..., 1], tower.grid.prod(-1) - 1
    picture = torch.nn.functional.pad(place.diff(dim=1) <= 0, (1, 0)).cumsum(1)  # places ascend within a picture
    own = [one.gather(1, anchors) for one in (place, columns, last, picture)]
    near = torch.zeros_like(place, dtype=torch.bool)
    for away in (-torch.ones_like(own[0]), torch.ones_like(own[0]), -own[1], own[1]):
        at = (own[0] + away).clamp_min(0).minimum(own[2])  # [B, A]
        same = (place.unsqueeze(1) == at.unsqueeze(2)) & (picture.unsqueeze(1) == own[3].unsqueeze(2))
        near |= (same & real.unsqueeze(2)).any(1)
    return near
