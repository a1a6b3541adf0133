"""Rotary tables, position ids and what else comes with each token, of the survivors.

Letters: B batch, L positions of the full sequence, S survivors, D head dim, C channels.
"""

from typing import Any

from torch import Tensor

from ..gathers import gather_along
from ..tokens import TokenMap


def gather_rotary(tables: Any, tokens: TokenMap) -> Any:
    """Rows of rotary tables, [..., B or 1, L, D] -> [..., B, S, D]: a tensor (M-RoPE has a leading axis of 3) or a tuple.

    None, of a layer without, stays None.
    """
    if tables is None:
        return None
    if isinstance(tables, tuple):
        return tuple(gather_rotary(table, tokens) for table in tables)
    return gather_along(tables, tokens.index, tables.ndim - 2, tables.ndim - 3)


def gather_ids(ids: Tensor, tokens: TokenMap) -> Tensor:
    """Position ids of the survivors, [..., B or 1, L] -> [..., B, S]."""
    return gather_along(ids, tokens.index, ids.ndim - 1, ids.ndim - 2)


def gather_beside(value: Any, tokens: TokenMap) -> Any:
    """What comes with each token, [B or 1, L, ...] -> [B, S, ...], alone or in tuples and lists; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(gather_beside(one, tokens) for one in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != tokens.width:
        return value
    return gather_along(value, tokens.index, 1, 0) if value.shape[0] in (1, tokens.index.shape[0]) else value
