"""PiToMe: protect informative tokens before merging. arXiv 2405.16148."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import graph
from ..tokens import Candidates, Selection, leading
from .base import check_number
from .tome import ToMe

_GRID = 2.0**20  # cosines and energies are multiples of 2^-20: in float64 their sums are exact in any order


@dataclasses.dataclass(frozen=True)
class PiToMe(ToMe):
    """Tokens of high energy, those that many others resemble, merge among themselves; isolated ones are protected.

    With S_ij the cosine of head-mean keys and m the margin of the layer::

        energy_i = sum over j != i of ELU(S_ij - m)        ELU(x) = x if x > 0, else exp(x) - 1
        m = margin * (1 - step / steps)

    To merge k tokens, the 2 k of highest energy go in turns into A (first, third, ...) and B, and every token of A merges into
    the most similar token of B. Equal energies are ordered by index; of equally similar tokens of B the first in that order is
    taken. What a merge does to tokens, sizes and later attention is as for :class:`ToMe`, with the same settings ``r``,
    ``keep`` and ``beta``.

    Deviations: the authors lower the margin with the layer's depth; here it falls over the drop points of the stage, which is
    the same where tokens merge in every layer. They keep a share of the tokens in every layer, which is what ``keep`` does;
    ``r`` = 8 is taken from ToMe. The class token takes no part, and survivors stay in their order. The paper's variant for text
    encoders, with another energy, is not here.
    """

    name: ClassVar[str] = "pitome"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16148"
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})

    margin: float = 0.9  # cosine above which a token adds energy, at the first drop point, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("margin", self.margin, 0, 1, "the published value is 0.9")

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before**2 * dim  # cosines of all pairs

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, drop = candidates.tokens, self.merged(candidates)
        if not any(drop):
            return None
        most, device = max(drop), tokens.index.device
        with graph.full_precision(device):
            similarity = _cosines(candidates.keys)
            margin = self.margin * (1 - candidates.step / candidates.steps)
            order = graph.descending(_energy(similarity, margin, tokens.valid))
            sources, targets = order[:, 0 : 2 * most : 2], order[:, 1 : 2 * most : 2]  # [B, K] each
            go = leading(drop, most, device)
            rows = torch.arange(order.shape[0], device=device).unsqueeze(1)
            edges = similarity[rows.unsqueeze(2), sources.unsqueeze(2), targets.unsqueeze(1)]  # [B, K, K]
            best = edges.masked_fill(~go.unsqueeze(-2), -torch.inf).argmax(-1)
        return Selection.joining(sources, targets.gather(1, best), drop, tokens)


def _cosines(keys: Tensor) -> Tensor:
    """Cosines of all pairs, float64 [B, N, N], exact for unit keys rounded to multiples of 2^-20 (MPS: float32, not exact)."""
    wide = torch.float32 if keys.device.type == "mps" else torch.float64
    points = (graph.metric(keys).to(wide) * _GRID).round_()
    return points @ points.mT / _GRID**2


def _energy(similarity: Tensor, margin: float, valid: Tensor | None) -> Tensor:
    """Energy of each token [B, N]; padding holds -inf and adds nothing to others."""
    terms = (torch.nn.functional.elu(similarity - margin) * _GRID).round_()
    terms = terms.masked_fill(torch.eye(terms.shape[1], dtype=torch.bool, device=terms.device), 0)
    if valid is None:
        return terms.sum(-1)
    return terms.masked_fill(~valid.unsqueeze(1), 0).sum(-1).masked_fill(~valid, -torch.inf)
