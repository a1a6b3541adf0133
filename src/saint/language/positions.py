"""Rotary tables, position ids and what else comes with each token, of the survivors.

Letters: B batch, L positions of the full sequence, S survivors, D head dim, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
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
    """Cut what comes with each token, [B or 1, L, ...] -> [B, S, ...], alone or in tuples and lists; anything else stays."""
    if type(value) in (tuple, list):
        return type(value)(gather_beside(one, tokens) for one in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != tokens.width:
        return value
    return gather_along(value, tokens.index, 1, 0) if value.shape[0] in (1, tokens.index.shape[0]) else value


def rotary_like(attention: Any) -> list[Callable[[str, Tensor], Any]]:
    """Makers of random rotary tables of the forms that an attention may take, given an argument's name and hidden states."""
    turned = getattr(attention, "qk_rope_head_dim", None)  # of latent attention
    whole = attention.head_dim if turned is None else turned
    share = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    dims = dict.fromkeys([whole, int(whole * share.get("partial_rotary_factor", 1))])

    def pair(dim: int) -> Callable[[str, Tensor], Any]:
        def table(_: str, like: Tensor) -> tuple[Tensor, Tensor]:
            values = torch.randn(2, 1, like.shape[-2], dim, generator=torch.Generator().manual_seed(1)).to(like)
            return values[0], values[1]

        return table

    def turns(_: str, like: Tensor) -> Tensor:
        values = torch.randn(1, like.shape[-2], whole // 2, generator=torch.Generator().manual_seed(1)).to(like.device)
        return torch.polar(torch.ones_like(values), values)

    return [*(pair(dim) for dim in dims), turns]
