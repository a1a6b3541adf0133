"""The vote and the choice of survivors as operators of torch, ``torch.ops.saint.vote`` and ``torch.ops.saint.survivors``.

Each is one node of a compiled or exported graph, without a break. Their plain form, which runs on every device, is the code of
:mod:`saint.graph` and :mod:`saint.tokens`; on CUDA they are kernels of :mod:`saint.kernels` where Triton is installed, as it is
with torch's own CUDA packages. ``SAINT_KERNELS=0`` in the environment of a program keeps it to the plain form.

:func:`connect` and :func:`selection` take the operators where they are kernels, and the plain form itself elsewhere: code that a
compiler sees into, and that a graph for another runtime may hold, is better than a node that hides the same code. There is no
fused form for CPUs: what torch can compile for one, it compiles with the C++ compiler of the machine it runs on.

Letters: B batch, N candidate tokens, D head dim, S = ceil(N / 2) sources, K survivors of the longest sample.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from . import graph
from .tokens import Selection, TokenMap, all_but, leading

KERNELS = (
    os.environ.get("SAINT_KERNELS", "1") != "0" and torch.version.cuda is not None and find_spec("triton") is not None
)


WIDEST = 256  # D above which a block of unit vectors is not sure to fit the memory of a program


def fused(x: Tensor, width: int = 0) -> bool:
    """Tell whether the operators are kernels where ``x`` is, for keys of ``width`` channels, in a graph that stays in torch."""
    return KERNELS and x.is_cuda and width <= WIDEST and not torch.compiler.is_exporting()


# -- the vote -----------------------------------------------------------------------------------------------------------


def _vote(keys: Tensor, valid: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Degree, excess and mean cosine of each source of the voting graph.

    Args:
        keys: [B, N, D], averaged over heads, any float dtype.
        valid: bool [B, N], False for padding.
        threshold: cosine, in (-1, 1].

    Returns:
        Three of float32 [B, S], see ``graph.Edges``. Rows of padded sources hold anything.
    """
    edges = graph.connect(keys, threshold, valid=valid)
    return edges.degree, *edges.sums()


vote = torch.library.custom_op("saint::vote", _vote, mutates_args=())


@vote.register_fake
def _(keys: Tensor, valid: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = keys.shape[0], (keys.shape[1] + 1) // 2
    return tuple(keys.new_empty(shape, dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]


@vote.register_kernel("cuda")
def _(keys: Tensor, valid: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    if not fused(keys, keys.shape[-1]):
        return _vote(keys, valid, threshold)
    from . import kernels

    return kernels.vote(keys, valid, graph.just_below(threshold))


def connect(keys: Tensor, threshold: float, *, center: bool = False, valid: Tensor | None = None) -> graph.Edges:
    """:func:`graph.connect`, by the operator where it is a kernel."""
    if not fused(keys, keys.shape[-1]):
        return graph.connect(keys, threshold, center=center, valid=valid)
    with graph.full_precision(keys.device):
        degree, *sums = torch.ops.saint.vote(graph.averaged(keys, center=center, valid=valid), valid, threshold)
    return graph.Edges(degree, lambda: (sums[0], sums[1]))


# -- the choice of survivors ----------------------------------------------------------------------------------------------


def _survivors(score: Tensor, valid: Tensor | None, count: int, drop: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Slots that stay where the sources of highest score leave, of equal ones the first.

    Args:
        score: float32 [B, S]; padded sources hold -inf.
        valid: bool [B, N], False for padding.
        count: N.
        drop: sources of each sample that leave.
        lengths: tokens of each sample that stay.

    Returns:
        int64 [B, K], ascending, behind them what pads a row.
    """
    keep = all_but(graph.descending(score), drop, count, valid, stride=2)
    return Selection.from_mask(keep, tuple(lengths)).slots.clone(memory_format=torch.contiguous_format)


survivors = torch.library.custom_op("saint::survivors", _survivors, mutates_args=())


@survivors.register_fake
def _(score: Tensor, valid: Tensor | None, count: int, drop: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return score.new_empty((score.shape[0], max(lengths)), dtype=torch.int64)


@survivors.register_kernel("cuda")
def _(score: Tensor, valid: Tensor | None, count: int, drop: Sequence[int], lengths: Sequence[int]) -> Tensor:
    if not fused(score):
        return _survivors(score, valid, count, drop, lengths)
    from . import kernels

    return kernels.survivors(score, valid, count, drop, lengths)


def selection(score: Tensor, drop: tuple[int, ...], current: TokenMap) -> Selection:
    """Drop the ``drop[b]`` sources of highest score: score [B, S], -inf for padding; by the operator where it is a kernel."""
    if not fused(score):
        return Selection.from_order(graph.descending(score), drop, current, stride=2)
    lengths = tuple(n - r for n, r in zip(current.lengths, drop, strict=True))
    slots = torch.ops.saint.survivors(score, current.valid, current.slots, drop, lengths)
    even = min(lengths) == max(lengths)
    return Selection(slots, lengths, None if even else leading(lengths, slots.shape[1], slots.device))
