"""The ragged KV cache: layers behind a drop point store fewer entries and know which positions these are.

A cache layer of transformers is swapped for a :class:`RaggedLayer` when the first shortened sequence reaches it. It reports
the *logical* length (what ``generate`` counts, and what masks are sized from) while it stores only the survivors.

Letters: B batch, H KV heads, K stored entries, L logical length, D head dim.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from ..gathers import gather_along
from ..tokens import Selection, TokenMap
from ..upstream.names import CACHE


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

    def __deepcopy__(self, memo: dict[int, Any]) -> "SessionToken":
        return self


class RaggedLayer(DynamicLayer):
    """A cache layer that stores K of L positions. ``window`` is the sliding window, or None."""

    keys: Any  # Tensor once initialised; transformers sets these in untyped code
    values: Any

    def __init__(self, session: SessionToken, window: int | None) -> None:
        super().__init__()
        self.session, self.sliding_window = session, window
        self.is_sliding = window is not None  # read by transformers when it sizes masks
        self.length = 0  # logical
        self.map: CachePositions | None = None  # None: all positions are stored
        self.plain = window is None  # a single token may see every entry, and all weigh alike
        self._starts: list[int] = []  # sliding: highest position (over the samples) of each entry of `map`

    @classmethod
    def adopt(cls, layer: DynamicLayer, session: SessionToken) -> "RaggedLayer":
        """Take over the content of an ordinary layer."""
        new = cls(session, layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
        if layer.is_initialized:
            if hasattr(layer, "dtype"):  # transformers 5.23 and before
                new.dtype = layer.dtype
            new.device, new.is_initialized = layer.device, True
            new.keys, new.values = layer.keys, layer.values
            new.length = layer.get_seq_length()
            batch, stored = new.keys.shape[0], new.keys.shape[-2]
            if stored < new.length:  # a sliding layer has let go of the positions outside its window
                empty = torch.empty(batch, 0, dtype=torch.long, device=new.device)
                new._set_map(CachePositions(empty, None, new.length - stored))
        return new

    @property
    def is_croppable(self) -> bool:
        """Tell whether any number of the last positions can be taken off again; asked by assisted decoding."""
        return self.sliding_window is None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        positions: CachePositions | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, S, D]; ``positions`` is what the entries are afterwards, None when nothing of it is missing."""
        if self.session.closed:
            raise ValueError(
                "this cache was filled under a plan that has been removed, and misses the tokens it dropped: "
                "start from an empty cache"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if positions is None:
            self.length += key_states.shape[-2]
        else:
            self.length = positions.end
            self._set_map(positions)
        if self.sliding_window is not None:
            self._let_go()
        return keys, values

    def keep(self, selection: Selection, positions: CachePositions) -> None:
        """Keep only these entries, whose positions are ``positions``."""
        self.keys, self.values = (
            gather_along(self.keys, selection.slots, 2),
            gather_along(self.values, selection.slots, 2),
        )
        self._set_map(positions)

    def _set_map(self, positions: CachePositions) -> None:
        self.map = positions
        self.plain = self.sliding_window is None and positions.valid is None and positions.bias is None
        if self.sliding_window is not None:
            reach = positions.index if positions.valid is None else positions.index.masked_fill(~positions.valid, -1)
            # running maximum: padding does not hold entries behind it back
            self._starts = reach.amax(0).cummax(0).values.tolist()

    def _let_go(self) -> None:
        """Forget entries that no sample's window will see again."""
        assert self.sliding_window is not None
        first = self.length - self.sliding_window + 1  # the next query sees positions >= first
        end = 0 if self.map is None else self.map.end
        mapped = bisect_left(self._starts, first)
        plain = max(0, first - end) if mapped == len(self._starts) else 0
        if mapped + plain == 0:
            return
        if self.map is None:
            index = torch.empty(self.keys.shape[0], 0, dtype=torch.long, device=self.keys.device)
            self.map = CachePositions(index, None, end + plain)
        else:
            self.map = self.map._each(lambda x: x[:, mapped:], end + plain)
        self._starts = self._starts[mapped:]
        self.keys, self.values = self.keys[:, :, mapped + plain :], self.values[:, :, mapped + plain :]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sliding_window is None:
            return self.length + query_length, 0
        # as DynamicSlidingWindowLayer: the other sliding layers, with full content, share the mask
        first = max(self.length - self.sliding_window + 1, 0)
        return self.length - first + query_length, first

    def reset(self) -> None:
        super().reset()
        self.length, self.map, self._starts, self.plain = 0, None, [], self.sliding_window is None

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if count < 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        if self.sliding_window is not None:
            raise ValueError(
                f"cannot roll {count} of {self.length} positions back in a layer with a sliding window: start from an empty cache"
            )
        if self.map is not None:
            self.map = self.map.without_last(count, self.length)
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        self.length -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.map is not None:
            self.map = self.map.of_samples(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.map is not None:
            self.map = self.map.of_samples(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.map is not None:
            self.map = self.map.repeat(repeats)


class CacheView:
    """The cache as one call of one layer sees it: knows the positions of what the call appends, and keeps its keys.

    Args:
        cache: the model's cache, or None when nothing is cached.
        positions: what the layer's entries are after the call, None when the call brings a sequence of which nothing is missing.
    """

    def __init__(self, cache: Any, positions: CachePositions | None) -> None:
        self.cache, self.positions = cache, positions
        self.keys: Tensor | None = None  # of the call, after rotary, before repetition over heads, [B, H, S, D]
        self.held: tuple[Tensor, Tensor]  # all keys and values the attention sees, [B, H, T, D]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.held = key_states, (key_states, value_states)
        if self.cache is not None:
            where = {} if self.positions is None else {"positions": self.positions}
            self.held = self.cache.update(key_states, value_states, *args, **where, **kwargs)
        return self.held

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def check_cache(cache: Any, session: SessionToken) -> None:
    """Raise ``ValueError`` unless ``cache`` can become ragged under this plan."""
    if not isinstance(cache, Cache):
        raise ValueError(f"{CACHE.spellings[0]} must be a transformers Cache, got {type(cache).__name__}")
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer):
            if layer.session is not session:
                raise ValueError(
                    "this cache was filled under another plan, which dropped other tokens at other layers: start from "
                    "an empty cache"
                )
        elif isinstance(layer, CacheLayerMixin) and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"a cache of {type(layer).__name__} cannot store a different number of tokens per layer: use a DynamicCache "
                '(generate: drop cache_implementation, or set it to "dynamic")'
            )
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        raise ValueError(
            f"a cache of {cache.layer_class_to_replicate.__name__} cannot become ragged: use a DynamicCache"
        )


def ragged_layer(cache: DynamicCache, layer: int, session: SessionToken) -> RaggedLayer:
    """The cache layer, swapped for a ragged one if it is not yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    found = cache.layers[layer]
    if not isinstance(found, RaggedLayer):
        found = cache.layers[layer] = RaggedLayer.adopt(found, session)
    return found


def filled(cache: Any) -> bool:
    """Tell whether a forward goes on where another has filled the cache, and is no prompt of its own."""
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # of a static cache, whose steps alone are compiled; a look at it would break the graph
    return bool(length)


@dataclass(frozen=True)
class KVMemory:
    """Bytes of keys and values cached by the last prompt, and what the unpruned model would cache."""

    kept: int
    unpruned: int


def memory(cache: Any, gone: int) -> KVMemory | None:
    """Bytes behind a prompt of which ``gone`` positions did not enter the decoder.

    None without a cache (``use_cache=False``, gradient checkpointing), and where a layer stores other things than keys and values
    by position (quantised).
    """
    sizes = [stored_bytes(layer, gone) for layer in getattr(cache, "layers", [])]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or not any(unpruned for _, unpruned in known):
        return None
    return KVMemory(sum(kept for kept, _ in known), sum(unpruned for _, unpruned in known))


def stored_bytes(layer: Any, gone: int = 0) -> tuple[int, int] | None:
    """Bytes of keys and values a cache layer stores, and would store with nothing dropped; None: not known."""
    if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
        return 0, 0  # a recurrent layer has no entries
    if not isinstance(layer, (DynamicLayer, StaticLayer)) or layer.keys.ndim != 4:
        return None
    places, length = layer.keys.shape[-2], int(layer.get_seq_length())
    reach = (
        layer.max_cache_len
        if isinstance(layer, StaticLayer)
        else layer.sliding_window - 1
        if layer.is_sliding
        else None
    )
    unpruned = length + gone if reach is None else min(length + gone, reach)
    stored = min(places, length)
    if not isinstance(layer, RaggedLayer) and stored < (length if reach is None else min(length, reach)):
        return None  # the others are kept in another form (quantised)
    each = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) // places if places else 0
    return each * stored, each * unpruned
