"""D2Pruner: important visual tokens, and then ones that are neither like nor beside those taken. arXiv 2512.19443."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import graph, greedy
from ..tokens import Candidates, Selection
from .base import FixedBudget, check_number
from .fastv import FastV


@dataclasses.dataclass(frozen=True)
class D2Pruner(FixedBudget):
    """Keep the visual tokens of most importance, and then an independent set of a graph of likeness and neighbourhood.

    importance_i = mean_h A_h[last, i] - prior_i, with A the attention probabilities of the layer the tokens leave after and the
    last prompt token as for :class:`FastV`. The most important tokens are pivots, round(``pivots`` * ``keep``) of them. Then
    tokens join in order of importance, each unless it has an edge to one that is in; where no such token is left, the others join
    in the same order. Two tokens have an edge where the cosine of their keys is at least ``threshold`` (as the voting graph of
    :class:`saint.Saint`), or where they stand beside each other.

    Deviations: prior, share of pivots and threshold of the authors are not known here. The prior is the straight line over the
    places of the visual tokens that fits their attention best, so that a token far behind is not important for its place; the
    share is a half, the threshold that of :class:`saint.Saint` in language models. The grid of a picture is not shown in
    language models, so the neighbours of a token are the ones in front of and behind it, not eight.
    """

    name: ClassVar[str] = "d2pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.19443"
    stages: ClassVar[frozenset[str]] = frozenset({"language"})
    needs: ClassVar[frozenset[str]] = frozenset({"last_query"})

    keep: int | float = 0.25  # survivors of the stage: a number (int) or a fraction of the candidates (float)
    pivots: float = 0.5  # share of them that importance alone decides, in [0, 1]
    threshold: float = 0.83  # cosine from which two tokens have an edge, in (-1, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("pivots", self.pivots, 0, 1, "a share of the tokens kept")
        graph.check_threshold(self.threshold)

    def layers(self, stage: str, depth: int) -> list[int]:
        return FastV().layers(stage, depth)

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before**2 * dim  # cosines of all pairs

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens, attention = candidates.tokens, candidates.attention
        assert attention is not None
        with graph.full_precision(attention.device):
            importance = attention - _line(attention, tokens.index, tokens.valid)
            beside = (tokens.index.unsqueeze(1) - tokens.index.unsqueeze(2)).abs() == 1  # [B, N, N]
            edges = beside | (greedy.cosines(candidates.keys) > graph.just_below(self.threshold))
            pivots = torch.tensor([int(self.pivots * k + 0.5) for k in goal], device=attention.device)
            return greedy.subset(greedy.Independent(importance, edges, pivots), goal, tokens)


def _line(values: Tensor, place: Tensor, valid: Tensor | None) -> Tensor:
    """The straight line over places that fits values best, at these places: float32 and int64 [B, N] -> [B, N]."""
    real = torch.ones_like(values) if valid is None else valid.to(values.dtype)
    count = real.sum(1, keepdim=True)
    far, high = ((x * real).sum(1, keepdim=True) / count for x in (place, values))
    away = (place - far) * real
    slope = (away * values).sum(1, keepdim=True) / away.square().sum(1, keepdim=True).clamp_min(1e-30)
    return high + slope * (place - far)
