"""Kernels in Triton for the operators of :mod:`saint.operators` on CUDA. Imported when the first of them runs there.

Nothing of N x N is ever in memory: a program holds one block of cosines, or of comparisons, and adds it up. Products are of IEEE
float32 (TF32 would flip votes). ``TRITON_INTERPRET=1`` runs the same code on a CPU, which is how it is tested.

Letters: B batch, N candidate tokens, D head dim, S = ceil(N / 2) sources, K survivors of the longest sample.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unit(keys, places, here, dim, DIM: tl.constexpr):  # noqa: N803
    """Unit vectors of some tokens of a sample, float32 [places, DIM]; zeros where not ``here``, and of a zero key."""
    channels = tl.arange(0, DIM)
    mask = here[:, None] & (channels[None, :] < dim)
    x = tl.load(keys + places[:, None] * dim + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return tl.div_rn(x, tl.broadcast_to(tl.maximum(norm, 1e-12)[:, None], x.shape))


@triton.jit(do_not_specialize=["count"])  # which differs from drop point to drop point
def _vote(
    keys,
    valid,
    degree,
    excess,
    mean,
    count,
    dim,
    floor,
    DIM: tl.constexpr,  # noqa: N803
    SIDE: tl.constexpr,  # noqa: N803
):
    """Sum up some sources of one sample over all targets: keys [B, N, D], valid [B, N] or None, results [B, S]."""
    sample = tl.program_id(1).to(tl.int64)
    sources, targets = (count + 1) // 2, count // 2
    keys += sample * count * dim
    if valid is not None:
        valid += sample * count
    rows = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    own = _unit(keys, 2 * rows, rows < sources, dim, DIM)
    edges = tl.zeros([SIDE], tl.float32)
    above = tl.zeros([SIDE], tl.float32)
    total = tl.zeros([SIDE], tl.float32)
    real = tl.zeros([SIDE], tl.float32)
    for begin in range(0, targets, SIDE):
        columns = begin + tl.arange(0, SIDE)
        here = columns < targets
        if valid is not None:
            here = here & (tl.load(valid + 2 * columns + 1, mask=here, other=0) != 0)
        other = _unit(keys, 2 * columns + 1, here, dim, DIM)
        cosine = tl.dot(own, tl.trans(other), input_precision="ieee")  # [SIDE, SIDE]
        edge = here[None, :] & (cosine > floor)
        edges += tl.sum(tl.where(edge, 1.0, 0.0), 1)
        above += tl.sum(tl.where(edge, cosine - floor, 0.0), 1)
        total += tl.sum(tl.where(here[None, :], cosine, 0.0), 1)
        real += tl.where(here, 1.0, 0.0)
    place, inside = sample * sources + rows, rows < sources
    tl.store(degree + place, edges, mask=inside)
    tl.store(excess + place, above, mask=inside)
    tl.store(mean + place, total / tl.maximum(tl.sum(real, 0), 1.0), mask=inside)


def vote(keys: Tensor, valid: Tensor | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Degree, excess and mean of each source: one launch.

    Args:
        keys: [B, N, D], any float dtype, D at most ``operators.WIDEST``.
        valid: bool [B, N], False for padding.
        floor: cosines above it are edges; a float32.

    Returns:
        Three of float32 [B, S], see ``graph.Edges``.
    """
    batch, count, dim = keys.shape
    keys = keys.contiguous()
    shape = batch, (count + 1) // 2
    degree, excess, mean = (torch.empty(shape, dtype=torch.float32, device=keys.device) for _ in range(3))
    width = max(16, triton.next_power_of_2(dim))  # tl.dot takes no less
    # two blocks of unit vectors in 48 KiB, which every GPU has
    side = 64 if width <= 64 else 32 if width <= 128 else 16
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    grid = (triton.cdiv(shape[1], side), batch)
    if batch and count:
        _launch(_vote, grid, keys, mask, degree, excess, mean, count, dim, floor, width, side)
    return degree, excess, mean


@triton.jit(do_not_specialize=["count"])
def _stays(
    score,
    valid,
    drop,
    stays,
    count,
    SIDE: tl.constexpr,  # noqa: N803
):
    """Mark which of some sources stay, and the targets beside them: score [B, S], valid (or None) and stays [B, N], drop [B]."""
    sample = tl.program_id(1).to(tl.int64)
    sources = (count + 1) // 2
    score += sample * sources
    if valid is not None:
        valid += sample * count
    stays += sample * count
    rows = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    own = tl.load(score + rows, mask=rows < sources, other=float("-inf"))
    rank = tl.zeros([SIDE], tl.int32)
    for begin in range(0, sources, SIDE):
        columns = begin + tl.arange(0, SIDE)
        other = tl.load(score + columns, mask=columns < sources, other=float("-inf"))
        before = (other[None, :] > own[:, None]) | (
            (other[None, :] == own[:, None]) & (columns[None, :] < rows[:, None])
        )
        rank += tl.sum(tl.where(before & (columns[None, :] < sources), 1, 0), 1)
    source = rank >= tl.load(drop + sample)
    target = rows >= 0
    if valid is not None:
        source = source & (tl.load(valid + 2 * rows, mask=2 * rows < count, other=0) != 0)
        target = tl.load(valid + 2 * rows + 1, mask=2 * rows + 1 < count, other=0) != 0
    tl.store(stays + 2 * rows, source.to(tl.uint8), mask=2 * rows < count)
    tl.store(stays + 2 * rows + 1, target.to(tl.uint8), mask=2 * rows + 1 < count)


@triton.jit(do_not_specialize=["count", "most"])
def _list(stays, slots, count, most, SIDE: tl.constexpr):  # noqa: N803
    """The places of a sample's tokens that stay, ascending, then of the others: stays [B, N] -> slots [B, K]."""
    sample = tl.program_id(0).to(tl.int64)
    stays += sample * count
    slots += sample * most
    begun = 0
    for wanted in tl.static_range(1, -1, -1):
        for begin in range(0, count, SIDE):
            places = begin + tl.arange(0, SIDE)
            here = (places < count) & (tl.load(stays + places, mask=places < count, other=2) == wanted)
            number = here.to(tl.int32)
            slot = begun + tl.cumsum(number, 0) - 1
            tl.store(slots + slot, places.to(tl.int64), mask=here & (slot < most))
            begun += tl.sum(number, 0)


def survivors(score: Tensor, valid: Tensor | None, count: int, drop: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Slots that stay where the sources of highest score leave: two launches. See ``operators.survivors``."""
    batch, sources = score.shape
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    stays = torch.empty(batch, count, dtype=torch.uint8, device=score.device)
    slots = torch.empty(batch, max(lengths), dtype=torch.int64, device=score.device)
    if min(drop) == max(drop):
        leave = torch.full(
            (batch,), drop[0], dtype=torch.int32, device=score.device
        )  # no copy, for which the host waits
    else:
        leave = torch.tensor(drop, dtype=torch.int32, device=score.device)
    if batch and count:
        grid = (triton.cdiv(sources, 64), batch)
        _launch(_stays, grid, score.contiguous(), mask, leave, stays, count, 64)
        _launch(_list, (batch,), stays, slots, count, slots.shape[1], 1024)
    return slots


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any) -> None:
    """Run a kernel on the device of its first argument, whichever is the current one."""
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](first, *rest, num_stages=1)  # one block in flight: more take the memory of several
