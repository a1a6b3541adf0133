"""CDPruner: a diverse subset of visual tokens that the prompt is about. arXiv 2506.10967."""

import dataclasses
from typing import ClassVar

from .. import greedy
from ..tokens import Candidates
from .base import Greedy, relevance


@dataclasses.dataclass(frozen=True)
class CDPruner(Greedy):
    """Keep the subset of visual tokens that spans the largest volume, each as long as the prompt finds it relevant.

    With S_ij the cosine of the tokens' embeddings and r_i in [0, 1] their relevance, the kernel is L_ij = r_i S_ij r_j, and the
    next token is the one by which the determinant of the kernel of those chosen grows most (greedy maximum a posteriori of a
    determinantal point process). r is the mean cosine of a token's embedding and those of the prompt's text, less the smallest
    of the sample, over the largest less the smallest.

    Deviations: the authors compare with the text tower of CLIP, where there is one, and negate; language models have none, so
    the embeddings that enter the language model are compared, not negated. They take smallest and largest of the whole batch.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)

    def flops(self, before: int, after: int, dim: int) -> float:
        return super().flops(before, after, dim) + before * after**2  # rows of the factorisation

    def gain(self, candidates: Candidates) -> greedy.Gain:
        weight = relevance(candidates)
        return greedy.Volume(weight.unsqueeze(2) * greedy.cosines(candidates.features) * weight.unsqueeze(1))
