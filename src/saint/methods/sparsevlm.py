"""SparseVLM: the text that is about the picture rates its tokens. arXiv 2410.04417."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..tokens import Candidates
from .base import Scorer


@dataclasses.dataclass(frozen=True)
class SparseVLM(Scorer):
    """Rank visual tokens by the attention they get from raters, the text tokens that the visual ones are nearest to.

    With v and t the embeddings of visual and text tokens that enter the language model, token j of the text is a rater where the
    mean over v of softmax_j(v . t_j) is at least the mean of these over the text; they are chosen once. score_i = mean over heads
    and raters of A_h[rater, i], with A the attention probabilities of the layer the tokens leave after. Only these rows are
    computed, whatever attention implementation the model runs.

    Tokens leave in front of layers 2, 6 and 15 of 32, and of the same shares of another depth: equal shares of them down to
    ``keep``. The published numbers, other ones at each layer, are plans of three stages: ``llava-1.5/sparsevlm-192`` and its
    like in :func:`saint.recipes`.

    Deviations: raters are chosen among the text behind the visual tokens, since none in front of them sees any; a single token
    rates. Rows are those of the layer behind which tokens leave, the one in front of the published place. What leaves is not
    recycled (the authors append means of clusters of it), and original positions are kept, as in the authors' later version.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})
    needs: ClassVar[frozenset[str]] = frozenset({"raters"})

    keep: int | float = (
        0.191  # survivors of the stage: a number (int) or a fraction of the candidates (float); 110 of 576
    )

    def layers(self, stage: str, depth: int) -> list[int]:
        return sorted({max(depth * layer // 32 - 1, 0) for layer in (2, 6, 15)})  # behind 1, 5 and 14 of 32

    def score(self, candidates: Candidates) -> Tensor:
        return candidates.rows["raters"]
