"""VisionZip: the visual tokens that the vision tower attends to, and means of the others. arXiv 2412.04467."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..needs import TOWER_CLASS, TOWER_KEYS
from ..tokens import Candidates, Selection, highest
from .base import FixedBudget, check_number, likeness, tower_of


@dataclasses.dataclass(frozen=True)
class VisionZip(FixedBudget):
    """Keep the visual tokens that get most attention in the vision tower, and some that stand for the others.

    Of the T tokens to keep of N, C = contextual * T are contextual and T - C dominant. Dominant are those of highest a_i, the
    attention of the class token in the layer whose output the language model reads, averaged over heads; in towers without one
    it is the attention that a token gets, averaged over heads and all tokens of its picture. Of the R = N - T + C others, in
    order, those at the places 0, s, 2 s, ... are contextual, with s = floor(R / C). Each of the rest goes to the contextual
    token whose key of that layer, averaged over heads, has the largest cosine with its own, and their mean is added to it:
    x_c + mean of the x_i that go to c.

    Deviation: the published number of dominant tokens counts the class token, which is no visual token here. What later layers of
    the language model are given of a token (DeepStack) stays as it is.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_CLASS, TOWER_KEYS})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    contextual: float = 10 / 64  # share of the survivors that stand for others, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("contextual", self.contextual, 0, 1, "the published value is 10 / 64")

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before * math.ceil(self.contextual * after) * dim  # cosines with contextual tokens

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tower, tokens, real = tower_of(candidates), candidates.tokens, candidates.tokens.real
        counts = [math.floor(self.contextual * k + 0.5) for k in goal]
        score = tower.attention(TOWER_CLASS, tower.read)
        dominant = highest(score, [k - c for k, c in zip(goal, counts, strict=True)], real)
        others = real & ~dominant
        step = [max(1, (n - k + c) // max(1, c)) for n, k, c in zip(tokens.lengths, goal, counts, strict=True)]
        place = others.cumsum(1) - 1  # among the others
        steps, most = (torch.tensor(one, device=score.device).unsqueeze(1) for one in (step, counts))
        contextual = others & (place % steps == 0) & (place // steps < most)
        stays = Selection.from_mask(dominant | contextual, goal)
        if not any(counts):
            return stays
        adds = self._means(tower.shown[TOWER_KEYS, tower.read], stays, contextual, others & ~contextual)
        return dataclasses.replace(stays, adds=adds)

    def _means(self, keys: Tensor, stays: Selection, contextual: Tensor, rest: Tensor) -> Tensor:
        """Weights of the means that are added, float32 [B, K, N].

        Args:
            keys: [B, N, D].
            stays: the selection.
            contextual: tokens that stand for others, bool [B, N].
            rest: those others, bool [B, N].
        """
        similar = likeness(keys, stays.slots)
        stand = contextual.gather(1, stays.slots)
        stand = stand if stays.valid is None else stand & stays.valid
        nearest = similar.masked_fill(~stand.unsqueeze(-1), -torch.inf).argmax(1, keepdim=True)  # [B, 1, N]
        goes = torch.zeros_like(similar).scatter(1, nearest, 1.0) * (rest & stand.any(1, keepdim=True)).unsqueeze(1)
        return goes / goes.sum(2, keepdim=True).clamp_min(1)
