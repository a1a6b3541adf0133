"""ToMe: merge the most similar tokens into one. arXiv 2210.09461."""

import dataclasses
from typing import ClassVar, Self

from .. import graph
from ..tokens import Candidates, Selection
from .base import Method, check_budget, check_integer, check_number, check_steps, spared, to_drop


@dataclasses.dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching: even candidates (A) each pick the most similar odd one (B); the best r edges merge.

    Similarity is the cosine of head-mean keys. x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a) with s the number of patches a
    token stands for, and later attention is proportional: softmax(q k^T / sqrt(d) + beta log s). Protected tokens take no part.
    The merged token keeps the place (and rotary position) of its B.

    Give ``r`` or ``keep``, neither means r = 8. A merge is no drop, so masked-oracle equality does not apply; what holds, and
    is checked, is equality with the full-length forward in which all tokens merged into one share their mean (with beta = 1
    this *is* proportional attention). An average pool behind the encoder averages the survivors; ``Stage(output="similar")``
    weights each by its size, as the authors do for such models.

    Deviations: A and B alternate over the candidates in their original order at every layer (the authors' code counts the class
    token in, and puts merged tokens behind the others). In a language model, which is not in the paper, visual tokens of a prompt
    merge; a merged token keeps place and rotary position of its B, so a token between A and B no longer sees A.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "language"})
    merges: ClassVar[bool] = True
    published_r: ClassVar[int] = 8  # MAE ViT-L/16, 24 layers, without training

    r: int | None = None  # tokens merged at every layer, >= 1; at most half of what is there
    keep: int | float | None = None  # tokens (int) or fraction of the candidates (float) left behind the stage
    beta: float = 1.0  # weight of log(size) in later attention, in [0, 1000]; 0 switches proportional attention off

    def __post_init__(self) -> None:
        if self.r is not None and self.keep is not None:
            raise ValueError(
                f"give r (merged per layer) or keep (left in the end), got r={self.r!r} and keep={self.keep!r}"
            )
        if self.keep is not None:
            check_budget(self.keep)
        elif self.r is None:
            object.__setattr__(self, "r", self.published_r)
        else:
            check_integer("r", self.r, 1, hint="tokens merged per layer; 8 to 16 are published")
        # at 1000, beta * log(size) of 10^6 patches in one token is 14,000: a logit that float16 still holds
        check_number("beta", self.beta, 0, 1000, "the published value is 1")

    def keeping(self, keep: int | float) -> Self:
        return dataclasses.replace(self, r=None, keep=keep)

    def layers(self, stage: str, depth: int) -> list[int]:
        return list(range(depth))  # every block

    def flops(self, before: int, after: int, dim: int) -> float:
        return before**2 * dim / 2  # cosines of one half with the other

    def size_bias(self) -> float:
        return self.beta

    def validate(self, total: int, steps: int) -> None:
        if self.keep is None:
            return
        check_steps(self.keep, total, steps, lambda n: n // 2, "merge")

    def merged(self, candidates: Candidates) -> tuple[int, ...]:
        """Tokens of each sample that merge into another at this drop point."""
        if self.keep is not None:
            return to_drop(self.keep, candidates)
        assert self.r is not None
        return spared(tuple(min(self.r, n // 2) for n in candidates.tokens.lengths), candidates)

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, drop = candidates.tokens, self.merged(candidates)
        if not any(drop):
            return None
        edges = graph.match(candidates.keys, valid=tokens.valid)
        order = graph.descending(edges.similarity)
        return Selection.joining(edges.sources[order], edges.targets.gather(1, order), drop, tokens)
