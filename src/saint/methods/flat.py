"""Of blocks of patches of one colour one patch stays. Ours; larger patches where little is to be seen as in arXiv 2510.18091."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import copies
from ..tokens import Candidates
from .base import PixelMethod, check_integer


@dataclasses.dataclass(frozen=True)
class Flat(PixelMethod):
    """Of each block of ``side`` x ``side`` patches that is all of one colour the first patch stays.

    Blocks lie on a grid that begins at the first patch; at the far rim they may be smaller. The picture decides how many
    leave, in photographs hardly any. Where a model joins squares of patches, a block is one of squares.
    """

    name: ClassVar[str] = "flat"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.18091"

    side: int = 2  # of a block, in patches

    def __post_init__(self) -> None:
        check_integer("side", self.side, 2, hint="a block of 2 x 2 patches is the smallest")

    def leaves(self, candidates: Candidates, pixels: Tensor) -> Tensor:
        tokens, laid = candidates.tokens, candidates.facts.grids
        if laid is None:
            raise ValueError("Flat needs the grid that patches lie on, which this model does not show: use Duplicates")
        width = torch.tensor([columns for _, columns in laid], device=pixels.device)
        return copies.in_blocks(
            copies.plain(pixels), pixels[..., 0], tokens.index, width, self.side, tokens.valid
        )  # fmt: skip
