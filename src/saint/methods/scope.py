"""SCOPE: visual tokens that cover all others, the salient ones first. arXiv 2510.24214."""

import dataclasses
from typing import ClassVar

from .. import greedy
from ..tokens import Candidates
from .base import Greedy, check_number
from .fastv import FastV


@dataclasses.dataclass(frozen=True)
class SCOPE(Greedy):
    """Keep the visual tokens that cover all of them best, weighted by their saliency, one token after another.

    With S_ij the cosine of the tokens' embeddings, a_i their saliency, and c_j = max over the tokens s chosen so far of S_sj
    (0 before there is one), the next token is argmax_i a_i^alpha * sum_j max(0, S_ij - c_j).

    Deviation: published in front of the language model, with the attention that tokens receive in the last layer of the vision
    tower as saliency. Here tokens leave behind a layer of the language model, by default where :class:`FastV` drops, with the
    attention of the last prompt token as saliency and the embeddings of that layer.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})
    needs: ClassVar[frozenset[str]] = frozenset({"last_query"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    alpha: float = 1.0  # power of the saliency, in [0, 10]; 0: coverage alone

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 10, "the published value is 1")

    def layers(self, stage: str, depth: int) -> list[int]:
        return FastV().layers(stage, depth)

    def flops(self, before: int, after: int, dim: int) -> float:
        # what each token would add, for each that is chosen
        return super().flops(before, after, dim) + 3 * before**2 * after

    def gain(self, candidates: Candidates) -> greedy.Gain:
        assert candidates.attention is not None
        similarity = greedy.cosines(candidates.features)
        return greedy.Coverage(similarity, candidates.attention**self.alpha, candidates.tokens.valid)
