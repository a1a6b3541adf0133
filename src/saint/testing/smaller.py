"""Smaller pictures and softer attention as both oracles need them: by their definition, at full length."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..grids import smaller
from ..plans import Plan
from ..upstream.specs import EncoderSpec
from .hiding import stand_in


def logn_of(plan: Plan) -> float:
    """Power of the softening of attention, see :class:`saint.Stage`."""
    return plan.vision[0].logn if plan.vision else 0.0


def softer(left: Tensor, total: Tensor, power: float) -> Tensor | None:
    """Return what multiplies logits where ``left`` of ``total`` tokens count, int64 [B] each: [B]; None: by nothing."""
    if not power:
        return None
    return (left.clamp_min(2).double().log() / total.clamp_min(3).double().log()) ** power


def show_smaller(stack: ExitStack, encoder: nn.Module, spec: EncoderSpec, plan: Plan, merge_size: int | None) -> None:
    """Shows an encoder that is not packed smaller pictures, at full length: each patch is that of its cell.

    Cells and pictures are computed here by their definition, in coordinates of pixels.

    Raises:
        NotImplementedError: a packed encoder.
    """
    if plan.pixels is None:
        return
    if spec.packed:
        raise NotImplementedError(
            "the oracle of smaller pictures knows encoders that take pictures, not rows of patches"
        )
    side, conv = merge_size or 1, next(one for one in encoder.modules() if isinstance(one, nn.Conv2d))
    asked = plan.pixels

    def cells(count: int, fewer: int) -> Tensor:
        units = ((torch.arange(count // side) + 0.5) * (fewer / count)).floor().long()
        return (units.unsqueeze(1) * side + torch.arange(side)).flatten()

    def fewer(rows: int, columns: int) -> tuple[int, int]:
        if isinstance(asked, float):
            return tuple(min(n, max(1, round(n * math.sqrt(asked)))) for n in (rows, columns))  # type: ignore[return-value]
        return smaller(rows, columns, asked)

    def shown(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor) -> Tensor:
            high, wide = conv.kernel_size
            rows, columns = x.shape[2] // high, x.shape[3] // wide
            down, right = (n * side for n in fewer(rows // side, columns // side))
            if (down, right) == (rows, columns):
                return original(x)
            part_of = x[:, :, : rows * high, : columns * wide]
            size = (down * high, right * wide)
            small = nn.functional.interpolate(part_of.float(), size, mode="bicubic", antialias=True).to(x.dtype)
            return original(small)[:, :, cells(rows, down)][:, :, :, cells(columns, right)]

        return run

    stand_in(stack, conv, "forward", shown)
