"""Token maps, selections and ragged batches.

Letters: B batch, N candidate slots, K survivors of the longest sample, C channels. A *slot* is a position in the current,
shortened sequence; an *index* is the candidate's position in the original one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .order import descending, true_places


def reads_are_free(device: torch.device) -> bool:
    """Tell whether a look at a tensor's values costs no wait for the device; where it does, only what must be known is read."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class TokenMap:
    """The survivors of one point in the network.

    Attributes:
        index: original candidate index of each slot, ascending, int64 [B, K]; padding slots hold any valid index.
        lengths: survivors per sample, B Python ints. Slots from ``lengths[b]`` on are padding.
        total: candidates of each sample before the first drop, B Python ints.
        width: candidate slots of the unpruned sequence (``max(total)`` plus the model's own padding).
        valid: bool [B, K], False for padding, or None when no sample is padded.
    """

    index: Tensor
    lengths: tuple[int, ...]
    total: tuple[int, ...]
    width: int
    valid: Tensor | None = None

    @staticmethod
    def full(batch: int, count: int, device: torch.device, valid: Tensor | None = None) -> "TokenMap":
        """Everything still there; ``valid`` [B, count] marks the model's own padding."""
        index = torch.arange(count, device=device).expand(batch, count)
        if valid is not None:
            lengths = tuple(valid.sum(1).tolist())
        else:
            # torch.export with a batch of any size: one length for all samples, since there is no tuple of unknown length
            lengths = (count,) * (1 if torch.compiler.is_exporting() else batch)
        return TokenMap(index, lengths, lengths, count, valid)

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    @property
    def nothing_dropped(self) -> bool:
        """Tell whether no token of any sample has been dropped."""
        return self.lengths == self.total

    @property
    def real(self) -> Tensor:
        """Return which slots are no padding, bool [B, K]."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    @property
    def here(self) -> Tensor:
        """Return which of the original places are survivors, bool [B, width]."""
        return Selection(self.index, self.lengths, self.valid).mask(self.width)

    def kept(self) -> list[Tensor]:
        """Original indices of the survivors, ascending; B int64 tensors."""
        if self.valid is None:
            return list(self.index.unbind(0))
        return [row[ok] for row, ok in zip(self.index, self.valid, strict=True)]

    def select(self, selection: "Selection") -> "TokenMap":
        """The map after ``selection``."""
        # as many slots as there were candidates: each has its own index, and nothing is to be looked up
        first = self.valid is None and self.index.shape[1] == self.width
        index = selection.slots if first else self.index.gather(1, selection.slots)
        return TokenMap(index, selection.lengths, self.total, self.width, selection.valid)


@dataclass(frozen=True)
class Selection:
    """Which slots stay: int64 [B, K] ascending within the first ``lengths[b]``, then padding.

    Of merging methods, and of smaller pictures, ``owner`` says for each current slot which new slot it becomes part of, int64
    [B, N]; where a merging method also drops, ``gone`` marks what becomes part of none, whatever ``owner`` says of it, bool
    [B, N]. In the connector stage ``adds`` says what is added to the embedding of each that stays, as weights of the embeddings
    of all candidates, float32 [B, K, N]; 0 at padding.
    """

    slots: Tensor
    lengths: tuple[int, ...]
    valid: Tensor | None = None
    owner: Tensor | None = None
    adds: Tensor | None = None
    gone: Tensor | None = None

    def merges(self, sample: int) -> bool:
        """Tell whether what leaves in a sample becomes part of what stays."""
        return self.owner is not None and (self.gone is None or not bool(self.gone[sample].any()))

    def mask(self, count: int) -> Tensor:
        """bool [B, N], True for the slots that stay, of ``count``."""
        slots = self.slots if self.valid is None else self.slots.masked_fill(~self.valid, count)
        keep = torch.zeros(slots.shape[0], count + 1, dtype=torch.bool, device=slots.device)
        return keep.scatter_(1, slots, True)[:, :count]

    @staticmethod
    def merging(into: Tensor, lengths: tuple[int, ...], current: TokenMap) -> "Selection":
        """Every slot becomes part of slot ``into`` [B, N], a survivor itself; survivors name themselves."""
        keep = into == torch.arange(into.shape[1], device=into.device)
        keep = keep if current.valid is None else keep & current.valid
        stay = Selection.from_mask(keep, lengths)
        owner = (keep.cumsum(1) - 1).clamp_min(0).gather(1, into)
        return Selection(stay.slots, lengths, stay.valid, owner)

    @staticmethod
    def joining(leaves: Tensor, stays: Tensor, drop: tuple[int, ...], current: TokenMap) -> "Selection":
        """The first ``drop[b]`` slots of ``leaves[b]`` become part of those beside them in ``stays[b]``.

        Where such a one leaves too, they go where it goes.

        Args:
            leaves: slots, int64 [B, S], no slot twice in a row.
            stays: likewise; one that leaves becomes part of one that does not.
            drop: tokens that leave per sample.
            current: the map the slots refer to.
        """
        go = leading(drop, leaves.shape[1], leaves.device)
        into = torch.arange(current.slots, device=leaves.device).expand_as(current.index)
        into = into.scatter(1, leaves, torch.where(go, stays, leaves))
        into = into.gather(1, into)
        return Selection.merging(into, tuple(n - r for n, r in zip(current.lengths, drop, strict=True)), current)

    @staticmethod
    def from_mask(keep: Tensor, lengths: tuple[int, ...]) -> "Selection":
        """From a bool mask [B, N] with ``lengths[b]`` True in row b."""
        even, most = min(lengths) == max(lengths), max(lengths)
        if even and reads_are_free(keep.device):
            return Selection(keep.nonzero()[:, 1].view(keep.shape[0], -1), lengths)  # no sort, and no sync to fear
        if even and torch.compiler.is_exporting():
            return Selection(true_places(keep, most), lengths)
        first = torch.sort(keep.view(torch.uint8), dim=1, descending=True, stable=True)
        slots = first.indices[:, :most]  # [B, K]
        return Selection(slots, lengths) if even else Selection(slots, lengths, first.values[:, :most].view(torch.bool))

    @staticmethod
    def from_order(order: Tensor, drop: tuple[int, ...], current: TokenMap, *, stride: int = 1) -> "Selection":
        """Drop the first ``drop[b]`` slots of ``order[b]``.

        Args:
            order: slots, most droppable first, int64 [B, S]; padding slots only behind real ones.
            drop: tokens to drop per sample.
            current: the map the slots refer to.
            stride: ``order`` counts every ``stride``-th slot only.
        """
        lengths = tuple(n - r for n, r in zip(current.lengths, drop, strict=True))
        keep = all_but(order, drop, current.slots, current.valid, stride=stride)
        return Selection.from_mask(keep, lengths)

    @staticmethod
    def from_scores(score: Tensor, lengths: tuple[int, ...], current: TokenMap) -> "Selection":
        """Keep the ``lengths[b]`` highest scores of row b; of equal scores the earlier slot stays.

        Args:
            score: [B, N], any dtype that sorts.
            lengths: survivors per sample, at most ``current.lengths``.
            current: the map the slots refer to.
        """
        order = descending(score)
        if current.valid is not None:  # padding behind everything real
            padded = (~current.valid).gather(1, order).to(torch.uint8)
            order = order.gather(1, torch.sort(padded, dim=1, stable=True).indices)
        if min(lengths) == max(lengths):
            keep = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
            return Selection.from_mask(keep.scatter_(1, order[:, : lengths[0]], True), lengths)
        stay = leading(lengths, order.shape[1], order.device)
        return Selection.from_mask(torch.empty_like(stay).scatter_(1, order, stay), lengths)


@dataclass(frozen=True)
class Tower:
    """What the vision tower showed of each candidate. Where it joins squares of patches, means over their members.

    Attributes:
        shown: by what was asked for and 0-based layer, float32 [B, N, D]; D is 1 but for keys.
        depth: layers of the tower.
        read: the layer behind which the language model's features are read.
        place: of the candidate in its picture, row by row, int64 [B, N].
        grid: rows and columns of its picture, int64 [B, N, 2]; 0: not known.
        prefix: protected tokens in front of the tower's patches; 0: it has no class token.
    """

    shown: Mapping[tuple[str, int], Tensor]
    depth: int
    read: int
    place: Tensor
    grid: Tensor
    prefix: int

    def attention(self, what: str, layer: int) -> Tensor:
        """Attention that the candidates get at a layer, float32 [B, N]."""
        return self.shown[what, layer].squeeze(-1)

    def __getitem__(self, rows: Any) -> "Tower":
        """Those of some candidates: ``rows`` index the samples, or samples and slots."""
        shown = {what: value[rows] for what, value in self.shown.items()}
        return replace(self, shown=shown, place=self.place[rows], grid=self.grid[rows])


@dataclass(frozen=True)
class Facts:
    """What a forward knows of its candidates, whatever their keys and features are; None where it does not.

    A new fact is a field here, is noted where it is known (``vision.inputs``, ``language.doorway``), and read by a method.

    Attributes:
        columns: of the grid that ``TokenMap.index`` counts along, row by row.
        min_keep: tokens of each sample that stay whatever the budget, B Python ints.
        cells: for methods that need "frames": equal numbers show the same place of one video at different times, in the order
            of samples and slots, int64 [B, N]; -1: of no video. None where no candidate is of a video of several frames.
        pixels: for methods that need "pixels", of each candidate as the model is given them, by channel, [B, N, C, V]; all
            values in one (C = 1) where it is not known which are of which, and the method does not need "channels".
        grids: for the same methods and those that need "resized", rows and columns of the candidates of each sample.
        text: for methods that need "text", embeddings of the other tokens of each prompt, [B, T, C]; rows of 0 behind the last.
        tower: for methods that need something of :data:`saint.needs.TOWER`.
    """

    columns: int | None = None
    min_keep: tuple[int, ...] | None = None
    cells: Tensor | None = None
    pixels: Tensor | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    text: Tensor | None = None
    tower: Tower | None = None

    def at(self, index: Tensor) -> "Facts":
        """Those of the candidates that are left, of all the original ones: index int64 [B, K]."""
        if self.cells is None and self.pixels is None and self.tower is None:
            return self
        rows = torch.arange(len(index), device=index.device).unsqueeze(1), index
        cells, pixels = (None if one is None else one[rows] for one in (self.cells, self.pixels))
        return replace(self, cells=cells, pixels=pixels, tower=None if self.tower is None else self.tower[rows])

    def of_samples(self, samples: list[int]) -> "Facts":
        """Those of these samples alone."""
        min_keep = None if self.min_keep is None else tuple(self.min_keep[i] for i in samples)
        grids = None if self.grids is None else tuple(self.grids[i] for i in samples)
        cells, pixels, text = (None if one is None else one[samples] for one in (self.cells, self.pixels, self.text))
        return Facts(
            self.columns, min_keep, cells, pixels, grids, text, None if self.tower is None else self.tower[samples]
        )


@dataclass(frozen=True)
class Candidates:
    """What a method may look at, at one drop point.

    Attributes:
        keys: attention keys averaged over heads, [B, N, D], the layer's dtype.
        features: the candidates' residual stream, [B, N, C].
        tokens: token map of the candidates; ``tokens.valid`` masks padding.
        step: this is drop point ``step`` (0-based) of ``steps`` of the stage.
        steps: drop points of the stage.
        attention: for methods that need "last_query": attention of the last prompt token at this layer, averaged over heads,
            float32 [B, N]; else None.
        facts: what else the forward knows of them.
        rows: for methods that need the attention of other tokens, by the name under ``needs``, float32 [B, N] each, averaged over
            heads and tokens: of the text behind the visual tokens ("question"), of its first token ("first_query"), of those of
            its tokens that the visual tokens are nearest to ("raters"; :class:`saint.methods.SparseVLM`). Inside an encoder what
            the layer shows of each, by the names in :data:`saint.needs.TOWER_ATTENTION`.
    """

    keys: Tensor
    features: Tensor
    tokens: TokenMap
    step: int
    steps: int
    attention: Tensor | None = None
    facts: Facts = field(default_factory=Facts)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerTrace:
    """What happened at one drop point of one forward.

    Attributes:
        stage: "vision", "connector" or "language".
        layer: 0-based layer of the drop point.
        tokens_in: candidates before, int64 [B] (protected tokens not counted).
        tokens_out: candidates after, int64 [B].
        kept: B int64 tensors, original candidate indices (0-based), ascending.
        into: of merging methods and smaller pictures, B int64 tensors: for each original candidate the one of ``kept`` it is
            part of by now; -1 where it is part of none.
        placement: tokens left "input": in front of ``layer``, "mid": between its attention and its MLP, "post": behind it.
        group: 0-based number of the plan's stage in its slot.
        adds: in the connector stage, of methods that change what stays, B float32 tensors [kept, original candidates]: weights
            of the embeddings that were added to each of ``kept``.
    """

    stage: str
    layer: int
    tokens_in: Tensor
    tokens_out: Tensor
    kept: list[Tensor] = field(repr=False)
    into: list[Tensor] | None = field(default=None, repr=False)
    placement: str = "post"
    group: int = 0
    adds: list[Tensor] | None = field(default=None, repr=False)


def all_but(order: Tensor, drop: Sequence[int], count: int, valid: Tensor | None = None, *, stride: int = 1) -> Tensor:
    """Mark what stays of ``count`` slots without the first ``drop[b]`` of ``order[b]``: bool [B, N].

    See ``Selection.from_order``.
    """
    keep = order.new_ones(order.shape[0], count, dtype=torch.bool) if valid is None else valid.clone()
    some = keep[:, ::stride]  # a view
    if min(drop) == max(drop):
        some.scatter_(1, order[:, : drop[0]], False)
        return keep
    some.scatter_(1, order, leading(drop, order.shape[1], order.device, value=False))
    return keep if valid is None else keep & valid  # padding is last in ``order``


def leading(counts: Sequence[int], width: int, device: torch.device, *, value: bool = True) -> Tensor:
    """``value`` at the first ``counts[b]`` places: bool [B, width], or [width] where all counts are equal (nothing is copied)."""
    if min(counts) == max(counts):
        places = torch.arange(width, device=device)
        return places < counts[0] if value else places >= counts[0]
    # counts are copied to the device anyway: what is made of them here takes no launch there
    first = np.arange(width) < np.array(counts)[:, None]
    return torch.from_numpy(first if value else ~first).to(device)


def highest(score: Tensor, counts: Sequence[int], among: Tensor) -> Tensor:
    """Mark the ``counts[b]`` highest scores of each sample, of equal ones the earlier: bool [B, N].

    Args:
        score: [B, N].
        counts: B numbers, 0 or more.
        among: which may be marked, bool [B, N], at least as many.
    """
    order = descending(score.masked_fill(~among, -torch.inf))
    marked = leading(counts, order.shape[1], order.device).expand_as(order)
    return torch.zeros_like(among).scatter(1, order, marked)
