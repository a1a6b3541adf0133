"""Static caches behind a plan: each layer is allocated at what it will hold.

Where tokens leave in front of the language model, its layers have fewer places (:func:`fitted`). A static layer of transformers
behind a drop point becomes an instance of a class of its own kind that has fewer places. As a ragged layer (``cache``) it reports
the *logical* length and knows which positions its entries hold; lengths that change from step to step are tensors where
upstream's are, so a compiled step stays one graph. ``reset`` makes it what it was.

Letters: B batch, H KV heads, K stored entries, S survivors of a new sequence, W sliding window, D head dim.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from ..gathers import gather_along
from ..tokens import Selection
from .entries import CachePositions, SessionToken

_PLACES = 64  # a number by votes is rounded up to a multiple of it, so that few shapes are compiled


def places_by(budgets: Iterable[int | float | None]) -> int:
    """Tell in multiples of what places are allocated behind methods that keep so many; None: they vote."""
    return _PLACES if any(budget is None for budget in budgets) else 1


def fitted(cache: Cache, gone: int, step: int) -> dict[int, int]:
    """Take the places of ``gone`` positions from the layers of a static cache that are not allocated yet.

    Layers with a window have no more places than it, and stay as they are.

    Args:
        cache: empty.
        gone: positions that will not enter.
        step: places are allocated in multiples of this.

    Returns:
        Of each layer that has fewer now, how many it had.
    """
    had = {}
    for number, layer in enumerate(cache.layers):
        if type(layer) is StaticLayer and not layer.is_initialized:
            whole = layer.max_cache_len
            layer.max_cache_len = min(whole, _rounded(whole - gone, step))
            if layer.max_cache_len < whole:
                had[number] = whole
    return had


def _rounded(places: int, step: int) -> int:
    return -(-places // step) * step


class StaticRagged(StaticLayer):
    """A static layer that has places for fewer entries than positions.

    Attributes:
        session: identity of the plan.
        step: places are allocated in multiples of this.
        places: that are allocated, or will be.
        map: which positions the entries hold; None: every one.
        gone: positions that are cached and have no entry.
    """

    sliding_window: int | None = None
    plain = False  # what is not filled yet must be hidden, so every step needs a mask

    max_cache_len: int  # of upstream, in positions
    is_initialized: bool
    _base: type[StaticLayer] = StaticLayer
    session: SessionToken
    step: int
    places: int
    map: CachePositions | None
    gone: int

    @staticmethod
    def adopt(layer: StaticLayer, session: SessionToken, step: int) -> "StaticRagged":
        """Make a layer one of these, with what it holds."""
        sliding = isinstance(layer, StaticSlidingWindowLayer)
        layer.__class__ = StaticRaggedSliding if sliding else StaticRagged
        new = cast(StaticRagged, layer)
        new.session, new.step, new.map, new.gone = session, step, None, 0
        new.places = new.keys.shape[2] if new.is_initialized and new.keys is not None else new.max_cache_len
        new._adopted()
        return new

    def _adopted(self) -> None:
        """Note what only some kinds need."""

    @property
    def length(self) -> int:
        """Positions that are cached; a look at the device."""
        return int(self.get_seq_length())

    def get_seq_length(self) -> Any:
        return super().get_seq_length() + self.gone

    @property
    def stored(self) -> int:
        """Entries that are filled; a look at the device."""
        return self.length - self.gone

    # -- a call of the layer ------------------------------------------------------------------------------------------

    def expect(self, positions: CachePositions, count: int) -> tuple[int, int]:
        """Make room for ``count`` entries more, behind which the entries are ``positions``.

        Returns:
            What :meth:`shown` does.
        """
        if not self.is_initialized or not self.stored:
            self.places, self.is_initialized = self._room(positions), False
        return self.shown(count)

    def _room(self, positions: CachePositions) -> int:
        room = self.max_cache_len - (positions.end - positions.index.shape[1])
        return min(self.max_cache_len, _rounded(room, self.step))

    def shown(self, count: int) -> tuple[int, int]:
        """Of the entries that a call which appends ``count`` attends to: the first, and how many."""
        return 0, self.places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        whole, self.max_cache_len = self.max_cache_len, self.places
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = whole

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        positions: CachePositions | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, S, D]; ``positions`` is what the entries are afterwards, None when nothing of it is missing."""
        self.session.refuse_closed()
        held = self._append(key_states, value_states)
        if positions is not None:
            self._set_map(positions)
        return held

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states)

    def _set_map(self, positions: CachePositions) -> None:
        self.map, self.gone = positions, positions.end - positions.index.shape[1]

    # -- between calls ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Forget of which positions the entries were that made place for others."""

    def keep(self, selection: Selection, positions: CachePositions) -> None:
        """Keep only these entries, whose positions are ``positions``."""
        kept = [gather_along(x, selection.slots, 2) for x in (self.keys, self.values)]
        self.places = self._room(positions)
        self._hold(kept[0], kept[1])
        self._set_map(positions)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Allocate the places anew, with these entries in the first."""
        count = keys.shape[2]
        self.lazy_initialization(keys, values)
        self.keys[:, :, :count], self.values[:, :, :count] = keys, values
        self.cumulative_length.fill_(count)

    def crop(self, tokens_to_remove: int) -> None:
        if self.map is not None and tokens_to_remove < 0:
            self.map = self.map.without_last(-tokens_to_remove, self.length)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(Any, beam_idx))
        if self.map is not None:
            self.map = self.map.of_samples(beam_idx)

    def reset(self) -> None:
        super().reset()
        self.is_initialized, self.keys, self.values = False, cast(Any, None), cast(Any, None)
        self.__class__ = self._base
        for name in ("session", "step", "places", "map", "gone"):
            delattr(self, name)


class StaticRaggedSliding(StaticRagged, StaticSlidingWindowLayer):
    """One with a sliding window, in which the oldest entries make place for the next.

    Upstream's lengths stay what they are, of positions. Padding between entries takes places that the window does not count, so
    there are as many more.

    Attributes:
        appended: entries that were appended, those that made place with them.
    """

    _base = StaticSlidingWindowLayer
    appended: int

    def _adopted(self) -> None:
        self.sliding_window = self.max_cache_len
        self.appended = min(self.cumulative_length_int, self.max_cache_len)
        if self.appended < self.cumulative_length_int:  # the first positions have left the window
            self.map = CachePositions.behind(self.cumulative_length_int - self.appended, self.keys)

    def get_seq_length(self) -> int:
        return self.cumulative_length_int

    @property
    def stored(self) -> int:
        return min(self.appended, self.places)

    def expect(self, positions: CachePositions, count: int) -> tuple[int, int]:
        if self.is_initialized and self.stored and (room := self._room(positions)) > self.places:
            keys, values = self.keys[:, :, : self.stored], self.values[:, :, : self.stored]
            self.places = room
            self._hold(keys, values)
        return super().expect(positions, count)

    def _room(self, positions: CachePositions) -> int:
        if getattr(self, "is_croppable", False):  # no window ends within the cache, as far as the release says
            return super()._room(positions)
        padding = 0 if positions.valid is None else int((~positions.valid).sum(1).max())
        return self.max_cache_len + padding

    def shown(self, count: int) -> tuple[int, int]:
        held = min(self.appended, self.places)
        gone = self.appended - held
        if self.appended + count <= self.places:
            return 0, self.places
        return (gone + 1, self.places) if count == 1 else (gone, held + count)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, before = key_states.shape[2], self.appended
        self.appended = before + count
        self.cumulative_length_int += count
        if before + count <= self.places:
            place = torch.arange(count, device=self.device) + self.cumulative_length
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            self.cumulative_length.add_(count)
            return self.keys, self.values
        held = min(before, self.places)
        keys, values = (
            torch.cat([old[:, :, :held], new], 2) for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        self.keys.copy_(keys[:, :, -self.places :])  # in place: compiled steps know the address
        self.values.copy_(values[:, :, -self.places :])
        return (self.keys, self.values) if count == 1 else (keys, values)

    def _set_map(self, positions: CachePositions) -> None:
        super()._set_map(positions)
        self.cumulative_length_int = positions.end

    def settle(self) -> None:
        gone = self.appended - self.stored
        if gone and self.map is not None:
            self.map, self.appended = self.map.without_first(gone), self.stored

    def keep(self, selection: Selection, positions: CachePositions) -> None:
        self.appended = selection.slots.shape[1]
        super().keep(selection, positions)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.appended -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.cumulative_length_int = 0
        super().reset()
        for name in ("appended", "sliding_window"):
            delattr(self, name)
