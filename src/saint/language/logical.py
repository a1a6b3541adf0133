"""A cache behind a shortened prompt: callers see the length of the whole prompt, the decoder what is stored.

The cache stays the model's own, of any class, and stores what it ever stores. It becomes an instance of a subclass of its class
that differs in what it says of lengths, outside of the decoder's call, and in that the map of its entries follows where samples
are picked, repeated or rolled back. ``reset`` makes it what it was.

Letters: B samples, K stored entries, L positions of callers.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .entries import CachePositions, SessionToken


class Held:
    """What a cache holds.

    Attributes:
        positions: of its entries.
        token: identity of the plan it was filled under.
        inside: the decoder runs.
        whole: of layers of a static cache that were given fewer places than positions, how many they had.
    """

    def __init__(self, positions: CachePositions, token: SessionToken) -> None:
        self.positions, self.token, self.inside = positions, token, False
        self.whole: dict[int, int] = {}

    @property
    def gone(self) -> int:
        """Positions that callers count and that are not stored."""
        return self.positions.end - self.positions.index.shape[1]


class Shortened(Cache):
    """Mixed in front of the class of a cache."""

    _base: type[Cache]
    _held: Held

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        length = super().get_seq_length(*args, **kwargs)
        return length if self._held.inside else length + self._held.gone

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        self._held.token.refuse_closed()  # whoever asks this is about to go on
        return super().get_query_offset(*args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._held.token.refuse_closed()
        length, first = super().get_mask_sizes(query_length, layer_idx)
        if self._held.inside:
            return length, first
        # outside a mask has a column for every position, also where a window shows fewer
        for number, layer in enumerate(self.layers):
            if (places := getattr(layer, "max_cache_len", None)) is not None and not layer.is_sliding:
                return self._held.whole.get(number, places), 0
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        length, held = super().get_max_length(layer_idx), self._held
        whole = held.whole.values() if layer_idx is None else [held.whole.get(layer_idx, length)]
        return length if held.inside else max([length, *whole])

    def crop(self, tokens_to_remove: int) -> None:
        held = self._held
        if tokens_to_remove < 0:
            held.positions = held.positions.without_last(-tokens_to_remove, int(self.get_seq_length()))
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._held.positions = self._held.positions.of_samples(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._held.positions = self._held.positions.of_samples(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._held.positions = self._held.positions.repeat(repeats)

    def reset(self) -> None:
        super().reset()
        for number, places in self._held.whole.items():
            layer: Any = self.layers[number]
            layer.max_cache_len, layer.is_initialized, layer.keys, layer.values = places, False, None, None
        self.__class__ = self._base
        del self._held

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self._base,), vars(self)


_SUBCLASSES: dict[type[Cache], Any] = {}


def _subclass(base: type[Cache]) -> Any:
    """One per class: the compiler looks at the class of a cache."""
    if base not in _SUBCLASSES:
        facts = {"__module__": base.__module__, "_base": base}
        _SUBCLASSES[base] = type(base.__name__, (Shortened, base), facts)
    return _SUBCLASSES[base]


def _empty(base: type[Cache]) -> Shortened:
    return object.__new__(_subclass(base))


def held_by(cache: Any) -> Held | None:
    """Read what a cache says it holds; None where it holds every position, or nothing."""
    return cache._held if isinstance(cache, Shortened) else None


class inside:  # noqa: N801
    """The length of the decoder's call: a cache says what it stores.

    A class, and no generator: a compiled step takes it without a break.
    """

    def __init__(self, cache: Any) -> None:
        self.held = held_by(cache)

    def __enter__(self) -> None:
        if self.held is not None:
            self.held.inside = True

    def __exit__(self, *_: Any) -> None:
        if self.held is not None:
            self.held.inside = False


def hold(cache: Any, positions: CachePositions, token: SessionToken, whole: dict[int, int] | None = None) -> None:
    """From now on ``cache`` has these entries, and layers fewer places than the ``whole`` they had."""
    if isinstance(cache, Shortened):
        cache._held.positions = positions
    else:
        cache._held = Held(positions, token)
        cache.__class__ = _subclass(type(cache))
    cache._held.whole |= whole or {}
