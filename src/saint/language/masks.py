"""Attention masks of shortened sequences: rows and columns of the mask the model made.

Letters: B batch, H heads, Q queries, K stored entries, L positions, S survivors of the new sequence.
"""

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..gathers import gather_along
from ..tokens import TokenMap
from .entries import CachePositions, entries, extended

# implementations of transformers whose mask is dense [B, 1, Q, L] or, for flash, the padding mask [B, L]
DENSE = {"sdpa", "eager"}
FLASH = {"flash_attention_2", "flash_attention_3"}


def lets_through(mask: Tensor) -> Tensor:
    """Return where a mask hides nothing: bool, integers (of padding), or added to the logits of attention."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


def survivors_mask(
    mask: Tensor | None,
    tokens: TokenMap | None,
    past: CachePositions | None,
    *,
    before: int,
    first: int,
    queries: int,
    flash: bool,
    shown: TokenMap | None = None,
    places: tuple[int, int] | None = None,
) -> Tensor | None:
    """The mask between the survivors of a new sequence and the entries a layer will hold.

    Args:
        mask: what the model made for the full sequence: bool or additive [B or 1, 1 or H, Q, L'], the padding mask [B, L'] of
            flash attention, or None (causal and nothing padded).
        tokens: survivors of the new sequence, or None when nothing of it is missing.
        past: what the layer holds, or None when it holds every position.
        before: positions cached before this sequence.
        first: position of the mask's first column (sliding windows).
        queries: length Q of the full new sequence.
        flash: the model runs flash attention.
        shown: of a layer that reads the keys of an earlier one, the tokens of the new sequence that were left there, where
            ``tokens`` are only some of them.
        places: of a static layer, the first entry that it shows and how many places, filled or not.

    Returns:
        The same kind of mask, or None when nothing but causality masks.
    """
    if places is None and tokens is None and past is not None and past.end == first and not past.index.shape[1]:
        return mask  # a sliding window that has left the pruned prompt behind
    if (
        mask is None
        and not first
        and shown is None
        and all(held is None or held.valid is None for held in (tokens, past))
    ):
        return None  # the usual decode step: every entry may be seen
    keys = tokens if shown is None else shown
    if places is None:
        columns, valid = entries(keys, past, before, queries)
    else:
        held = past if keys is None else extended(past, before, keys)
        assert held is not None
        columns, valid = held.shown(*places, None if mask is None else first + mask.shape[-1])
    if first and columns is not None:
        inside = columns >= first
        valid = inside if valid is None else valid & inside
        columns = (columns - first).clamp_min(0)
    if mask is None and shown is not None:
        assert tokens is not None
        assert columns is not None
        mask = columns.unsqueeze(1) <= (tokens.index + before - first).unsqueeze(2)  # [B, S, K]
        return (mask if valid is None else mask & valid.unsqueeze(1)).unsqueeze(1)
    if mask is None:
        if valid is None or before == 0:
            return None  # padding stands right of every real query: causality hides it already
        if flash:
            return valid
        assert queries == 1, "transformers leaves the mask out for complete prompts and single tokens only"
        return valid[:, None, None]  # [B, 1, 1, K]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedModelError(
            f"an attention mask of type {type(mask).__name__} cannot be cut to the tokens that are left: load the model with "
            'attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    if columns is None:
        return mask
    if mask.ndim == 2:
        mask = gather_along(mask, columns, 1)  # [B, K]
        return mask if valid is None else mask & valid.to(mask.dtype)
    if tokens is not None and mask.shape[2] == queries:
        mask = gather_along(mask, tokens.index, 2)  # [B, 1 or H, S, L']
    mask = gather_along(mask, columns, 3)  # [B, 1 or H, S, K]
    if valid is None:
        return mask
    hidden = ~valid[:, None, None]
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def weighed(mask: Tensor | None, bias: Tensor, *, queries: int, ahead: int, dtype: torch.dtype, flash: bool) -> Tensor:
    """The additive mask in which the logits of each entry's key get a bias: of merged tokens.

    Args:
        mask: see :func:`survivors_mask`.
        bias: of each entry, float32 [B, K].
        queries: how many of the entries ask.
        ahead: entries in front of those.
        dtype: of the hidden states.
        flash: the model runs flash attention.

    Raises:
        UnsupportedModelError: flash attention takes no such mask.
    """
    if flash:
        raise UnsupportedModelError(
            "flash attention takes no mask through which merged tokens are weighed: set beta=0, or load the model with "
            'attn_implementation="sdpa"'
        )
    if mask is None:  # nothing but causality: entries are in order
        place = torch.arange(bias.shape[1], device=bias.device)
        mask = place <= place[ahead : ahead + queries, None]  # [Q, K]
    if not mask.is_floating_point():
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask.bool(), lowest)
    return mask + bias[:, None, None].to(dtype)  # [B, 1 or H, Q, K]
