"""PriorTR: keep what the question looks at more than a token that does not know the question. arXiv 2606.24156."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..tokens import Candidates
from .base import Scorer


@dataclasses.dataclass(frozen=True)
class PriorTR(Scorer):
    """Rank visual tokens by what they add to the divergence between a question's attention and attention without it.

    score_i = P_i log(P_i / Q_i). P is the attention of the text behind the visual tokens, averaged over its tokens and over
    heads, at the layer the tokens leave after (the third by default); Q that of the first of these tokens, which sees all visual
    tokens and, by causality, nothing of the question. Both sum to 1 over the visual tokens that are left. Only these rows are
    computed, whatever attention implementation the model runs.

    Where one token alone stands behind the visual tokens, and where none does and the last token is asked, P = Q, and P ranks.

    Deviation: where a model lets the tokens of a prompt see later ones (PaliGemma), Q knows the question too.
    """

    name: ClassVar[str] = "priortr"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.24156"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})
    needs: ClassVar[frozenset[str]] = frozenset({"question", "first_query"})

    keep: int | float = 0.25  # survivors of the stage: a number (int) or a fraction of the candidates (float)

    def layers(self, stage: str, depth: int) -> list[int]:
        return [min(2, depth - 1)]  # the first three layers see every token

    def score(self, candidates: Candidates) -> Tensor:
        valid = candidates.tokens.valid
        question, prior = (_distribution(candidates.rows[name], valid) for name in ("question", "first_query"))
        same = question == prior if valid is None else (question == prior) | ~valid
        return torch.where(same.all(1, keepdim=True), question, question * (question / prior).log())


def _distribution(row: Tensor, valid: Tensor | None) -> Tensor:
    """Attention [B, N] as shares of what real candidates get; padding holds anything."""
    # probabilities of half precision may be 0
    row = row.clamp_min(torch.finfo(torch.float32).tiny)
    real = row if valid is None else row.masked_fill(~valid, 0)
    return row / real.sum(1, keepdim=True)
