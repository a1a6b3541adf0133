"""Evenly spread survivors: spatial subsampling, the other control next to :class:`Random`."""

import dataclasses
from typing import ClassVar

import torch

from ..tokens import Candidates, Selection
from .base import FixedBudget
from .saint import Saint


@dataclasses.dataclass(frozen=True)
class Grid(FixedBudget):
    """Keep tokens at even distances: of N tokens still there, the ones at floor((i + 1/2) N / K) for i = 0..K-1.

    The distance is measured along the sequence (rows of patches after one another), not on the plane: where K divides N
    the survivors stand in columns.
    """

    name: ClassVar[str] = "grid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"  # "+" of LLaVA-PruMerge adds evenly spread tokens
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})

    def layers(self, stage: str, depth: int) -> list[int]:
        return Saint().layers(stage, depth)  # where SAINT drops, so that the two differ in the choice only

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens = candidates.tokens
        device = tokens.index.device
        i = torch.arange(max(goal), device=device)
        if tokens.valid is None and min(goal) == max(goal):
            at = ((2 * i + 1) * tokens.slots // (2 * goal[0])).expand(tokens.index.shape[0], -1)
            return Selection(at, goal)
        count = torch.tensor(tokens.lengths, device=device).unsqueeze(1)
        k = torch.tensor(goal, device=device).unsqueeze(1)
        # one column more, for what is not asked
        rank = ((2 * i + 1) * count // (2 * k)).masked_fill(i >= k, tokens.slots)
        wanted = torch.zeros(len(goal), tokens.slots + 1, dtype=torch.bool, device=device).scatter_(1, rank, True)
        if tokens.valid is None:
            return Selection.from_mask(wanted[:, :-1], goal)
        own = tokens.valid.cumsum(1) - 1  # rank of each slot among the real ones
        return Selection.from_mask(wanted.gather(1, own.clamp_min(0)) & tokens.valid, goal)
