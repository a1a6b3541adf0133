"""Rotary tables and position ids of the survivors.

Letters: B batch, L positions of the full sequence, S survivors, D head dim.
"""

from typing import Any

from torch import Tensor

from ..gathers import gather_along
from ..tokens import TokenMap


def gather_rotary(tables: Any, tokens: TokenMap) -> Any:
    """Rows of rotary tables, [..., B or 1, L, D] -> [..., B, S, D]: a tensor (M-RoPE has a leading axis of 3) or a tuple."""
    if isinstance(tables, tuple):
        return tuple(gather_rotary(table, tokens) for table in tables)
    return gather_along(tables, tokens.index, tables.ndim - 2, tables.ndim - 3)


def gather_ids(ids: Tensor, tokens: TokenMap) -> Tensor:
    """Position ids of the survivors, [..., B or 1, L] -> [..., B, S]."""
    return gather_along(ids, tokens.index, ids.ndim - 1, ids.ndim - 2)
