"""VisionZip: the visual tokens that the vision tower attends to, and evenly spread others. arXiv 2412.04467."""

import dataclasses
import math
from typing import ClassVar

import torch

from ..tokens import TOWER_CLASS, Candidates, Selection, highest
from .base import FixedBudget, check_number, tower_of


@dataclasses.dataclass(frozen=True)
class VisionZip(FixedBudget):
    """Keep the visual tokens that get most attention in the vision tower, and of the others some in even steps.

    With T tokens to keep of N, C = contextual * T of them are contextual and T - C dominant. Dominant are those of highest a_i, the
    attention of the class token in the layer whose output the language model reads, averaged over heads; in towers without
    class token a_i is the attention that a token gets, averaged over heads and all tokens of its picture. Of the R = N - (T - C)
    others, in order, those at the places 0, s, 2 s, ... stay, with s = floor(R / C).

    Deviations: the published number of dominant tokens counts the class token, which is no visual token here. The published method
    adds to a contextual token the mean of those tokens that leave and have most similar keys; here none is changed.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_CLASS})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    contextual: float = 10 / 64  # share of the survivors that are contextual, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("contextual", self.contextual, 0, 1, "the published value is 10 / 64")

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tower, tokens = tower_of(candidates), candidates.tokens
        score = tower.attention(TOWER_CLASS, tower.read)
        spread = tuple(min(k, math.floor(self.contextual * k + 0.5)) for k in goal)
        real = torch.ones_like(tokens.index, dtype=torch.bool) if tokens.valid is None else tokens.valid
        dominant = highest(score, [k - c for k, c in zip(goal, spread, strict=True)], real)
        others = real & ~dominant
        step = [max(1, (n - k + c) // max(1, c)) for n, k, c in zip(tokens.lengths, goal, spread, strict=True)]
        place = others.cumsum(1) - 1  # among the others
        steps, most = (torch.tensor(one, device=score.device).unsqueeze(1) for one in (step, spread))
        stays = others & (place % steps == 0) & (place // steps < most)
        return Selection.from_mask(dominant | stays, goal)
