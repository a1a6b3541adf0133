"""SCOPE: visual tokens that cover all others, the salient ones first. arXiv 2510.24214."""

import dataclasses
from typing import ClassVar

from .. import greedy
from ..needs import TOWER_RECEIVED
from ..tokens import Candidates
from .base import Greedy, check_number, tower_of
from .fastv import FastV


@dataclasses.dataclass(frozen=True)
class SCOPE(Greedy):
    """Keep the visual tokens that cover all of them best, weighted by their saliency, one token after another.

    With S_ij the cosine of the tokens' embeddings, a_i their saliency, and c_j = max over the tokens s chosen so far of S_sj
    (0 before there is one), the next token is argmax_i a_i^alpha * sum_j max(0, S_ij - c_j).

    In front of the language model, as published, a_i is the attention that the token gets in the last layer of the vision tower,
    averaged over heads and all tokens of its picture.

    Deviation: in the language stage, which is ours, tokens leave behind a layer of the language model, by default where
    :class:`FastV` drops; a_i is the attention of the last prompt token there, and the embeddings are those of that layer.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    stages: ClassVar[frozenset[str]] = frozenset({"connector", "language"})
    needs: ClassVar[frozenset[str]] = frozenset({"last_query", TOWER_RECEIVED})  # each in its slot

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    alpha: float = 1.0  # power of the saliency, in [0, 10]; 0: coverage alone

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 10, "the published value is 1")

    def asks(self, slot: str) -> frozenset[str]:
        return frozenset({TOWER_RECEIVED if slot == "connector" else "last_query"})

    def tower_layers(self, depth: int, read: int, prefix: int) -> tuple[int, ...]:
        return (depth - 1,)

    def layers(self, stage: str, depth: int) -> list[int]:
        return FastV().layers(stage, depth)

    def flops(self, before: int, after: int, dim: int) -> float:
        # what each token would add, for each that is chosen
        return super().flops(before, after, dim) + 3 * before**2 * after

    def gain(self, candidates: Candidates) -> greedy.Gain:
        saliency = candidates.attention
        if saliency is None:
            tower = tower_of(candidates)
            saliency = tower.attention(TOWER_RECEIVED, tower.depth - 1)
        similarity = greedy.cosines(candidates.features)
        return greedy.Coverage(similarity, saliency**self.alpha, candidates.tokens.valid)
