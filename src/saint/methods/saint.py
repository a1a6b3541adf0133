"""SAINT's voting graph: drop the tokens that many others resemble. arXiv 2503.11549, section 3."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor

from .. import graph, operators
from ..tokens import Candidates, Selection
from .base import (
    Budget,
    Method,
    check_budget,
    check_flag,
    check_integer,
    check_number,
    check_steps,
    floored,
    host_counts,
    to_drop,
)

_LARGEST_EXPONENT = 64.0


@dataclasses.dataclass(frozen=True)
class Saint(Method):
    """Similarity voting between even (sources) and odd (targets) candidates; only sources can go.

    With ``budget="sample"`` each sample drops as many tokens as it has votes (our default), with ``"batch"`` every
    sample drops the batch mean, rounded down (the published rule: results then depend on the batch mates). With a number,
    which may also be given as ``keep`` as in other methods, the votes are ignored and the complete stage keeps that many tokens,
    the same share at every drop point.
    """

    name: ClassVar[str] = "saint"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11549"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "language"})

    threshold: float = 0.75  # cosine from which two tokens count as similar, in (-1, 1]
    neighbors: int = 5  # edges a source needs to vote, >= 1
    gamma: float = 10.0  # sharpness of the score, in [0, 64 / (1 - threshold)]
    budget: Budget = "sample"  # "sample" | "batch" | tokens kept (int) | fraction of the candidates kept (float)
    center: bool = False  # subtract the mean key first; for encoders whose keys share a large common component
    floor: float = 0.1  # fraction of the stage's original candidates that always survives, in [0, 1]
    keep: dataclasses.InitVar[int | float | None] = None  # in place of a number as budget

    def __post_init__(self, keep: int | float | None) -> None:
        if keep is not None:
            check_budget(keep)
            object.__setattr__(self, "budget", keep)
        graph.check_threshold(self.threshold)
        check_integer("neighbors", self.neighbors, 1, hint="the published value is 5")
        # with c <= 2^31 edges the score c * exp(gamma * (s - threshold)) stays a finite float32
        most = _LARGEST_EXPONENT / max(1.0 - self.threshold, 1e-3)
        check_number(
            "gamma",
            self.gamma,
            0,
            most,
            "the published value is 10, and exp(gamma * (1 - threshold)) must not overflow",
        )
        check_number("floor", self.floor, 0, 1, "a fraction of the stage's original candidates")
        check_budget(self.budget, ("sample", "batch"), "budget")
        check_flag("center", self.center)

    def flops(self, before: int, after: int, dim: int) -> float:
        return before**2 * dim / 2  # cosines of one half with the other

    @property
    def fixed(self) -> int | float | None:
        return None if isinstance(self.budget, str) else self.budget

    def keeping(self, keep: int | float) -> Self:
        return dataclasses.replace(self, budget=keep)

    def voting(self, threshold: float) -> Self:
        return dataclasses.replace(self, threshold=threshold, budget="sample")

    @property
    def votes(self) -> bool:
        return isinstance(self.budget, str)

    @property
    def shared(self) -> bool:
        return self.budget == "batch"

    def layers(self, stage: str, depth: int) -> list[int]:
        # ViT: the authors' scripts use the first half; LLM: their layers 7..16 of 32 and of 40, cut at the depth
        return list(range(depth // 2 or 1)) if stage == "vision" else list(range(min(7, depth - 1), min(17, depth)))

    def validate(self, total: int, steps: int) -> None:
        if isinstance(self.budget, str):
            return
        check_steps(self.budget, total, steps, lambda n: (n + 1) // 2, "drop")

    def select(self, candidates: Candidates) -> Selection | None:
        tokens = candidates.tokens
        edges = operators.connect(candidates.keys, self.threshold, center=self.center, valid=tokens.valid)
        drop = self.drops(lambda: graph.count_votes(edges, self.neighbors, valid=tokens.valid), candidates)
        if not any(drop):
            return None
        score = graph.redundancy(edges, self.gamma, valid=tokens.valid)
        return operators.selection(score, drop, tokens)

    def drops(self, votes: Callable[[], Tensor], candidates: Candidates) -> tuple[int, ...]:
        """Tokens of each sample that go.

        Args:
            votes: counts the votes of each sample, int64 [B]; not called where a number was given.
            candidates: of the drop point.
        """
        if not isinstance(self.budget, str):
            return to_drop(self.budget, candidates)
        tokens = candidates.tokens
        drop = host_counts(votes())
        if self.budget == "batch":
            drop = (sum(drop) // len(drop),) * len(drop)
            if tokens.valid is not None:  # a padded sample may have fewer sources than the mean asks for
                drop = tuple(min(r, (n + 1) // 2) for r, n in zip(drop, tokens.lengths, strict=True))
        return floored(drop, candidates, self.floor) if any(drop) else drop
