"""PyramidDrop: half of the visual tokens leave at each quarter of the language model. arXiv 2410.17247."""

import dataclasses
from typing import ClassVar

from .fastv import FastV


@dataclasses.dataclass(frozen=True)
class PyramidDrop(FastV):
    """Rank visual tokens as :class:`FastV` does, at three layers, each of which drops half of what is there.

    score_i = mean_h A_h[last, i] with A the attention probabilities of the layer at which tokens go. In front of the layers at
    a quarter, a half and three quarters of the depth (8, 16 and 24 of 32) half of the tokens leave: 1/2, 1/4 and 1/8 of them
    are left. ``keep`` is the last of these shares; another one, or other layers, divide it into equal shares.

    Deviations: the authors compute one row of the attention of the layer in front of which tokens leave; here they leave behind
    the layer before, by the row of that one. They count positions anew; here the original ones are kept.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"

    keep: int | float = 0.125  # survivors of the stage: a number (int) or a fraction of the candidates (float)

    def layers(self, stage: str, depth: int) -> list[int]:
        return sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3)})  # behind 7, 15 and 23 of 32
