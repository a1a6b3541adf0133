"""The ragged KV cache: layers behind a drop point store fewer entries and know which positions these are.

A cache layer of transformers is swapped for a :class:`RaggedLayer` when the first shortened sequence reaches it. It reports
the *logical* length (what ``generate`` counts, and what masks are sized from) while it stores only the survivors.

Letters: B batch, H KV heads, K stored entries, L logical length, D head dim.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..gathers import gather_along
from ..tokens import Selection
from ..upstream.names import CACHE
from .entries import CachePositions, SessionToken
from .static import StaticRagged


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
            gone = new.length - new.keys.shape[-2]
            if gone:  # a sliding layer has let go of the positions outside its window
                new._set_map(CachePositions.behind(gone, new.keys))
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
            self.session.refuse_closed()
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
            self.map = CachePositions.behind(end + plain, self.keys)
        else:
            self.map = self.map.without_first(mapped + plain)
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
        if isinstance(layer, (RaggedLayer, StaticRagged)):
            if layer.session is not session:
                raise ValueError(
                    "this cache was filled under another plan, which dropped other tokens at other layers: start from "
                    "an empty cache"
                )
        elif isinstance(layer, CacheLayerMixin) and type(layer) not in _THINNED:
            raise ValueError(
                f"a cache of {type(layer).__name__} cannot store a different number of tokens per layer: use a DynamicCache "
                'or a StaticCache (generate: cache_implementation="dynamic" or "static")'
            )
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        raise ValueError(
            f"a cache of {cache.layer_class_to_replicate.__name__} cannot become ragged: use a DynamicCache or a StaticCache"
        )


_THINNED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)  # can lose single entries


def ragged_layer(cache: Cache, layer: int, session: SessionToken, step: int = 1) -> RaggedLayer | StaticRagged:
    """The cache layer, swapped for a ragged one if it is not yet.

    Args:
        cache: the cache.
        layer: number of the layer.
        session: identity of the plan.
        step: a static layer is allocated in multiples of this.
    """
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    found = cache.layers[layer]
    if isinstance(found, StaticRagged):
        found.settle()
    elif isinstance(found, StaticLayer):
        return StaticRagged.adopt(found, session, step)
    elif not isinstance(found, RaggedLayer):
        found = cache.layers[layer] = RaggedLayer.adopt(found, session)
    return found


def filled(cache: Any) -> bool:
    """Tell whether a forward goes on where another has filled the cache, and is no prompt of its own."""
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # of a static cache, whose steps alone are compiled; a look at it would break the graph
    return bool(length)


def filled_of(shown: tuple[Tensor, Tensor], cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Of the keys and values [B, H, T, D] that a layer of a cache shows behind a call, those that are filled.

    A static layer shows all of its places, the first of which are filled; the call's own are the last of these.
    """
    entry = None if cache is None else cache.layers[layer]
    if not isinstance(entry, StaticLayer) or entry.keys is None or entry.keys.shape[2] != shown[0].shape[2]:
        return shown
    end = entry.stored if isinstance(entry, StaticRagged) else int(entry.get_seq_length())
    return shown[0][:, :, :end], shown[1][:, :, :end]


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
    # positions that it would hold at most; without a window, all
    reach = (
        None
        if not layer.is_sliding
        else layer.max_cache_len
        if isinstance(layer, StaticLayer)
        else layer.sliding_window - 1
    )
    unpruned = length + gone if reach is None else min(length + gone, reach)
    stored = layer.stored if isinstance(layer, StaticRagged) else min(places, length)
    if not isinstance(layer, (RaggedLayer, StaticRagged)) and stored < (
        length if reach is None else min(length, reach)
    ):
        return None  # the others are kept in another form (quantised)
    each = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) // places if places else 0
    return each * stored, each * unpruned
