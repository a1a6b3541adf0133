"""FastV: drop the visual tokens that the last token of the prompt hardly looks at. arXiv 2403.06764."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..tokens import Candidates
from .base import Scorer


@dataclasses.dataclass(frozen=True)
class FastV(Scorer):
    """Rank visual tokens by the attention they get from the last prompt token, averaged over heads.

    score_i = mean_h A_h[last, i] with A the attention probabilities of the layer the tokens leave after: the layer with
    0-based index K - 1 in the paper's counting, K = 2 by default; ``keep`` is 1 - R. The last token is the last of
    each sample that is no padding. Original positions are kept; the tokens go once, in the prompt (the paper's variant with
    a cache). Only this one row is computed, whatever attention implementation the model runs.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})
    needs: ClassVar[frozenset[str]] = frozenset({"last_query"})

    def layers(self, stage: str, depth: int) -> list[int]:
        return [min(1, depth - 1)]  # K = 2: the first two layers see every token

    def score(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None
        return candidates.attention
