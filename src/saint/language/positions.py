"""Rotary tables and position ids of the survivors.

Letters: B batch, L positions of the full sequence, S survivors, D head dim.
"""

from typing import Any

from torch import Tensor

from ..tokens import TokenMap


def gather_rotary(tables: Any, tokens: TokenMap) -> Any:
    """Rows of rotary tables, [..., B or 1, L, D] -> [..., B, S, D]: a tensor (M-RoPE has a leading axis of 3) or a tuple."""
    if isinstance(tables, tuple):
        return tuple(gather_rotary(table, tokens) for table in tables)
    batch, count = tokens.index.shape
    tables = tables.expand(*tables.shape[:-3], batch, *tables.shape[-2:])
    index = tokens.index.view(*(1,) * (tables.ndim - 3), batch, count, 1)
    index = index.expand(*tables.shape[:-3], batch, count, tables.shape[-1])
    return tables.gather(-2, index)  # [..., B, S, D]


def gather_ids(ids: Tensor, tokens: TokenMap) -> Tensor:
    """Position ids of the survivors, [..., B or 1, L] -> [..., B, S]."""
    batch, count = tokens.index.shape
    ids = ids.expand(*ids.shape[:-2], batch, ids.shape[-1])
    index = tokens.index.view(*(1,) * (ids.ndim - 2), batch, count)
    return ids.gather(-1, index.expand(*ids.shape[:-2], batch, count))  # [..., B, S]
