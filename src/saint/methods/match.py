"""The paper's graph with every token in at most one pair: matching instead of votes. Ours; see docs/matching.md."""

import dataclasses
from typing import ClassVar

from .. import graph
from ..tokens import Candidates, Selection
from .base import (
    Budget,
    Method,
    check_budget,
    check_flag,
    check_number,
    check_steps,
    floored,
    host_counts,
    to_drop,
)


@dataclasses.dataclass(frozen=True)
class Match(Method):
    """Pairs of most similar tokens; of each pair the one that is more similar to all others leaves, its partner stays.

    The voting graph of SAINT scores every source on its own. Here a token leaves only beside a partner that stays, the two sides
    of the graph are the colours of a chessboard instead of even and odd positions, and either token of a pair may leave.

    With ``budget="sample"`` each sample drops as many tokens as it has pairs of at least ``threshold``. With a number the stage
    keeps that many tokens, the same share at every drop point, which can be half of what is there at most.
    """

    name: ClassVar[str] = "match"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11549"  # the graph; the matching is ours
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "language"})

    threshold: float = 0.75  # cosine from which the tokens of a pair are similar, in (-1, 1]
    budget: Budget = "sample"  # "sample" | tokens kept (int) | fraction of the candidates kept (float)
    center: bool = False  # subtract the mean key first; for encoders whose keys share a large common component
    floor: float = 0.1  # fraction of the stage's original candidates that always survives, in [0, 1]

    def __post_init__(self) -> None:
        graph.check_threshold(self.threshold)
        check_number("floor", self.floor, 0, 1, "a fraction of the stage's original candidates")
        check_budget(self.budget, ("sample",))
        check_flag("center", self.center)

    def layers(self, stage: str, depth: int) -> list[int]:
        return [0, 1][:depth] if stage == "vision" else list(range(min(7, depth - 1), min(9, depth)))

    def validate(self, total: int, steps: int) -> None:
        if not isinstance(self.budget, str):
            check_steps(self.budget, total, steps, lambda n: n // 2, "drop")

    def select(self, candidates: Candidates) -> Selection | None:
        tokens = candidates.tokens
        if tokens.slots < 2:
            return None
        drop = None if isinstance(self.budget, str) else to_drop(self.budget, candidates)
        if drop is not None and not any(drop):
            return None  # before the graph is made: the number does not come from it
        pairs = graph.pair(candidates.keys, tokens.index, candidates.columns, center=self.center, valid=tokens.valid)
        if drop is None:
            drop = host_counts((pairs.similarity >= self.threshold).sum(-1))
            if any(drop):
                drop = floored(drop, candidates, self.floor)
            if not any(drop):
                return None
        order = graph.descending(pairs.similarity)
        return Selection.from_order(pairs.leaves.gather(1, order), drop, tokens)
