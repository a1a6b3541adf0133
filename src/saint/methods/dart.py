"""DART: what is least like a few pivots stays. arXiv 2502.11494."""

import dataclasses
from typing import ClassVar

import torch

from .. import graph
from ..tokens import Candidates, Selection
from .base import FixedBudget, check_integer, likeness
from .fastv import FastV


@dataclasses.dataclass(frozen=True)
class DART(FixedBudget):
    """Keep a few pivots, and for each of them the visual tokens that resemble it least.

    The p pivots are the visual tokens with the largest norm sum_d |k_id| of their keys k. Then one pivot after another keeps,
    of the tokens that were not chosen yet, those with the smallest cosine of the residual stream to it: floor(T / p) each for
    the T = ``keep`` - p places that the pivots leave, and one more for the first T mod p of them. Needs no attention.

    Deviations: the authors take half of the pivots among the text, whose keys are not shown, and report that the choice of
    pivots hardly matters. Here keys are averaged over heads, and the cosine is that of the residual stream in front of its norm.
    The norm is of keys behind the rotary table, which changes with a token's position: where padding in front is counted as
    positions (a plain forward without ``position_ids``; ``generate`` gives them), pivots are others than alone.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})

    keep: int | float = 0.25  # survivors of the stage: a number (int) or a fraction of the candidates (float)
    pivots: int = 8  # tokens that others are compared with, >= 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("pivots", self.pivots, 1, hint="the published value is 8")

    def layers(self, stage: str, depth: int) -> list[int]:
        return FastV().layers(stage, depth)  # K = 2 here too

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * self.pivots * before * dim

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens, device = candidates.tokens, candidates.keys.device
        count = min(self.pivots, tokens.slots)
        with graph.full_precision(device):
            length = candidates.keys.float().abs().sum(-1)
            if tokens.valid is not None:
                length = length.masked_fill(~tokens.valid, -1.0)
            pivots = graph.descending(length)[:, :count]  # [B, P]
            unlike = -likeness(candidates.features, pivots)  # [B, P, N]
        first = torch.tensor([min(count, k) for k in goal], device=device).unsqueeze(1)
        places = torch.tensor(goal, device=device).unsqueeze(1) - first  # [B, 1]
        rank = torch.arange(count, device=device)
        taken = torch.zeros(len(goal), tokens.slots, dtype=torch.bool, device=device)
        taken = taken.scatter(1, pivots, rank < first)
        quota = torch.div(places, first, rounding_mode="floor") + (rank < places % first)  # [B, P]
        quota = torch.where(rank < first, quota, 0)
        closed = taken if tokens.valid is None else taken | ~tokens.valid
        slots = torch.arange(tokens.slots, device=device)
        for pivot in range(count):
            order = graph.descending(unlike[:, pivot].masked_fill(closed, -torch.inf))
            picked = torch.zeros_like(taken).scatter(1, order, slots < quota[:, pivot : pivot + 1])
            taken, closed = taken | picked, closed | picked
        return Selection.from_mask(taken, goal)
