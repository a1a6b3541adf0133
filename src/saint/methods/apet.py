"""ApET: visual tokens that a few others cannot approximate stay. arXiv 2602.19870."""

import dataclasses
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import graph, greedy
from ..tokens import Candidates, Selection, leading
from .base import FixedBudget, check_integer, check_number
from .saint_full_graph import SaintFullGraph


@dataclasses.dataclass(frozen=True)
class ApET(FixedBudget):
    """Keep a basis of visual tokens, and those with the largest error when the basis approximates them.

    The basis Z are K tokens by farthest points under the Euclidean distance: the first is the farthest from the mean, each
    further one the farthest from the nearest of those taken. Each token x is approximated by
    x' = Z^T (Z Z^T + ridge I)^-1 Z x, and beside the basis the tokens with the largest |x - x'| stay. Needs neither text nor
    attention.

    Deviations: the authors merge what is dropped into the nearest survivor, and drop once more in the language model; here it
    leaves, once, in front of the language model. In the vision stage, which is ours, tokens are those of the residual stream.
    """

    name: ClassVar[str] = "apet"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.19870"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    basis: int = 10  # tokens that approximate the others, >= 1; as many as are kept, where that is fewer
    ridge: float = 1e-5  # regularisation of the approximation, in [1e-8, 1000]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("basis", self.basis, 1, hint="the published value is 10")
        check_number("ridge", self.ridge, 1e-8, 1000, "the published value is 1e-5")

    def layers(self, stage: str, depth: int) -> list[int]:
        return SaintFullGraph().layers(stage, depth)  # late, where the other one-time choice among all tokens is

    def flops(self, before: int, after: int, dim: int) -> float:
        return 7 * min(self.basis, after) * before * dim  # distances from the basis, and the approximation by it

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens, valid = candidates.tokens, candidates.tokens.valid
        with graph.full_precision(candidates.features.device):
            points = candidates.features.float()
            if valid is not None:
                points = points.masked_fill(~valid.unsqueeze(-1), 0)
            count = torch.tensor(tokens.lengths, device=points.device).view(-1, 1, 1)
            mean = points.sum(1, keepdim=True) / count
            counts = tuple(min(self.basis, k) for k in goal)
            first = -torch.linalg.vector_norm(points - mean, dim=-1)  # near is the opposite of far
            order = greedy.sequence(greedy.Apart(partial(_near, points), first), counts, valid)  # [B, K]
            inside = leading(counts, order.shape[1], order.device)
            error = _errors(points, order, inside, self.ridge)
            error = error.scatter(1, order, torch.where(inside, torch.inf, error.gather(1, order)))
        return Selection.from_scores(error, goal, tokens)


def _near(points: Tensor, slot: Tensor) -> Tensor:
    """Give the opposite of the distances from point ``slot[b]``: [B, N, C] and int64 [B] -> [B, N]."""
    own = points[torch.arange(len(slot), device=slot.device), slot].unsqueeze(1)
    return -torch.cdist(own, points, compute_mode="donot_use_mm_for_euclid_dist").squeeze(1)


def _errors(points: Tensor, order: Tensor, inside: Tensor, ridge: float) -> Tensor:
    """Norm of what the basis leaves of each token, [B, N].

    Args:
        points: [B, N, C].
        order: slots of the basis, int64 [B, K].
        inside: which of them are the sample's own, bool [B, K]; the others approximate nothing.
        ridge: regularisation.
    """
    basis = points.gather(1, order.unsqueeze(-1).expand(-1, -1, points.shape[-1])) * inside.unsqueeze(-1)  # [B, K, C]
    gram = basis @ basis.mT + ridge * torch.eye(basis.shape[1], device=points.device)
    weights = torch.linalg.solve(gram, basis @ points.mT)  # [B, K, N]
    return torch.linalg.vector_norm(points - weights.mT @ basis, dim=-1)
