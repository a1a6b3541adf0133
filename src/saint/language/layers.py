"""What each layer of a decoder keeps of a sequence, read off the cache that transformers makes for its config.

Layers of attention keep keys, and tokens can be chosen by them; recurrent layers (linear attention, short convolutions, Mamba)
keep a state that every token has passed through; layers with shared keys read those of an earlier one; layers of an MLP alone
keep nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..upstream.names import LAYER_KINDS, SHARING, STATES

_THINNED = (DynamicLayer, DynamicSlidingWindowLayer)  # can lose single entries


@dataclass(frozen=True)
class Keeps:
    """What one layer keeps.

    Attributes:
        keys: of its own, with values, by position.
        recurrent: a state without positions.
        shared: the earlier layer whose keys it reads, or None.
        refusal: why it cannot lose tokens, for messages; "" where it can.
    """

    keys: bool = True
    recurrent: bool = False
    shared: int | None = None
    refusal: str = ""


def read_layers(config: Any, depth: int) -> list[Keeps]:
    """Read what each of the ``depth`` layers of a decoder with this config keeps."""
    made = DynamicCache(config=config).layers
    modes, kinds = SHARING.get(config) or (), LAYER_KINDS.get(config) or ()
    out, states = [Keeps()] * depth, {type(layer): STATES.of(layer) is not None for layer in _one_of_each(made)}
    kinds_seen: dict[tuple[bool, bool, int | None, str], Keeps] = {}
    for index, layer in enumerate(made[:depth]):
        keys, recurrent = isinstance(layer, CacheLayerMixin), states[type(layer)]
        shared, refusal = None, ""
        if keys and recurrent:
            refusal = "its keys pass through a convolution, whose state it keeps beside them"
        elif keys and type(layer) not in _THINNED:
            refusal = f"its cache is a {type(layer).__name__}, which cannot lose single entries"
        elif index < len(modes) and modes[index] == "reuse":
            shared = _source(index, modes, kinds)
            refusal = "" if shared is not None else "it reads keys of a layer that is not known"
        own = keys, recurrent, shared, refusal
        if own not in kinds_seen:
            kinds_seen[own] = Keeps(*own)
        out[index] = kinds_seen[own]
    return out


def _one_of_each(layers: Sequence[Any]) -> list[Any]:
    return list({type(layer): layer for layer in layers}.values())


def _source(index: int, modes: Sequence[str | None], kinds: Sequence[str]) -> int | None:
    """The layer whose keys layer ``index`` reads: the last of its kind in front of it that stores its own."""
    before = [i for i in range(index) if modes[i] == "store" and kinds[i] == kinds[index]]
    return before[-1] if before else None


def with_keys(keeps: Sequence[Keeps]) -> list[int]:
    """The layers at which tokens can be chosen."""
    return [index for index, one in enumerate(keeps) if one.keys]
