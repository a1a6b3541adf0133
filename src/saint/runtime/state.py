"""What is in front of a layer, and what one forward knows.

A :class:`LayerState` is a value: a layer takes one in and hands another on. A :class:`Forward` holds those of one forward.

Letters: B samples, Q sequences (B; 1 where all samples are packed into one sequence), S tokens of a sequence, N candidates of a
sample, M tokens that a candidate consists of, C channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import pad_sequence

from ..tokens import Facts, LayerTrace, Selection, TokenMap, leading


@dataclass(frozen=True)
class LayerState:
    """The tokens in front of a layer.

    Attributes:
        tokens: of the sequences, without protected prefix tokens.
        stage_total: candidates of each sample when the current stage began, B Python ints.
        subset: the candidates, where they are not simply all of ``tokens``: visual tokens of a prompt, or groups of patches.
        places: where the members of each of ``subset`` are in the flattened sequences, int64 [B, N, M] into Q * S rows; padding
            slots hold any row.
        sizes: merging: original candidates in each slot, float32 [B, N].
        merged_into: merging, and of smaller pictures: for each original candidate the slot it is part of, int64 [B, N of the
            beginning].
        gone: merging: original candidates that are part of no slot any more, bool [B, N of the beginning]; None: there are none.
        beta: merging: later attention adds beta * log(size) to the logits of a candidate's key.
        stand_ins: for each original candidate the slot that stands for it in a full-length map, int64 [B, N of the beginning].
        offsets: what is added to the row of a stand-in, in the residual stream, [B, N of the beginning, C]; None: nothing.
        adds: what was added to the candidates at the drop point in front of it, see :class:`saint.tokens.Selection`.
        full_length: the hidden states arrive at the length of the beginning although ``tokens`` are fewer.
    """

    tokens: TokenMap
    stage_total: tuple[int, ...]
    subset: TokenMap | None = None
    places: Tensor | None = None
    sizes: Tensor | None = None
    merged_into: Tensor | None = None
    gone: Tensor | None = None
    beta: float = 0.0
    stand_ins: Tensor | None = None
    offsets: Tensor | None = None
    adds: Tensor | None = None
    full_length: bool = False

    @property
    def candidates(self) -> TokenMap:
        """The map of what a method chooses from."""
        return self.tokens if self.subset is None else self.subset

    @property
    def counted(self) -> TokenMap:
        """The candidates, counted from the beginning of the current stage."""
        tokens = self.candidates
        return tokens if tokens.total == self.stage_total else replace(tokens, total=self.stage_total)

    @property
    def bare(self) -> "LayerState":
        """Return which tokens they are, without what only a layer that runs needs of them."""
        return replace(self, places=None, sizes=None, offsets=None)

    def of_candidates(self, x: Tensor) -> Tensor:
        """Rows of the candidates, means over their members: x [Q, S, C] -> [B, N, C]."""
        if self.places is None:
            return x
        rows = x.reshape(-1, x.shape[-1])[self.places]  # [B, N, M, C]
        return rows[:, :, 0] if rows.shape[2] == 1 else rows.mean(2)

    def after(self, selection: Selection, stand_in: Tensor | None = None) -> tuple["LayerState", Selection]:
        """The state behind a decision.

        Args:
            selection: of candidates.
            stand_in: for each current candidate the new slot that stands for it, int64 [B, N]; None: not asked for.

        Returns:
            The state, and which tokens of the sequences stay.
        """
        stand_ins = None if stand_in is None else _chain(self.stand_ins, stand_in)
        # what smaller pictures made one is dropped as one; of those that merge none is dropped
        merged_into, lost = None if selection.owner is None else _chain(self.merged_into, selection.owner), self.gone
        if selection.gone is not None:
            lost = _chain(self.merged_into, selection.gone)
            lost = lost if self.gone is None else lost | self.gone
        if self.places is None:
            tokens = self.tokens.select(selection)
            return replace(self, tokens=tokens, merged_into=merged_into, gone=lost, stand_ins=stand_ins), selection
        assert self.subset is not None
        sequences, count = self.tokens.index.shape
        size, end = self.places.shape[2], sequences * count
        here = self.tokens.valid
        keep = torch.ones(end + 1, dtype=torch.bool, device=self.places.device)  # one row more, for padding slots
        if here is not None:
            keep[:end] = here.flatten()
        rows = self.places if self.subset.valid is None else self.places.masked_fill(~self.subset.valid[..., None], end)
        stays = selection.mask(self.subset.slots).unsqueeze(-1).expand_as(rows)
        keep = keep.scatter(0, rows.flatten(), stays.flatten())[:end].view(sequences, count)
        gone = [(n - k) * size for n, k in zip(self.subset.lengths, selection.lengths, strict=True)]
        gone = gone if len(gone) == sequences else [sum(gone)]
        chosen = Selection.from_mask(keep, tuple(n - g for n, g in zip(self.tokens.lengths, gone, strict=True)))
        slots = chosen.slots + torch.arange(0, end, count, device=keep.device).unsqueeze(1)
        slots = slots if chosen.valid is None else slots.masked_fill(~chosen.valid, end)
        moved = torch.zeros(end + 1, dtype=torch.long, device=keep.device)
        moved.scatter_(0, slots.flatten(), torch.arange(slots.numel(), device=keep.device))
        places = moved[self.places.gather(1, selection.slots.unsqueeze(-1).expand(-1, -1, size))]
        state = replace(
            self,
            tokens=self.tokens.select(chosen),
            subset=self.subset.select(selection),
            places=places,
            merged_into=merged_into,
            gone=lost,
            stand_ins=stand_ins,
            adds=selection.adds,
        )
        return state, chosen

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Give what proportional attention adds to the logits of each token's key, [Q, S]; None when all weigh alike.

        Of at least float32 precision, whatever the dtype of the hidden states.
        """
        if self.sizes is None or not self.beta:
            return None
        bias = self.beta * self.sizes.to(torch.promote_types(dtype, torch.float32)).clamp_min(1).log()
        if self.places is None:
            return bias
        out = bias.new_zeros(self.tokens.index.numel() + 1)
        return out.scatter(0, self._real_places().flatten(), bias.flatten())[:-1].view(self.tokens.index.shape)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """``x`` [Q, S, C] with ``rows`` [B, N, C] at the places of the candidates (of one member each)."""
        flat = torch.cat([x.reshape(-1, x.shape[-1]), x.new_zeros(1, x.shape[-1])])
        return flat.index_put((self._real_places().flatten(),), rows.flatten(0, 1))[:-1].view_as(x)

    def _real_places(self) -> Tensor:
        """Places of candidates of one member, those of padding slots behind the last row, [B, N]."""
        assert self.places is not None
        assert self.subset is not None
        rows = self.places[..., 0]
        valid = self.subset.valid
        return rows if valid is None else rows.masked_fill(~valid, self.tokens.index.numel())


def _chain(earlier: Tensor | None, later: Tensor) -> Tensor:
    return later if earlier is None else later.gather(1, earlier)


@dataclass
class Forward:
    """What one forward knows; never shared between forwards.

    Attributes:
        origin: everything, in front of the first drop point; None in a forward in which nothing can go.
        states: by layer, the state in front of it; behind the last: the number of layers.
        drops: by slot, placement, layer and stage, the states in front of and behind a drop point, in the order of the forward.
        memo: tables and masks that layers share.
        facts: of the candidates of ``origin``; None before it is known, and when the forward is over.
    """

    origin: LayerState | None = None
    states: dict[int, LayerState] = field(default_factory=dict)
    drops: dict[tuple[str, str, int, int], tuple[LayerState, LayerState]] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    facts: Facts | None = None

    def once(self, name: str, make: Callable[[], Any], *sources: Any) -> Any:
        """``make()`` once for a name and what it is made from; layers behind one drop point share the result."""
        # dynamo of torch 2.11: no id(None); the sources are kept alive, so that the ids stay theirs
        key: list[Any] = [name]
        for source in sources:  # a loop: every layer of every step asks
            key.append(None if source is None else id(source))
        hit = self.memo.get(known := tuple(key))
        if hit is None:
            hit = self.memo[known] = (make(), sources)
        return hit[0]

    def told(self) -> Self:
        """Keep what the trace and full-length maps need of this forward when it is over: token maps, no activations."""
        return replace(
            self,
            origin=None if self.origin is None else self.origin.bare,
            states={layer: state.bare for layer, state in self.states.items()},
            drops={where: (before.bare, after.bare) for where, (before, after) in self.drops.items()},
            memo={},
            facts=None,
        )

    def trace(self) -> list[LayerTrace]:
        """One entry per drop point, in order."""
        out: list[LayerTrace] = []
        if any(isinstance(after.tokens.index, FakeTensor) for _, after in self.drops.values()):
            return out  # of an export: reading it would fix the batch size of the exported graph
        for (slot, placement, layer, group), (before, after) in self.drops.items():
            left = after.candidates
            into = None
            if after.merged_into is not None:
                part = left.index.gather(1, after.merged_into)
                into = list(part if after.gone is None else part.masked_fill(after.gone, -1))
            if into is not None and self.origin is not None and (real := self.origin.candidates.valid) is not None:
                into = [row[ok] for row, ok in zip(into, real, strict=True)]
            counts = torch.tensor(before.candidates.lengths), torch.tensor(left.lengths)
            adds = None if after.adds is None else _weights(before.candidates, left, after.adds)
            out.append(LayerTrace(slot, layer, *counts, left.kept(), into, placement, group, adds))
        return out


def _weights(before: TokenMap, left: TokenMap, adds: Tensor) -> list[Tensor]:
    """Weights of all original candidates from those that were there: adds [B, K, N] -> B tensors [kept, original]."""
    full = adds.new_zeros(*adds.shape[:2], before.width)
    full = full.scatter_add(2, before.index.unsqueeze(1).expand_as(adds), adds)  # 0 at padding
    return [one[:n] for one, n in zip(full, left.lengths, strict=True)]


# -- candidates that are not simply all tokens ------------------------------------------------------------------------


def all_tokens(sequences: int, count: int, device: torch.device, valid: Tensor | None = None) -> LayerState:
    """Every token is a candidate; ``valid`` [Q, S] marks the model's own padding."""
    tokens = TokenMap.full(sequences, count, device, valid)
    return LayerState(tokens, tokens.total)


def some_tokens(mask: Tensor, lengths: tuple[int, ...]) -> LayerState:
    """The tokens of ``mask`` [B, S], ``lengths[b]`` of them in row b, are the candidates."""
    batch, count = mask.shape
    picked = Selection.from_mask(mask, lengths)
    most = picked.slots.shape[1]
    index = torch.arange(most, device=mask.device).expand(batch, most)
    subset = TokenMap(index, lengths, lengths, most, picked.valid)
    rows = picked.slots + torch.arange(0, batch * count, count, device=mask.device).unsqueeze(1)
    return LayerState(TokenMap.full(batch, count, mask.device), lengths, subset, rows.unsqueeze(-1))


def packed_tokens(mask: Tensor, documents: Tensor, count: int | None = None) -> LayerState:
    """The tokens of ``mask`` [1, L] are the candidates, those of each document of the row a sample of their own.

    Args:
        mask: bool [1, L].
        documents: which document each token belongs to, ascending, int64 [1, L].
        count: of documents; None: as many as there are.

    Raises:
        ValueError: there are several rows.
    """
    if len(mask) != 1:
        raise ValueError(
            f"several documents are packed into each of {len(mask)} rows: pass all of them in one row, or each in a row of its "
            "own with an attention_mask"
        )
    count = int(documents[0, -1]) + 1 if count is None else count
    rows = documents.new_zeros(count, mask.shape[1], dtype=torch.bool)
    rows[documents[0], torch.arange(mask.shape[1], device=mask.device)] = mask[0]  # [D, L]
    lengths = tuple(rows.sum(1).tolist())
    apart = some_tokens(rows, lengths)
    assert apart.places is not None
    places = apart.places % mask.shape[1]
    return replace(apart, tokens=TokenMap.full(1, mask.shape[1], mask.device), places=places)


def grid_squares(rows: int, columns: int, side: int, device: torch.device | None = None) -> Tensor:
    """Cells of each square of ``side`` x ``side`` of a grid that lies row by row, int64 [squares, side * side]."""
    cells = torch.arange(rows * columns, device=device).view(rows // side, side, columns // side, side)
    return cells.transpose(1, 2).reshape(-1, side * side)


def squares(batch: int, count: int, side: int, device: torch.device) -> LayerState:
    """Groups of ``side`` x ``side`` neighbours on a square grid of ``count`` patches, row by row, are the candidates.

    Raises:
        ValueError: the grid is not square, or not a multiple of ``side``.
    """
    edge = math.isqrt(count)
    if edge * edge != count or edge % side:
        raise ValueError(
            f"{count} patches are joined in groups of {side} x {side}, so their grid must be square with sides that are a "
            f"multiple of {side}: resize the images as the model's processor does"
        )
    members = grid_squares(edge, edge, side, device)
    places = members + torch.arange(0, batch * count, count, device=device).view(-1, 1, 1)
    groups = TokenMap.full(batch, len(members), device)
    return LayerState(TokenMap.full(batch, count, device), groups.total, groups, places)


def packed_groups(lengths: list[int], size: int, order: Tensor | None, device: torch.device) -> LayerState:
    """Groups of ``size`` consecutive tokens of samples that are packed into one sequence are the candidates.

    Args:
        lengths: tokens of each sample, in the order of the sequence.
        size: M.
        order: for each place in the sequence, counted in groups, the group that stands there; None when in order.
        device: of the indices.
    """
    counts = [n // size for n in lengths]
    total = sum(counts)
    place = torch.arange(total, device=device) if order is None else torch.argsort(order.to(device))
    first = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device).unsqueeze(1)
    most = max(counts)
    place = place[(first + torch.arange(most, device=device)).clamp_max(total - 1)]  # [B, G]
    places = place.unsqueeze(-1) * size + torch.arange(size, device=device)
    valid = None if min(counts) == most else leading(counts, most, device)
    groups = TokenMap.full(len(counts), most, device, valid)
    return LayerState(TokenMap.full(1, sum(lengths), device), groups.total, groups, places)


def packed_squares(grids: list[tuple[int, int]], side: int, device: torch.device) -> LayerState:
    """Squares of ``side`` x ``side`` patches are the candidates, of grids that lie row by row in one sequence.

    Args:
        grids: rows and columns of patches of each sample.
        side: of the squares.
        device: of the indices.
    """
    starts = [sum(rows * columns for rows, columns in grids[:i]) for i in range(len(grids))]
    own = [start + grid_squares(*grid, side, device) for start, grid in zip(starts, grids, strict=True)]
    counts = [len(squares) for squares in own]
    most, total = max(counts), sum(rows * columns for rows, columns in grids)
    valid = None if min(counts) == most else leading(counts, most, device)
    groups = TokenMap.full(len(grids), most, device, valid)
    return LayerState(TokenMap.full(1, total, device), groups.total, groups, pad_sequence(own, batch_first=True))
