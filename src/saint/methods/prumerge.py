"""PruMerge: the visual tokens that stand out in the attention of the class token, with what they stand for. arXiv 2403.15388."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..needs import TOWER_JOINED, TOWER_KEYS
from ..tokens import Candidates, Selection, highest
from .base import (
    Method,
    check_budget,
    check_flag,
    check_integer,
    final_keep,
    goals,
    host_counts,
    likeness,
    tower_of,
)


@dataclasses.dataclass(frozen=True)
class PruMerge(Method):
    """Keep the visual tokens that the class token attends to most, each with a sum of those that resemble it.

    a_i is the attention of the class token in the last layer of the vision tower, with all heads as one:
    softmax_i(q . k_i / sqrt(C)) of queries and keys of C channels. What stands out stays: a_i > Q3 + 1.5 (Q3 - Q1), with the
    quartiles of the picture's tokens; so the picture decides how many. With ``keep`` it is the keep - 1 tokens of highest a_i.
    Each that stays becomes x_i + sum_j a_j x_j over the ``neighbors`` others with the most similar keys (cosine), whether they
    stay or not. One token more is sum_j a_j x_j over all that leave; it stands at the place of the last of them.

    ``plus`` is PruMerge+: with r the share of tokens that stand out, every s-th token stays too, s = floor(floor(1 / r) / 3), at
    least 1. With ``keep`` a quarter is chosen by attention, and the rest in even steps of what is left.

    Deviations: keys are averaged over heads where they are compared. In towers without class token a_i is the attention that a
    token gets, averaged over heads and all tokens of its picture. Several pictures of a prompt count as one. The published
    quartiles are those of a whole batch.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_JOINED, TOWER_KEYS})

    keep: int | float | None = (
        None  # survivors: a number (int), a fraction of the candidates (float); None: pictures decide
    )
    neighbors: int = 32  # tokens that are added to each that stays, >= 0
    plus: bool = False  # also tokens in even steps

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_budget(self.keep)
        check_integer("neighbors", self.neighbors, 0, hint="the published value is 32")
        check_flag("plus", self.plus)

    @property
    def votes(self) -> bool:
        return self.keep is None

    def validate(self, total: int, steps: int) -> None:
        if self.keep is not None:
            final_keep(self.keep, total)

    def tower_layers(self, depth: int, read: int, prefix: int) -> tuple[int, ...]:
        return (depth - 1,)

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before * after * dim  # cosines with those that stay

    def select(self, candidates: Candidates) -> Selection | None:
        tower, tokens, real = tower_of(candidates), candidates.tokens, candidates.tokens.real
        weight = tower.attention(TOWER_JOINED, tower.depth - 1)
        if self.keep is None:
            chosen = self._outstanding(weight, real)
            counts = host_counts(chosen.sum(1))
            goal = tuple(min(c + 1, n) for c, n in zip(counts, tokens.lengths, strict=True))
        else:
            goal = goals(self.keep, candidates)
            if goal == tokens.lengths:
                return None
            counts = tuple(max(1, k - 1) for k in goal)
            chosen = self._best(weight, real, counts)
        leaves = real & ~chosen
        more = torch.tensor([k > c for k, c in zip(goal, counts, strict=True)], device=real.device).unsqueeze(1)
        last = leaves & (leaves.cumsum(1) == leaves.sum(1, keepdim=True)) & more  # stands for all that leave
        stays = Selection.from_mask(chosen | last, goal)
        weights = self._clusters(tower.shown[TOWER_KEYS, tower.depth - 1], stays, weight, real)
        rest = last.gather(1, stays.slots).unsqueeze(-1)  # [B, K, 1]
        everything = (weight * leaves - last.float()).unsqueeze(1)  # in place of what stood there, [B, 1, N]
        weights = torch.where(rest, everything, weights)
        if stays.valid is not None:
            weights = weights * stays.valid.unsqueeze(-1)
        return dataclasses.replace(stays, adds=weights)

    def _outstanding(self, weight: Tensor, real: Tensor) -> Tensor:
        """Mark what stands out, at least one of each sample, bool [B, N]: weight, real [B, N]."""
        quarters = torch.tensor([0.25, 0.75], device=weight.device)
        low, high = torch.nanquantile(
            weight.masked_fill(~real, torch.nan), quarters, dim=1, keepdim=True
        )  # [B, 1] each
        marked = ((weight > high + 1.5 * (high - low)) & real) | highest(weight, [1] * len(real), real)
        if not self.plus:
            return marked
        step = (real.sum(1) // marked.sum(1) // 3).clamp_min(1).unsqueeze(1)
        return marked | (torch.arange(real.shape[1], device=real.device) % step == 0) & real

    def _best(self, weight: Tensor, real: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Mark ``counts[b]`` tokens of sample b, bool [B, N]: weight, real [B, N]."""
        if not self.plus:
            return highest(weight, counts, real)
        marked = highest(weight, [math.ceil(c / 4) for c in counts], real)
        others = real & ~marked
        place, left = others.cumsum(1) - 1, others.sum(1, keepdim=True).clamp_min(1)
        more = torch.tensor([c - math.ceil(c / 4) for c in counts], device=real.device).unsqueeze(1)
        # i * left // more for i = 0, 1, ...: the places up to which one more of them lies than up to the place before
        before, behind = ((p * more + left - 1) // left for p in (place, place + 1))
        return marked | others & (before < behind)

    def _clusters(self, keys: Tensor, stays: Selection, weight: Tensor, real: Tensor) -> Tensor:
        """Weights of what resembles each token that stays, float32 [B, K, N].

        Args:
            keys: [B, N, D].
            stays: the selection.
            weight: of each token, [B, N].
            real: bool [B, N].
        """
        similar = likeness(keys, stays.slots)
        similar = similar.scatter(2, stays.slots.unsqueeze(-1), -torch.inf).masked_fill(~real.unsqueeze(1), -torch.inf)
        near = similar.sort(dim=2, descending=True, stable=True).indices[..., : self.neighbors]
        own = (weight * real).unsqueeze(1).expand_as(similar).gather(2, near)
        own = own.masked_fill(similar.gather(2, near) == -torch.inf, 0)
        return torch.zeros_like(similar).scatter(2, near, own)
