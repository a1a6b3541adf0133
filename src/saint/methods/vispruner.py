"""VisPruner: the visual tokens that the vision tower attends to, and others that are unlike each other. arXiv 2412.01818."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import full_precision, metric
from ..needs import TOWER_CLASS
from ..tokens import Candidates, Selection, highest
from .base import FixedBudget, check_integer, check_number, tower_of

_NEAR = 32  # tokens of which the most similar odd one is looked for first


@dataclasses.dataclass(frozen=True)
class VisPruner(FixedBudget):
    """Keep the visual tokens that get most attention in the vision tower, and others without near copies.

    Of the T tokens to keep, floor(important * T) are important: those of highest a_i, as in :class:`VisionZip`. The others stand
    in order, and leave round by round until as many as are to stay are left: in a round the even ones are compared with the
    odd ones (counted from 0 among those still there), and those even ones leave whose largest cosine with an odd one is
    highest, ``step`` at a time.

    Deviation: the authors compare features in front of the projection, and mix up the order from round to round; here the
    embeddings that enter the language model are compared, always in the order of the picture.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_CLASS})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    important: float = 0.5  # share of the survivors that attention chooses, in [0, 1]
    step: int = 8  # tokens that leave in a round, >= 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("important", self.important, 0, 1, "the published value is 0.5")
        check_integer("step", self.step, 1, hint="the published value is 8")

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before**2 * dim  # cosines of all pairs

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tower, real = tower_of(candidates), candidates.tokens.real
        counts = [math.floor(self.important * k) for k in goal]
        keep = highest(tower.attention(TOWER_CLASS, tower.read), counts, real)
        with full_precision(keep.device):
            points = metric(candidates.features)
            for sample, (count, total) in enumerate(zip(counts, goal, strict=True)):
                left = candidates.tokens.lengths[sample] - count
                others = torch.sort((real & ~keep)[sample].to(torch.uint8), descending=True, stable=True).indices[:left]
                stays = self._apart(points[sample, others], total - count)
                keep[sample, others[stays]] = True
        return Selection.from_mask(keep, goal)

    def _apart(self, points: Tensor, count: int) -> Tensor:
        """Places of the ``count`` tokens that are left behind the last round, int64 [count]: points [n, C]."""
        similar = points @ points.T
        left = torch.arange(len(points), device=points.device)
        # the most similar odd one is nearly always among a few, which need no look at all pairs in every round
        near = similar.fill_diagonal_(-torch.inf).topk(min(_NEAR, len(points)))
        while len(left) > count:
            even, odd = left[::2], left[1::2]
            gone = min(self.step, len(left) - count, len(even))
            if not len(odd):
                return left[:count]
            closest = _closest(similar, near.values, near.indices, even, odd)
            stays = torch.ones_like(left, dtype=torch.bool)
            stays[2 * torch.sort(closest, descending=True, stable=True).indices[:gone]] = False
            left = left[torch.sort((~stays).to(torch.uint8), stable=True).indices[: len(left) - gone]]
        return left


def _closest(similar: Tensor, near: Tensor, others: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """The largest similarity of each even token with an odd one, [E].

    Args:
        similar: of all pairs, [n, n].
        near: of each token with the most similar ones, descending, [n, k].
        others: which those are, int64 [n, k].
        even: int64 [E].
        odd: int64 [O].
    """
    there = torch.zeros(len(similar), dtype=torch.bool, device=similar.device)
    there[odd] = True
    found = there[others[even]]  # [E, k]
    closest = near[even].gather(1, found.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
    if bool((some := found.any(1)).all()):
        return closest
    rest = even[~some]
    return closest.masked_scatter(~some, similar[rest][:, odd].amax(1))
