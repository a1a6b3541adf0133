"""The input of a decoder, cut to the tokens that enter it, and its output at the length that callers expect.

Letters: B samples, L places of the sequence, K rows that enter, Q queries, T entries of the cache with the sequence, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from ..errors import UnsupportedModelError
from ..gathers import gather_along, gather_tokens
from ..upstream.names import CACHE, CACHING, MASK, POSITIONS
from .entries import CachePositions
from .masks import lets_through


@dataclass(frozen=True)
class Short:
    """Which places of a sequence enter the decoder.

    They stand at the right end, where the answer goes on; in front of those of a shorter sample is padding. Recurrent layers
    need it so: padding behind a sample would pass through their state.

    Attributes:
        keep: bool [B, L].
        index: place of each row, ascending, int64 [B, K]; padding rows hold the last one.
        valid: bool [B, K], False for padding, or None when there is none.
    """

    keep: Tensor
    index: Tensor
    valid: Tensor | None

    @staticmethod
    def of(keep: Tensor, counts: Sequence[int] | None = None) -> "Short":
        """The places of ``keep`` [B, L], ``counts[b]`` in row b; at least one row, be it padding."""
        counts = keep.sum(1).tolist() if counts is None else counts
        most, width = max(1, *counts), keep.shape[1]
        index = torch.sort(keep.view(torch.uint8), dim=1, stable=True).indices[:, width - most :]
        if min(counts) == most:
            return Short(keep, index, None)
        row = torch.arange(most, device=keep.device)
        valid = row >= most - torch.tensor(counts, device=keep.device).unsqueeze(1)
        return Short(keep, torch.where(valid, index, index[:, -1:]), valid)

    @property
    def rows(self) -> int:
        return self.index.shape[1]

    def take(self, x: Tensor, axis: int = 1) -> Tensor:
        """Rows of ``x``, whose axis ``axis`` runs along the sequence and the one before it along the samples (or is 1)."""
        return gather_along(x, self.index, axis, axis - 1)

    def slots(self) -> Tensor:
        """For each place the row of the nearest survivor at or before it (the first one where none is), int64 [B, L]."""
        slot = (self.keep.cumsum(1) - 1).clamp_min(0)
        return slot if self.valid is None else slot + (~self.valid).sum(1, keepdim=True).clamp_max(self.rows - 1)

    def lengthened(self, output: Any) -> Any:
        """An output of the decoder in which maps of rows, alone or in tuples, run along the sequence again."""
        slots = self.slots()

        def back(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(back(one) for one in value)
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == self.index.shape:
                return gather_tokens(value, slots, 0)  # [B, L, C]
            return value

        if isinstance(output, Tensor) or type(output) is tuple:
            return back(output)
        for name, value in output.items():
            if (new := back(value)) is not value:
                output[name] = new
        return output

    def shortened(self, given: Mapping[str, Any], visual: Tensor, skip: set[str]) -> dict[str, Any]:
        """Arguments of the decoder: those with a value per place, and those with a value per visual token, are cut.

        Args:
            given: by name.
            visual: where visual tokens are, bool [B, L].
            skip: names that are left as they are.
        """
        counts: list[int] = []

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: cut(one) for name, one in value.items()}
            if isinstance(value, (list, tuple)):
                return (
                    type(value)(cut(one) for one in value) if all(isinstance(one, Tensor) for one in value) else value
                )
            if not isinstance(value, Tensor) or value.ndim < 2:
                return value
            batch, places = self.keep.shape
            if value.shape[0] in (1, batch) and value.shape[1] == places:
                value = self.take(value)
                if value.dtype == torch.bool and self.valid is not None:
                    value = value & self.valid.view(*self.valid.shape, *[1] * (value.ndim - 2))
                return value
            if not counts:
                counts.append(int(visual.sum()))
            return value[self.keep[visual]] if value.shape[0] == counts[0] else value

        return {name: value if name in skip else cut(value) for name, value in given.items()}


# -- masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """How far back the layers of one kind see.

    Attributes:
        window: positions, or None.
        chunk: positions of a chunk within which they see, or None.
        dense: they need a mask also where it hides nothing but what comes later: an indexer reads it.
    """

    window: int | None = None
    chunk: int | None = None
    dense: bool = False

    def ends(self, length: int) -> bool:
        """Tell whether less than ``length`` positions are seen."""
        limit = self.window if self.chunk is None else self.chunk
        return limit is not None and limit < length


def reaches(config: Any) -> dict[str, Reach] | Reach:
    """Of the kinds of layers of a decoder; without kinds, of all its layers.

    Read off the config as transformers does where ``generate`` makes masks for a static cache (``create_masks_for_generate``).
    """
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return Reach(window) if window is not None else Reach(chunk=chunk)
    by_kind = {
        "sliding_attention": Reach(window),
        "chunked_attention": Reach(chunk=chunk),
        "indexed_attention": Reach(dense=True),
    }
    return {kind: by_kind.get(kind, Reach()) for one in dict.fromkeys(kinds) for kind in masks_of(one)}


def masks_of(kind: str) -> tuple[str, ...]:
    """The kinds of the masks that layers of a kind take: several for layers with a state and keys."""
    made = getattr(masking_utils, "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING", {}).get(kind)
    return tuple(made) if isinstance(made, dict) else (kind,)


# kinds whose layers take the padding mask [B, K] of a prompt and nothing in a step
RECURRENT = {"linear_attention", "conv", "mamba", "linear", "recurrent"}


@dataclass(frozen=True)
class Span:
    """Queries and entries of one call of the decoder, by their positions in the sequence of callers.

    Attributes:
        queries: int64 [B, Q].
        real: bool [B, Q], False for padding rows, or None.
        held: the entries with those of the call.
        before: positions in front of the call.
        total: positions with those of the call.
        mask: the padding mask of the caller, [B, T], or None: chunks are counted behind its padding.
        dtype: of the hidden states.
        additive: attention takes masks that are added to its logits.
        documents: of packed rows, which document each place belongs to, int64 [B, L]; they do not see each other.
    """

    queries: Tensor
    real: Tensor | None
    held: CachePositions
    before: int
    total: int
    mask: Tensor | None
    dtype: torch.dtype
    additive: bool
    documents: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.queries.shape[1]

    def columns(self) -> tuple[Tensor, Tensor | None]:
        """Positions of all entries, and which are real, [B, T]."""
        return self.held.columns(int(self.total))

    def sees_all(self, reach: Reach) -> bool:
        """Tell whether no window or chunk ends within the sequence."""
        return not reach.ends(int(self.total))

    def cut(self, mask: Tensor, first: int, count: int) -> Tensor:
        """Rows and columns of a mask with a row per place of the call and a column per position, [B, 1 or H, Q, count]."""
        columns, seen = self.held.shown(first, count, mask.shape[3])
        if self.real is not None or mask.shape[2] != self.rows:
            mask = gather_along(mask, self.queries - self.before, 2)
        mask = gather_along(mask, columns, 3)
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask if seen is None else mask.masked_fill(~seen[:, None, None], low)
        if self.real is None:
            return mask
        return mask.masked_fill(self._own(first, count), True if mask.dtype == torch.bool else 0.0)

    def made(self, reach: Reach, first: int, count: int) -> Tensor:
        """A causal mask, bool or additive, [B, 1, Q, count]."""
        columns, seen = self.held.shown(first, count, None)
        back = self.queries[:, :, None] - columns[:, None]  # [B, Q, count]
        mask = back >= 0
        if reach.window is not None:
            mask = mask & (back < reach.window)
        if reach.chunk is not None:
            behind = 0 if self.mask is None else (self.mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # [B, 1]
            chunks = (self.queries - behind) // reach.chunk, (columns - behind) // reach.chunk
            mask = mask & (chunks[0][:, :, None] == chunks[1][:, None])
        if self.documents is not None:
            own, others = (self.documents.gather(1, place) for place in (self.queries, columns))
            mask = mask & (own[:, :, None] == others[:, None])
        mask = (mask if seen is None else mask & seen[:, None]).unsqueeze(1)
        mask = mask if self.real is None else mask | self._own(first, count)
        if not self.additive:
            return mask
        zero = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        return zero.masked_fill_(~mask, torch.finfo(self.dtype).min)

    def _own(self, first: int, count: int) -> Tensor:
        """Padding rows and their own entries, bool [B, 1, Q, count]: a row that sees nothing would be NaN."""
        assert self.real is not None
        place = torch.arange(first, first + count, device=self.queries.device)
        start = self.held.index.shape[1] - self.queries.shape[1]
        own = place == torch.arange(start, start + self.queries.shape[1], device=place.device).unsqueeze(1)
        return own & ~self.real[:, None, :, None]


def real_tokens(mask: Any, batch: int, count: int, before: int) -> Tensor | None:
    """Mark the tokens of a sequence that are no padding of the caller, bool [B, L]; None where no mask says.

    A mask of attention shows it on its diagonal: a real token sees itself.

    Args:
        mask: [B, T], [B or 1, 1 or H, L, T], a dictionary of such by kind of layer, or None.
        batch: B.
        count: L.
        before: positions in front of the sequence.
    """
    if isinstance(mask, Mapping):
        some = [one for one in mask.values() if isinstance(one, Tensor)]
        mask = some[0] if some else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedModelError(
            f"an attention mask of type {type(mask).__name__} cannot be cut to the tokens that are left: load the model with "
            'attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    if mask.ndim == 2:
        own = (mask[:, before : before + count] if mask.shape[1] > count else mask).bool()
    else:
        own = lets_through(mask[:, 0, :, before : before + count].diagonal(dim1=-2, dim2=-1))
    return own.expand(batch, count)


def shown_before(mask: Any, batch: int, before: int) -> Tensor | None:
    """Mark the positions in front of a sequence that are no padding of the caller, bool [B, ``before``]; None: all."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if isinstance(one, Tensor) and one.ndim == 4), None)
    if not isinstance(mask, Tensor):
        return None
    seen = mask[..., :before]
    if mask.ndim == 4:
        seen = lets_through(seen)[:, 0].any(1)  # padding is seen by nobody
    seen = seen.bool().expand(batch, before)
    return None if bool(seen.all()) else seen


def documents(given: Mapping[str, Any], config: Any) -> Tensor | None:
    """Of a row into which several documents are packed, which one each place belongs to, int64 [B, L]; None: of no such row.

    The positions say so where nothing else masks: as transformers reads them (``find_packed_sequence_indices``).

    Args:
        given: arguments of the decoder.
        config: of the decoder.
    """
    ids = POSITIONS.read(given)
    if MASK.read(given) is not None or CACHE.read(given) is not None or not isinstance(ids, Tensor):
        return None
    if ids.ndim == 3 and ids.shape[0] != 4:  # positions of images alone
        return None
    cached = CACHING.read(given)
    if CACHING.get(config, True) if cached is None else cached:  # a cache is made, and nothing is kept apart
        return None
    text = ids if ids.ndim == 2 else ids[0]
    found = (text.diff(dim=-1, prepend=text[:, :1] - 1) != 1).cumsum(-1)
    return found if bool(found.any()) else None
