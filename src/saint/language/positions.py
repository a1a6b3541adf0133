"""Rotary tables and position ids of the survivors."""

from typing import Any

from torch import Tensor

from ..tokens import TokenMap


def gather_rotary(tables: Any, tokens: TokenMap) -> Any:
    """Rows of rotary tables: a tensor [..., B or 1, L, D] or a tuple of them (M-RoPE has a leading axis of 3)."""
    if isinstance(tables, tuple):
        return tuple(gather_rotary(table, tokens) for table in tables)
    batch, count = tokens.index.shape
    tables = tables.expand(*tables.shape[:-3], batch, *tables.shape[-2:])
    index = tokens.index.view(*(1,) * (tables.ndim - 3), batch, count, 1)
    return tables.gather(-2, index.expand(*tables.shape[:-3], batch, count, tables.shape[-1]))


def gather_ids(ids: Tensor, tokens: TokenMap) -> Tensor:
    """Position ids [..., B or 1, L] of the survivors."""
    batch, count = tokens.index.shape
    ids = ids.expand(*ids.shape[:-2], batch, ids.shape[-1])
    index = tokens.index.view(*(1,) * (ids.ndim - 2), batch, count)
    return ids.gather(-1, index.expand(*ids.shape[:-2], batch, count))
