"""Greedy subsets: one token after another, each time the one that gains most by what is taken already.

A *gain* says what each token would add, and is told which one is taken; the loop is the same for all. Everything is computed in
float32, ties go to the lower index, and no gradient flows through a decision.

Letters: B batch, N candidate tokens, K tokens taken of the sample that takes most, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from . import graph
from .tokens import Selection, TokenMap, leading, reads_are_free


class Gain(Protocol):
    """What a subset is worth, as one token after another joins it."""

    def worth(self) -> Tensor:
        """Tell what each token would add now, [B, N].

        Of padding and of tokens that were taken it may be anything, of those that cannot add the most anything less.
        """

    def take(self, slot: Tensor) -> None:
        """Let a token of each sample join, int64 [B]."""


def sequence(gain: Gain, keep: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
    """Slots in the order in which they are taken, int64 [B, K].

    Args:
        gain: of a subset that is empty.
        keep: tokens taken per sample, at most its tokens; behind those of a row stands anything.
        valid: bool [B, N], False for padding.
    """
    worth = gain.worth()
    closed = torch.zeros_like(worth, dtype=torch.bool) if valid is None else ~valid
    picks = [worth.masked_fill(closed, -torch.inf).argmax(-1)]
    rows = torch.arange(worth.shape[0], device=worth.device)
    while len(picks) < max(keep):
        gain.take(picks[-1])
        closed[rows, picks[-1]] = True
        picks.append(gain.worth().masked_fill(closed, -torch.inf).argmax(-1))
    return torch.stack(picks, 1)


def subset(gain: Gain, keep: tuple[int, ...], current: TokenMap) -> Selection:
    """The tokens that :func:`sequence` takes stay; ``current`` is the map that slots refer to."""
    chosen = sequence(gain, keep, current.valid)
    if min(keep) != max(keep):  # samples that take fewer went on
        chosen = chosen.masked_fill(~leading(keep, chosen.shape[1], chosen.device), current.slots)
    alive = torch.zeros(chosen.shape[0], current.slots + 1, dtype=torch.bool, device=chosen.device)
    return Selection.from_mask(alive.scatter_(1, chosen, True)[:, : current.slots], keep)


def _row(matrix: Tensor, slot: Tensor) -> Tensor:
    """Row ``slot[b]`` of matrix b: [B, N, M] -> [B, M]."""
    return matrix[torch.arange(matrix.shape[0], device=matrix.device), slot]


class Apart:
    """A token gains its importance less its similarity to the most similar one that was taken.

    Args:
        similarity: of all pairs, [B, N, N]; or what tells those of one token of each sample, int64 [B] -> [B, N], which is less
            work where few are taken.
        first: what stands for that similarity while nothing was taken, [B, N].
        importance: [B, N], or None: none has any.
    """

    def __init__(
        self, similarity: Tensor | Callable[[Tensor], Tensor], first: Tensor, importance: Tensor | None = None
    ) -> None:
        self._row = partial(_row, similarity) if isinstance(similarity, Tensor) else similarity
        self._near, self._importance, self._empty = first, importance, True

    def worth(self) -> Tensor:
        return -self._near if self._importance is None else self._importance - self._near

    def take(self, slot: Tensor) -> None:
        row = self._row(slot)
        self._near = row if self._empty else torch.maximum(self._near, row)
        self._empty = False


_MANY = (
    2**19
)  # similarities of a batch from which bounds are less work than all gains: a sample of 724 tokens, two of 512
_BLOCK = 256  # rows whose gains are computed at once
_LEAST = 2.0**-140  # where numbers are so small, float32 has fewer digits
_OFTEN = (
    8  # where more than an eighth of all tokens is covered better by the one that was taken, gains are computed anew
)


class Coverage:
    """A token gains what it adds to how well all tokens are covered: each by the most similar one that was taken.

    With c_j the similarity of token j to the most similar one taken, 0 before there is one, token i adds
    sum_j max(0, S_ij - c_j), times its weight.

    Where there are many tokens, all of these sums for each one that is taken would be most of the work. What a sum loses is
    therefore taken off it, over the tokens j that are covered better than before, of which there are few; rounded as that is, it
    bounds the sums, and those that can be the largest are computed. What is taken is the same.

    Args:
        similarity: of all pairs, [B, N, N].
        weight: [B, N], not negative, or None: 1.
        valid: bool [B, N], False for padding, which need not be covered.
    """

    def __init__(self, similarity: Tensor, weight: Tensor | None = None, valid: Tensor | None = None) -> None:
        self._similarity, self._valid = similarity, valid
        covered = similarity.new_zeros(similarity.shape[:2])
        self._covered = covered if valid is None else covered.masked_fill(~valid, torch.inf)
        self._weight = torch.ones_like(covered) if weight is None else weight
        self._bounded = reads_are_free(similarity.device) and similarity.numel() > _MANY
        if self._bounded:
            self._columns = similarity.mT.contiguous()
            self._anew()

    def worth(self) -> Tensor:
        if not self._bounded:
            return _added(self._similarity, self._covered.unsqueeze(1)) * self._weight
        about, most = self._about()
        if (most < self._most / 2).any():  # what was taken off is rounded by what there was
            self._anew()
            about, most = self._about()
        sample, slot = (~(about < most - self._wrong)).nonzero(as_tuple=True)
        worth = _added(self._similarity[sample, slot], self._covered[sample]) * self._weight[sample, slot]
        return torch.full_like(self._covered, -torch.inf).index_put_((sample, slot), worth)

    def take(self, slot: Tensor) -> None:
        before, self._covered = self._covered, torch.maximum(self._covered, _row(self._similarity, slot))
        if not self._bounded:
            return
        sample, better = (self._covered > before).nonzero(as_tuple=True)
        if len(sample) * _OFTEN > before.numel():
            return self._anew()
        column, at = self._columns[sample, better], (sample, better)  # [J, N]
        lost = (column - before[at].unsqueeze(1)).clamp_min_(0)
        lost -= (column - self._covered[at].unsqueeze(1)).clamp_min_(0)
        self._sums.index_add_(0, sample, lost.double(), alpha=-1)

    def _anew(self) -> None:
        """Compute all sums."""
        covered = self._covered.unsqueeze(1)
        sums = torch.cat([_added(rows, covered) for rows in self._similarity.split(_BLOCK, 1)], 1).double()
        self._sums = sums if self._valid is None else sums.masked_fill(~self._valid, 0)
        _, self._most = self._about()
        # a float32 sum of N numbers >= 0 is wrong by N / 2**24 of it at most: these, and what is computed of the same token
        # later on; two tokens are compared
        self._wrong = self._most * (sums.shape[1] + 8) / 2**22 + _LEAST

    def _about(self) -> tuple[Tensor, Tensor]:
        """Return what each token adds, rounded, float64 [B, N], and the most of it [B, 1]."""
        about = self._sums * self._weight
        return about, about.amax(-1, keepdim=True)


def _added(similarity: Tensor, covered: Tensor) -> Tensor:
    """Sum what lies above ``covered``: [..., N] -> [...]."""
    return (similarity - covered).clamp_min_(0).sum(-1)


class Volume:
    """A token gains the factor by which it multiplies the determinant of the kernel of those taken.

    The factors of all tokens follow from one row of an incremental Cholesky factorisation per token taken: with d the factors and
    c the rows so far, the token p that is taken adds the row e = (L_p - sum_t c_t[p] c_t) / sqrt(d_p), and d becomes d - e^2. A
    factor below 1e-5 of the largest diagonal element is that of rounding, and counts as 0: where no token adds volume any more,
    the lower index is taken.

    Args:
        kernel: positive semi-definite, [B, N, N].
    """

    _NOISE = 1e-5

    def __init__(self, kernel: Tensor) -> None:
        self._kernel = kernel
        self._factor = kernel.diagonal(dim1=1, dim2=2).clone()
        self._least = self._NOISE * self._factor.amax(-1, keepdim=True)
        self._rows = kernel.new_empty(kernel.shape[0], 0, kernel.shape[2])  # [B, T, N], with room behind the first
        self._count = 0

    def worth(self) -> Tensor:
        return torch.where(self._factor < self._least, 0, self._factor)

    def take(self, slot: Tensor) -> None:
        row = _row(self._kernel, slot)
        at = slot.unsqueeze(1)
        if self._count:
            rows = self._rows[:, : self._count]
            own = rows.gather(2, at.unsqueeze(1).expand(-1, rows.shape[1], 1))  # [B, t, 1]
            row = row - (own.mT @ rows).squeeze(1)
        factor = torch.maximum(self._factor.gather(1, at), self._least)
        # a sample whose tokens add nothing any more gives a row of nothing
        row = torch.where(factor > self._least, row / factor.clamp_min(1e-30).sqrt(), 0)
        if self._count == self._rows.shape[1]:  # twice the room, so that few rows are copied
            self._rows = torch.cat([self._rows, self._rows.new_empty(row.shape[0], self._count + 1, row.shape[1])], 1)
        self._rows[:, self._count] = row
        self._count += 1
        self._factor = self._factor - row.square()


class Independent:
    """Tokens gain by their order of importance, and those with an edge to one that was taken less than all others.

    So a maximal independent set of the graph is taken, then the rest.

    Args:
        importance: [B, N].
        edges: of all pairs, bool [B, N, N].
        first: tokens of each sample that are taken whatever their edges, int64 [B].
    """

    def __init__(self, importance: Tensor, edges: Tensor, first: Tensor) -> None:
        order = graph.descending(importance)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        self._rank = torch.empty_like(order).scatter_(1, order, place).float()
        self._edges, self._left = edges, first.unsqueeze(1)
        self._near = torch.zeros_like(edges[:, 0])

    def worth(self) -> Tensor:
        behind = self._near & (self._left <= 0)
        return -(self._rank + self._rank.shape[1] * behind)

    def take(self, slot: Tensor) -> None:
        self._near = self._near | _row(self._edges, slot)
        self._left = self._left - 1


def farthest(features: Tensor, *, valid: Tensor | None = None) -> Apart:
    """The gain of farthest points: max-min diversity under d_ij = 1 - cos(f_i, f_j).

    The first is argmax_i min_{j != i} d_ij, each further one argmax_j min_{s chosen} d_js.

    Args:
        features: [B, N, C], any float dtype.
        valid: bool [B, N], False for padding.
    """
    similarity = cosines(features)
    others = similarity.masked_fill(
        torch.eye(similarity.shape[1], dtype=torch.bool, device=features.device), -torch.inf
    )
    if valid is not None:
        others = others.masked_fill(~valid.unsqueeze(1), -torch.inf)
    return Apart(similarity, others.amax(-1))


def cosines(features: Tensor) -> Tensor:
    """Cosines of all pairs, float32: [B, N, C] -> [B, N, N]."""
    points = graph.metric(features)
    return points @ points.mT
