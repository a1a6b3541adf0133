"""SAINT's full graph with a fixed budget: the variant used inside the CLIP tower of a VLM. arXiv 2503.11549."""

import dataclasses
import math
from typing import ClassVar

from .. import graph
from ..tokens import Candidates, Selection
from .base import FixedBudget, check_flag, check_integer


@dataclasses.dataclass(frozen=True)
class SaintFullGraph(FixedBudget):
    """Iteratively drop the tokens most similar to all that are left, until ``keep`` remain."""

    name: ClassVar[str] = "saint_full_graph"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11549"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})

    # survivors of the stage: a number (int) or a fraction of the candidates (float); published: 375 of LLaVA-1.5's 576
    keep: int | float = 375 / 576
    step: int = 16  # each round removes 1/step of what remains
    center: bool = False  # subtract the mean key first

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("step", self.step, 1, hint="the published value is 16")
        check_flag("center", self.center)

    def layers(self, stage: str, depth: int) -> list[int]:
        return [depth * 4 // 5]  # layer 19 of CLIP ViT-L's 24, as published

    def flops(self, before: int, after: int, dim: int) -> float:
        rounds = max(1.0, self.step * math.log(before / after)) if after < before else 0.0
        return rounds * 4 * before * dim

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens = candidates.tokens
        keep = goal[0] if len(set(goal)) == 1 and tokens.valid is None else list(goal)
        alive = graph.eliminate(candidates.keys, keep, self.step, center=self.center, valid=tokens.valid)
        return Selection.from_mask(alive, goal)
