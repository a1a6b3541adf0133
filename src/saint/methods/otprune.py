"""OTPrune: visual tokens whose kernel has the largest determinant. arXiv 2602.20205."""

import dataclasses
from typing import ClassVar

import torch

from .. import greedy
from ..tokens import Candidates
from .base import Greedy, check_number
from .saint_full_graph import SaintFullGraph


@dataclasses.dataclass(frozen=True)
class OTPrune(Greedy):
    """Keep the subset of visual tokens that spans the largest volume, one token after another.

    With x_ic the embeddings that enter the language model, divided in each channel by their norm over the tokens,
    x_ic = f_ic / sqrt(sum_j f_jc^2), and the kernel K_ij = [i = j] + gamma * sum_c x_ic x_jc, the next token is
    argmax_j det K(S + j) / det K(S) for the tokens S chosen so far. Needs neither text nor attention.

    Published for the connector. In the vision stage, which is ours, the embeddings are those of the residual stream.
    """

    name: ClassVar[str] = "otprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.20205"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    gamma: float = 0.01  # weight of the embeddings in the kernel, in [0, 1000]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0, 1000, "the published value is 0.01")

    def layers(self, stage: str, depth: int) -> list[int]:
        return SaintFullGraph().layers(stage, depth)  # late, where the other one-time choice among all tokens is

    def flops(self, before: int, after: int, dim: int) -> float:
        return super().flops(before, after, dim) + before * after**2  # rows of the factorisation

    def gain(self, candidates: Candidates) -> greedy.Gain:
        valid, points = candidates.tokens.valid, candidates.features.float()
        if valid is not None:
            points = points.masked_fill(~valid.unsqueeze(-1), 0)
        points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True).clamp_min(1e-12)
        kernel = self.gamma * (points @ points.mT)
        return greedy.Volume(kernel + torch.eye(kernel.shape[1], device=kernel.device))
