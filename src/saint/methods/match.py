"""The paper's graph with every token in at most one pair: matching instead of votes. Ours; see docs/matching.md."""

import dataclasses
from typing import ClassVar, Literal, Self, get_args

from .. import graph
from ..tokens import Candidates, Selection
from .base import (
    Method,
    check_budget,
    check_flag,
    check_number,
    check_steps,
    floored,
    host_counts,
    to_drop,
)

Fate = Literal["drop", "weigh", "merge"]


@dataclasses.dataclass(frozen=True)
class Match(Method):
    """Pairs of similar tokens; of each pair the one that is more similar to all others leaves, its partner stays.

    The voting graph of SAINT scores every source on its own. Here a token leaves only beside a partner that stays, the two sides
    of the graph are the colours of a chessboard instead of even and odd positions, and either token of a pair may leave.

    Without ``keep`` each sample drops as many tokens as it has pairs of at least ``threshold``. With it the stage keeps that many
    tokens, the same share at every drop point, which can be half of what is there at most.

    What becomes of the token that leaves is its ``fate``. "drop": nothing. "weigh": its partner counts for it, later attention
    adds beta * log(size) to the logits of a token that stands for ``size`` of them, and is unchanged itself. "merge": likewise,
    and the partner becomes the mean of what it stands for, as in :class:`saint.methods.ToMe`.
    """

    name: ClassVar[str] = "match"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11549"  # the graph; the matching is ours
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "language"})

    threshold: float = 0.75  # cosine from which the tokens of a pair are similar, in (-1, 1]
    keep: int | float | None = None  # tokens kept (int), fraction of the candidates kept (float), or None: pairs decide
    center: bool = False  # subtract the mean key first; for encoders whose keys share a large common component
    fate: Fate = "drop"  # of what leaves: "drop", "weigh" or "merge"
    beta: float = 0.3  # of "weigh" and "merge": weight of log(size) in later attention, in [0, 1000]
    floor: float = 0.1  # fraction of the stage's original candidates that always survives, in [0, 1]

    def __post_init__(self) -> None:
        graph.check_threshold(self.threshold)
        check_number("floor", self.floor, 0, 1, "a fraction of the stage's original candidates")
        if self.keep is not None:
            check_budget(self.keep)
        check_flag("center", self.center)
        if self.fate not in get_args(Fate):
            raise ValueError(f"fate must be one of {', '.join(get_args(Fate))}, got {self.fate!r}")
        check_number("beta", self.beta, 0, 1000, "0.3 suits fate='weigh', 1 suits fate='merge'")
        # of the class in other methods; here a setting decides
        object.__setattr__(self, "merges", self.fate != "drop")
        object.__setattr__(self, "averages", self.fate == "merge")

    def layers(self, stage: str, depth: int) -> list[int]:
        return list(range(1, depth, 2)) or [0] if stage == "vision" else list(range(min(7, depth - 1), min(9, depth)))

    def voting(self, threshold: float) -> Self:
        return dataclasses.replace(self, threshold=threshold, keep=None)

    @property
    def votes(self) -> bool:
        return self.keep is None

    def flops(self, before: int, after: int, dim: int) -> float:
        return before**2 * dim / 2  # cosines of one half with the other

    def size_bias(self) -> float:
        return self.beta if self.merges else 0.0

    def validate(self, total: int, steps: int) -> None:
        if self.keep is not None:
            check_steps(self.keep, total, steps, lambda n: n // 2, "drop")

    def select(self, candidates: Candidates) -> Selection | None:
        tokens = candidates.tokens
        if tokens.slots < 2:
            return None
        drop = None if self.keep is None else to_drop(self.keep, candidates)
        if drop is not None and not any(drop):
            return None  # before the graph is made: the number does not come from it
        pairs = graph.pair(
            candidates.keys, tokens.index, candidates.facts.columns, center=self.center, valid=tokens.valid
        )
        if drop is None:
            drop = host_counts((pairs.similarity >= self.threshold).sum(-1))
            if any(drop):
                drop = floored(drop, candidates, self.floor)
            if not any(drop):
                return None
        order = graph.descending(pairs.similarity)
        leaves = pairs.leaves.gather(1, order)
        if self.merges:
            return Selection.joining(leaves, pairs.stays.gather(1, order), drop, tokens)
        return Selection.from_order(leaves, drop, tokens)
