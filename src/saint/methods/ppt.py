"""PPT: drop the tokens that matter least, or merge the most similar ones, as each picture asks for. arXiv 2310.01812."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import graph
from ..needs import TOWER_CLASS, TOWER_VALUES
from ..tokens import Candidates, Selection, leading
from .base import check_number
from .tome import ToMe


@dataclasses.dataclass(frozen=True)
class PPT(ToMe):
    """Drop what matters least where few tokens matter to the class token, merge the most similar ones where all do alike.

    With a_i the attention of the class token, averaged over heads, and v_i the values of all heads side by side, a token matters
    by s_i = a_i |v_i| / sum_j a_j |v_j|. A picture whose s_i have a variance of at least ``threshold`` drops the tokens with the
    lowest; another merges as :class:`ToMe` does. So samples of one batch differ in this, and not in how many tokens they keep.
    Sizes and later attention are as for :class:`ToMe`, with the same settings ``r``, ``keep`` and ``beta``; neither ``r`` nor
    ``keep`` means r = 50, published for 196 patches. Drop points are at 3, 6 and 9 of 12 layers, counted from 0, and at the same
    shares of other depths.

    What drops is no part of another token: ``trace[i].into`` has -1 there. The masked oracle does not apply where something
    merges; the merged oracle hides what dropped.

    Deviations: those of :class:`ToMe`; all protected tokens stay. Encoders without a class token: a_i is the attention that a
    token gets, averaged over heads and all tokens of its picture; where other protected tokens stand in front of the patches, the
    first of them is taken for the class token.
    """

    name: ClassVar[str] = "ppt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.01812"
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_CLASS, TOWER_VALUES})
    published_r: ClassVar[int] = 50  # DeiT-S of 196 patches

    threshold: float = 7e-5  # variance from which tokens drop, in [0, 1]: 0 drops always, 1 merges always

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0, 1, "the published value is 7e-5")

    def layers(self, stage: str, depth: int) -> list[int]:
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, leave = candidates.tokens, self.merged(candidates)
        if not any(leave):
            return None
        real = candidates.tokens.real
        score = _significance(candidates, real)
        drops = (_variance(score, real) >= self.threshold).unsqueeze(1)  # [B, 1]
        edges = graph.match(candidates.keys, valid=tokens.valid)
        order = graph.descending(edges.similarity)
        count = order.shape[1]  # half of the slots, and no more than half of the tokens leave
        least = graph.descending(score.masked_fill(~real, torch.inf)).flip(1)[:, :count]  # of equal ones the later
        most = score.masked_fill(~real, -torch.inf).argmax(1, keepdim=True)  # stays
        leaves = torch.where(drops, least, edges.sources[order])
        joined = Selection.joining(leaves, torch.where(drops, most, edges.targets.gather(1, order)), leave, tokens)
        go = leading(leave, count, leaves.device).expand_as(leaves)
        gone = torch.zeros_like(real).scatter(1, leaves, go & drops)
        return dataclasses.replace(joined, gone=gone)


def _significance(candidates: Candidates, real: Tensor) -> Tensor:
    """Say how much each token matters, of each sample 1 in all, float32 [B, N]; 0 at padding, bool ``real`` [B, N]."""
    weight = candidates.rows[TOWER_CLASS] * candidates.rows[TOWER_VALUES]
    weight = weight.masked_fill(~real, 0)
    return weight / weight.sum(1, keepdim=True).clamp_min(1e-30)


def _variance(score: Tensor, real: Tensor) -> Tensor:
    """Unbiased variance of each sample, [B]: score, bool real [B, N]."""
    count = real.sum(1, keepdim=True)
    away = (score - score.sum(1, keepdim=True) / count).masked_fill(~real, 0)
    return away.square().sum(1) / (count.squeeze(1) - 1).clamp_min(1)
