"""Patches that show what another one shows leave in front of the first block. Ours; the time axis as in arXiv 2411.05222."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from .. import copies, frames
from ..tokens import Candidates
from .base import PixelMethod, check_number


@dataclasses.dataclass(frozen=True)
class Duplicates(PixelMethod):
    """Patches whose pixels are those of an earlier patch, or of the same place in the frame before, leave.

    With ``tau`` = 0 pixels must be equal, so no picture loses a pixel of which there is no copy: the background of pages and
    screens goes, photographs keep everything. Positions are not compared: two equal patches at different places enter the model
    as two tokens, and one of them stays. The picture decides how many leave. Of every picture and frame one patch stays at least.
    Where a model joins squares of patches, whole squares are compared.
    """

    name: ClassVar[str] = "duplicates"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.05222"  # across frames; within a picture it is ours
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})  # whatever their order, copies are copies

    tau: float = (
        0.0  # largest difference of a value, as the model is given it (one of 255 levels is about 0.017 in CLIP)
    )

    def __post_init__(self) -> None:
        check_number("tau", self.tau, 0, 1e6, "a difference of pixel values as the model is given them")

    def leaves(self, candidates: Candidates, pixels: Tensor) -> Tensor:
        tokens, cells = candidates.tokens, candidates.facts.cells
        before = None if cells is None else frames.earlier(cells, valid=tokens.valid)
        rows = pixels.flatten(2)
        if self.tau == 0:
            return copies.repeated(rows, before, tokens.valid)
        return copies.close(rows, self.tau, before, tokens.valid)
