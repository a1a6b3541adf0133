"""Which positions the entries of a cache hold, once some tokens have none.

Letters: B batch, K stored entries, S survivors of a new sequence, L logical length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tokens import Selection, TokenMap


@dataclass(frozen=True)
class CachePositions:
    """Which positions the entries of a cache layer hold.

    Attributes:
        index: position of each of the first K entries, int64 [B, K]; entry K + j holds position ``end + j``.
        valid: bool [B, K], False for padding (samples that kept fewer tokens), or None.
        end: positions covered by ``index``.
        bias: what is added to the logits of each entry (proportional attention to merged tokens), float32 [B, K], or None.
    """

    index: Tensor
    valid: Tensor | None
    end: int
    bias: Tensor | None = None
    _picked: list[Any] = field(default_factory=list, repr=False, compare=False)
    _shown: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def every(count: int, like: Tensor, valid: Tensor | None = None) -> "CachePositions":
        """The map of a cache that holds all ``count`` positions of each row of ``like``; ``valid`` marks the caller's padding."""
        index = torch.arange(count, device=like.device).expand(like.shape[0], count)
        return CachePositions(index, valid, count)

    @staticmethod
    def behind(count: int, like: Tensor) -> "CachePositions":
        """The map of a cache that holds every position from ``count`` on of each row of ``like``."""
        return CachePositions(torch.empty(like.shape[0], 0, dtype=torch.long, device=like.device), None, count)

    def columns(self, total: int) -> tuple[Tensor, Tensor | None]:
        """Positions and validity of all entries when ``total`` positions are cached, [B, K + total - end]."""
        more = total - self.end
        if more == 0:
            return self.index, self.valid
        batch = self.index.shape[0]
        tail = torch.arange(self.end, total, device=self.index.device).expand(batch, more)
        valid = None if self.valid is None else torch.cat([self.valid, self.valid.new_ones(batch, more)], 1)
        return torch.cat([self.index, tail], 1), valid

    def shown(self, first: int, count: int, width: int | None) -> tuple[Tensor, Tensor | None]:
        """Positions of ``count`` entries from ``first`` on, and which of them may be seen, [B, count].

        Places behind the last entry (of a static cache) count on; those from position ``width`` on may not be seen.
        """
        if torch.compiler.is_compiling():  # where entries begin is no constant of a compiled step
            return self._places(first, count, width)
        key = first, count, width
        if key not in self._shown:
            if len(self._shown) > 3:  # a dynamic cache grows with every step
                self._shown.clear()
            self._shown[key] = self._places(first, count, width)
        return self._shown[key]

    def _places(self, first: int, count: int, width: int | None) -> tuple[Tensor, Tensor | None]:
        end = self.end + max(0, first + count - self.index.shape[1])
        index, valid = self.columns(end)
        index = index[:, first : first + count]
        valid = None if valid is None else valid[:, first : first + count]
        if width is not None and end > width:
            inside = index < width
            index, valid = index.clamp_max(width - 1), inside if valid is None else valid & inside
        return index, valid

    def followed_by(self, more: "CachePositions", before: int) -> "CachePositions":
        """The map with the entries of the next sequence, when ``before`` positions are cached."""
        index, valid = self.columns(before)
        bias, rows = self.biases(before), (index, more.index)
        if valid is not None or more.valid is not None:
            known = zip(rows, (valid, more.valid), strict=True)
            valid = torch.cat([torch.ones_like(i, dtype=torch.bool) if v is None else v for i, v in known], 1)
        if bias is not None or more.bias is not None:
            added = zip(rows, (bias, more.bias), strict=True)
            bias = torch.cat([torch.zeros_like(i, dtype=torch.float32) if b is None else b for i, b in added], 1)
        return CachePositions(torch.cat(rows, 1), valid, more.end, bias)

    def biases(self, total: int) -> Tensor | None:
        """Give what is added to the logits of every entry when ``total`` positions are cached, float32; None: nothing."""
        more = self.index.shape[1] + total - self.end
        return None if self.bias is None else pad(self.bias, (0, more - self.bias.shape[1]))

    def biases_shown(self, first: int, count: int) -> Tensor | None:
        """The same of ``count`` entries from ``first`` on, see :meth:`shown`."""
        if self.bias is None:
            return None
        return pad(self.bias, (0, max(0, first + count - self.bias.shape[1])))[:, first : first + count]

    def of_samples(self, samples: Tensor) -> "CachePositions":
        """The map of these samples, in this order; layers that shared a map share the result."""
        if not self._picked or self._picked[0] is not samples:
            pick = samples.to(self.index.device)
            self._picked[:] = [samples, self._each(lambda x: x[pick])]
        return self._picked[1]

    def without_last(self, count: int, total: int) -> "CachePositions":
        """The map when the last ``count`` of ``total`` positions are rolled back.

        Raises:
            ValueError: not all of these are the last entries of every sample.
        """
        reach = count - (total - self.end)
        if reach <= 0:
            return self
        tail = torch.arange(self.end - reach, self.end, device=self.index.device)
        own = self.index[:, -reach:] == tail if reach <= self.index.shape[1] else None
        own = own if own is None or self.valid is None else own & self.valid[:, -reach:]
        if own is None or not bool(own.all()):
            raise ValueError(
                f"cannot roll {count} of {total} positions back: they reach into a pruned prompt; start from an empty cache"
            )
        return self._each(lambda x: x[:, :-reach], self.end - reach)

    def without_first(self, count: int) -> "CachePositions":
        """The map when the first ``count`` entries have made place."""
        mapped = min(count, self.index.shape[1])
        return self._each(lambda x: x[:, mapped:], self.end + count - mapped)

    def repeat(self, times: int) -> "CachePositions":
        """Every sample ``times`` times, one behind the other: [B, K] -> [B * times, K]."""
        return self._each(lambda x: x.repeat_interleave(times, 0))

    def _each(self, change: Callable[[Tensor], Tensor], end: int | None = None) -> "CachePositions":
        valid, bias = (None if x is None else change(x) for x in (self.valid, self.bias))
        return CachePositions(change(self.index), valid, self.end if end is None else end, bias)


def extended(past: CachePositions | None, before: int, tokens: TokenMap, bias: Tensor | None = None) -> CachePositions:
    """Append the survivors of a new sequence to what a layer holds of ``before`` cached positions.

    Args:
        past: what the layer holds, None when it holds all ``before`` positions.
        before: L before.
        tokens: survivors of the new sequence.
        bias: of the survivors, float32 [B, S]; None: nothing.
    """
    new = CachePositions(tokens.index + before, tokens.valid, before + tokens.width, bias)
    if not before:
        return new
    held = CachePositions.every(before, new.index) if past is None else past
    return held.followed_by(new, before)


def entries(
    tokens: TokenMap | None, past: CachePositions | None, before: int, queries: int
) -> tuple[Tensor | None, Tensor | None]:
    """Position and validity of every entry once a sequence of ``queries`` tokens is appended, see :func:`extended`.

    Returns:
        int64 [B, K + S] and bool [B, K + S] or None; (None, None) when every position is there.
    """
    held = past if tokens is None else extended(past, before, tokens)
    return (None, None) if held is None else held.columns(before + queries)


def remaining(past: CachePositions | None, tokens: TokenMap, *, before: int) -> tuple[Selection, CachePositions]:
    """Find what is left of a layer's entries when of the last sequence only ``tokens`` are.

    Args:
        past: what the layer holds, the last sequence included; None when it holds every position.
        tokens: survivors of the last sequence.
        before: positions cached before it.

    Returns:
        Which entries stay, and the map of those.
    """
    total, batch = before + tokens.width, tokens.index.shape[0]
    past = CachePositions.every(total, tokens.index) if past is None else past
    held, held_valid = past.columns(total)
    index = tokens.index + before
    index = index if tokens.valid is None else index.masked_fill(~tokens.valid, total)
    here = torch.zeros(batch, total + 1, dtype=torch.bool, device=index.device)
    here[:, :before] = True
    keep = here.scatter_(1, index, True).gather(1, held)
    keep = keep if held_valid is None else keep & held_valid
    chosen = Selection.from_mask(keep, tuple(keep.sum(1).tolist()))
    bias = past.biases(total)
    bias = None if bias is None else bias.gather(1, chosen.slots)
    return chosen, CachePositions(held.gather(1, chosen.slots), chosen.valid, total, bias)


class SessionToken:
    """Identity of the plan a cache was filled under; survives a copy of the cache."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        """The plan has been taken off."""
        self.closed = True

    def reopen(self) -> None:
        """The plan is on again: caches that were filled under it may go on."""
        self.closed = False

    def refuse_closed(self) -> None:
        """Raise ``ValueError`` where the plan has been taken off."""
        if self.closed:
            raise ValueError(
                "this cache was filled under a plan that has been removed, and misses the tokens it dropped: "
                "start from an empty cache"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SessionToken":
        return self
