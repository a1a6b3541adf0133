"""Smaller pictures and softer attention as both oracles need them: by their definition, at full length."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..grids import smaller
from ..plans import Plan
from ..upstream.names import Parameters
from ..upstream.specs import EncoderSpec, part
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
            "the oracle of smaller pictures knows no encoders that lay all pictures in one sequence"
        )
    layer = None if spec.rows is None else part(encoder, spec.rows.linear)
    if layer is None or isinstance(layer, nn.Conv2d):
        conv = next(one for one in encoder.modules() if isinstance(one, nn.Conv2d))
        stand_in(stack, conv, "forward", partial(_of_pictures, conv.kernel_size, plan.pixels, merge_size or 1))
    else:
        _of_rows(stack, encoder, spec, plan.pixels)


def _fewer(rows: int, columns: int, asked: int | float, side: int = 1) -> tuple[int, int]:
    """Patches of the smaller picture, of squares of so many a side."""
    units = rows // side, columns // side
    if isinstance(asked, float):
        down, right = (min(n, max(1, round(n * math.sqrt(asked)))) for n in units)
    else:
        down, right = smaller(*units, asked)
    return down * side, right * side


def _cells(count: int, fewer: int, side: int = 1) -> Tensor:
    """For each of ``count`` patches along an axis, the one of ``fewer`` that its centre lies in."""
    units = ((torch.arange(count // side) + 0.5) * (fewer / count)).floor().long()
    return (units.unsqueeze(1) * side + torch.arange(side)).flatten()


def _shrunk(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(pictures.float(), size, mode="bicubic", antialias=True).to(pictures.dtype)


def _of_pictures(
    sides: tuple[int, ...], asked: int | float, side: int, original: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A convolution with patches of ``sides`` that shows the smaller picture's patches in the places of the cells' own."""

    def run(x: Tensor) -> Tensor:
        high, wide = sides
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        down, right = _fewer(rows, columns, asked, side)
        if (down, right) == (rows, columns):
            return original(x)
        small = _shrunk(x[:, :, : rows * high, : columns * wide], (down * high, right * wide))
        return original(small)[:, :, _cells(rows, down, side)][:, :, :, _cells(columns, right, side)]

    return run


def _of_rows(stack: ExitStack, encoder: nn.Module, spec: EncoderSpec, asked: int | float) -> None:
    """The same of an encoder to which patches arrive as rows, padding behind those of each picture."""
    assert spec.rows is not None
    grid, holder = spec.rows.grid, part(encoder, spec.rows.linear.rpartition(".")[0])
    linear = part(encoder, spec.rows.linear)
    layout = spec.rows.layout(holder, linear)
    assert layout is not None
    assert grid is not None
    channels, high, wide, last = layout
    shapes: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = Parameters(type(module).forward).named(args, kwargs)
        told = grid(module, given)
        batch = len(next(iter(given.values())))
        shapes[:] = [told] * batch if isinstance(told, tuple) else [(rows, columns) for rows, columns in told]

    def picture(own: Tensor, rows: int, columns: int) -> Tensor:
        flat = own.view(len(own), high * wide, channels).mT.flatten(1) if last else own
        return nn.functional.fold(flat.mT[None], (rows * high, columns * wide), (high, wide), stride=(high, wide))

    def cut(small: Tensor) -> Tensor:
        flat = nn.functional.unfold(small, (high, wide), stride=(high, wide))[0].mT  # [patches, C * P * P]
        return flat.view(len(flat), channels, high * wide).mT.flatten(1) if last else flat

    def shown(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor) -> Tensor:
            out = original(x).clone()
            for own, tokens, (rows, columns) in zip(x, out, shapes, strict=True):
                down, right = _fewer(rows, columns, asked)
                if (down, right) != (rows, columns):
                    small = _shrunk(picture(own[: rows * columns], rows, columns), (down * high, right * wide))
                    places = _cells(rows, down).unsqueeze(1) * right + _cells(columns, right)
                    tokens[: rows * columns] = original(cut(small))[places.flatten()]
            return out

        return run

    stack.callback(holder.register_forward_pre_hook(note, with_kwargs=True).remove)
    stand_in(stack, linear, "forward", shown)
