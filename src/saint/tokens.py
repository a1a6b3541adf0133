"""Who is still there: token maps, ragged batches, and every gather along the token axis.

The only module that indexes tokens. Letters: B batch, N candidate slots, P protected prefix tokens, K survivors of the
longest sample, C channels. A *slot* is a position in the current, shortened sequence; an *index* is the candidate's
position in the original one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def reads_are_free(device: torch.device) -> bool:
    """Whether a look at a tensor's values costs no wait for the device; where it does, only what must be known is read."""
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
        lengths = (count,) * batch if valid is None else tuple(valid.sum(1).tolist())
        return TokenMap(index, lengths, lengths, count, valid)

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    @property
    def whole(self) -> bool:
        """Nobody has been dropped from any sample."""
        return self.lengths == self.total

    def kept(self) -> list[Tensor]:
        """Original indices of the survivors, ascending; B int64 tensors."""
        if self.valid is None:
            return list(self.index.unbind(0))
        return [row[ok] for row, ok in zip(self.index, self.valid, strict=True)]

    def select(self, selection: "Selection") -> "TokenMap":
        """The map after ``selection``."""
        return TokenMap(
            self.index.gather(1, selection.slots), selection.lengths, self.total, self.width, selection.valid
        )


@dataclass(frozen=True)
class Selection:
    """Which slots stay: int64 [B, K] ascending within the first ``lengths[b]``, then padding.

    Of merging methods, ``owner`` says for each current slot which new slot it becomes part of, int64 [B, N].
    """

    slots: Tensor
    lengths: tuple[int, ...]
    valid: Tensor | None = None
    owner: Tensor | None = None

    @staticmethod
    def merging(into: Tensor, lengths: tuple[int, ...], current: TokenMap) -> "Selection":
        """Every slot becomes part of slot ``into`` [B, N], a survivor itself; survivors name themselves."""
        keep = into == torch.arange(into.shape[1], device=into.device)
        keep = keep if current.valid is None else keep & current.valid
        stay = Selection.from_mask(keep, lengths)
        owner = (keep.cumsum(1) - 1).clamp_min(0).gather(1, into)
        return Selection(stay.slots, lengths, stay.valid, owner)

    @staticmethod
    def from_mask(keep: Tensor, lengths: tuple[int, ...]) -> "Selection":
        """From a bool mask [B, N] with ``lengths[b]`` True in row b."""
        even = min(lengths) == max(lengths)
        if even and reads_are_free(keep.device):
            return Selection(keep.nonzero()[:, 1].view(keep.shape[0], -1), lengths)  # no sort, and no sync to fear
        slots = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[:, : max(lengths)]
        if even:
            return Selection(slots, lengths)
        return Selection(slots, lengths, leading(lengths, slots.shape[1], keep.device))

    @staticmethod
    def from_order(order: Tensor, drop: tuple[int, ...], current: TokenMap) -> "Selection":
        """Drop the first ``drop[b]`` slots of ``order[b]``.

        Args:
            order: slots, most droppable first, int64 [B, S]; padding slots only behind real ones.
            drop: tokens to drop per sample.
            current: the map the slots refer to.
        """
        lengths = tuple(n - r for n, r in zip(current.lengths, drop, strict=True))
        if current.valid is None:
            keep = torch.ones(order.shape[0], current.slots, dtype=torch.bool, device=order.device)
        else:
            keep = current.valid.clone()
        if min(drop) == max(drop):
            keep.scatter_(1, order[:, : drop[0]], False)
        else:
            go = leading(drop, order.shape[1], order.device)
            keep &= torch.ones_like(keep).scatter_(1, order, ~go)
        return Selection.from_mask(keep, lengths)

    @staticmethod
    def from_scores(score: Tensor, lengths: tuple[int, ...], current: TokenMap) -> "Selection":
        """Keep the ``lengths[b]`` highest scores of row b; of equal scores the earlier slot stays.

        Args:
            score: [B, N], any dtype that sorts.
            lengths: survivors per sample, at most ``current.lengths``.
            current: the map the slots refer to.
        """
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        if current.valid is not None:  # padding behind everything real
            padded = (~current.valid).gather(1, order).to(torch.uint8)
            order = order.gather(1, torch.sort(padded, dim=1, stable=True).indices)
        if min(lengths) == max(lengths):
            keep = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
            return Selection.from_mask(keep.scatter_(1, order[:, : lengths[0]], True), lengths)
        stay = leading(lengths, order.shape[1], order.device)
        return Selection.from_mask(torch.empty_like(stay).scatter_(1, order, stay), lengths)


@dataclass(frozen=True)
class Groups:
    """Tokens that a merger behind the encoder joins into one: they stay and go together, and a method votes on groups.

    Attributes:
        map: the groups that are still there, B samples.
        members: original index of each group's tokens in their sequence, int64 [B, G, M]. In a packed encoder all samples
            lie in one sequence; otherwise each has its own.
    """

    map: TokenMap
    members: Tensor

    def slots(self, tokens: TokenMap) -> Tensor:
        """Where the members of each group slot are in the flattened sequences.

        Args:
            tokens: the map of the sequences, [B or 1, S].

        Returns:
            int64 [B, K, M] into B * S (packed: 1 * S) rows; padding slots hold any valid row.
        """
        sequences, count = tokens.index.shape
        index = tokens.index if tokens.valid is None else tokens.index.masked_fill(~tokens.valid, tokens.width)
        where = index.new_zeros(sequences, tokens.width + 1)
        where.scatter_(1, index, torch.arange(sequences * count, device=index.device).view(sequences, count))
        members = self.members.gather(1, self.map.index.unsqueeze(-1).expand(-1, -1, self.members.shape[2]))
        return where.expand(members.shape[0], -1).gather(1, members.flatten(1)).view_as(members)

    def select(self, selection: Selection, slots: Tensor, tokens: TokenMap) -> "tuple[Groups, Selection]":
        """The groups after ``selection``, and what it means for the tokens.

        Args:
            selection: of group slots.
            slots: see :meth:`slots`.
            tokens: the map of the sequences.
        """
        size = self.members.shape[2]
        chosen = slots.gather(1, selection.slots.unsqueeze(-1).expand(-1, -1, size))
        keep = torch.zeros(tokens.index.numel() + 1, dtype=torch.bool, device=slots.device)
        if selection.valid is not None:
            chosen = chosen.masked_fill(~selection.valid.unsqueeze(-1), tokens.index.numel())
        keep = keep.index_fill(0, chosen.flatten(), True)[:-1].view_as(tokens.index)
        lengths = tuple(n * size for n in selection.lengths)
        lengths = lengths if len(lengths) == keep.shape[0] else (sum(lengths),)
        return Groups(self.map.select(selection), self.members), Selection.from_mask(keep, lengths)


def square_groups(batch: int, count: int, side: int, device: torch.device) -> Groups:
    """Groups of ``side`` x ``side`` neighbours on a square grid of ``count`` patches, row by row.

    Raises:
        ValueError: the grid is not square, or not a multiple of ``side``.
    """
    edge = math.isqrt(count)
    if edge * edge != count or edge % side:
        raise ValueError(
            f"{count} patches are joined in groups of {side} x {side}, so their grid must be square with sides that are a "
            f"multiple of {side}: resize the images as the model's processor does"
        )
    cells = torch.arange(count, device=device).view(edge // side, side, edge // side, side)
    members = cells.transpose(1, 2).reshape(-1, side * side)
    return Groups(TokenMap.full(batch, len(members), device), members.expand(batch, -1, -1))


def packed_groups(lengths: list[int], size: int, order: Tensor | None, device: torch.device) -> Groups:
    """Groups of ``size`` consecutive tokens in a packed sequence.

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
    members = place.unsqueeze(-1) * size + torch.arange(size, device=device)
    valid = None if min(counts) == most else leading(counts, most, device)
    return Groups(TokenMap.full(len(counts), most, device, valid), members)


@dataclass(frozen=True)
class Candidates:
    """What a method may look at, at one drop point.

    Attributes:
        keys: attention keys averaged over heads, [B, N, D], the layer's dtype.
        features: the candidates' residual stream, [B, N, C].
        tokens: who they are; ``tokens.valid`` masks padding.
        step: this is drop point ``step`` (0-based) of ``steps`` of the stage.
        steps: drop points of the stage.
        attention: for methods that need "last_query": attention of the last prompt token at this layer, averaged over heads,
            float32 [B, N]; else None.
    """

    keys: Tensor
    features: Tensor
    tokens: TokenMap
    step: int
    steps: int
    attention: Tensor | None = None


@dataclass(frozen=True)
class LayerTrace:
    """What happened at one drop point of one forward.

    Attributes:
        stage: "vision", "connector" or "language".
        layer: 0-based layer of the drop point.
        tokens_in: candidates before, int64 [B] (protected tokens not counted).
        tokens_out: candidates after, int64 [B].
        kept: B int64 tensors, original candidate indices (0-based), ascending.
        into: of merging methods, B int64 tensors: for each original candidate the one of ``kept`` it is part of by now.
    """

    stage: str
    layer: int
    tokens_in: Tensor
    tokens_out: Tensor
    kept: list[Tensor] = field(repr=False)
    into: list[Tensor] | None = field(default=None, repr=False)


def leading(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """True at the first ``counts[b]`` places: bool [B, width], or [width] where all counts are equal (nothing is copied)."""
    places = torch.arange(width, device=device)
    if min(counts) == max(counts):
        return places < counts[0]
    return places < torch.tensor(counts, device=device).unsqueeze(1)


def gather_tokens(x: Tensor, slots: Tensor, prefix: int) -> Tensor:
    """Keep the prefix and the given candidate slots.

    Args:
        x: [B, P + N, C].
        slots: int64 [B, K] into the N candidates.
        prefix: P.

    Returns:
        [B, P + K, C].
    """
    batch, count, channels = x.shape
    rows = slots + prefix
    if prefix:
        rows = torch.cat([torch.arange(prefix, device=x.device).expand(batch, prefix), rows], 1)
    if batch == 1:
        return x.index_select(1, rows[0])
    # one row-wise copy instead of an element-wise gather with an expanded index
    rows = rows + torch.arange(0, batch * count, count, device=x.device).unsqueeze(1)
    return x.reshape(batch * count, channels).index_select(0, rows.reshape(-1)).view(batch, -1, channels)


def merge_tokens(x: Tensor, sizes: Tensor, selection: Selection, prefix: int) -> tuple[Tensor, Tensor]:
    """Keep the prefix, and average the candidates that become one, weighted by what they stand for.

    Args:
        x: [B, P + N, C].
        sizes: original candidates in each slot, float [B, N]; 0 for padding.
        selection: with ``owner``.
        prefix: P.

    Returns:
        [B, P + K, C], and the new sizes [B, K]. A token nothing was merged into is exactly as before.
    """
    owner = selection.owner
    assert owner is not None
    batch, kept = selection.slots.shape
    total = sizes.new_zeros(batch, kept).scatter_add(1, owner, sizes)
    dtype = torch.promote_types(x.dtype, torch.float32)
    share = sizes.to(dtype) / total.to(dtype).gather(1, owner).clamp_min(1)
    body = x[:, prefix:] * share.unsqueeze(-1)
    rows = owner.unsqueeze(-1).expand_as(body)
    merged = body.new_zeros(batch, kept, x.shape[2]).scatter_add(1, rows, body).to(x.dtype)
    return torch.cat([x[:, :prefix], merged], 1), total


def gather_entries(x: Tensor, slots: Tensor) -> Tensor:
    """Keep entries of cached keys or values: x [B, H, N, D], slots int64 [B, K] -> [B, H, K, D]."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def gather_table(table: Tensor, tokens: TokenMap) -> Tensor:
    """Rows of a positional table (RoPE) for the survivors.

    Args:
        table: [N, D], or [H, N, D] when every head has its own, or [B, 1 or H, N, D] when every sample has.
        tokens: the survivors.

    Returns:
        [B, 1, K, D] or [B, H, K, D]; for one sample the batch axis is left out.
    """
    if table.ndim == 4:
        rows = tokens.index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.expand(tokens.index.shape[0], -1, -1, -1).gather(2, rows)
    if tokens.index.shape[0] == 1:
        return table.index_select(-2, tokens.index[0])
    if table.ndim == 2:
        return table[tokens.index].unsqueeze(1)
    return table[:, tokens.index].transpose(0, 1)


def gather_mask(mask: Tensor, tokens: TokenMap, prefix: int) -> Tensor:
    """The attention mask of the survivors: rows and columns of the original one.

    Args:
        mask: bool (True = attend) or additive float, [B or 1, heads or 1, Q or 1, P + N].

    Returns:
        [B, heads or 1, Q' or 1, P + K].
    """
    batch = tokens.index.shape[0]
    rows = torch.arange(prefix, device=mask.device).expand(batch, prefix)
    rows = torch.cat([rows, tokens.index + prefix], 1)  # [B, P + K]
    mask = mask.expand(batch, *mask.shape[1:])
    columns = rows[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(-1, columns)
    if mask.shape[2] == prefix + tokens.width:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask


def visible(tokens: TokenMap, prefix: int) -> Tensor | None:
    """Which keys may be attended to: bool [B, P + K] (True = real), or None when nothing is padded."""
    if tokens.valid is None:
        return None
    head = tokens.valid.new_ones(tokens.valid.shape[0], prefix)
    return torch.cat([head, tokens.valid], 1)


def fill_padding(x: Tensor, tokens: TokenMap, prefix: int, *, with_prefix: bool = False) -> Tensor:
    """Overwrite padding rows with the mean of the real ones, so that an average pool is unchanged by them.

    Args:
        x: [B, P + K, C].
        tokens: the survivors.
        prefix: P.
        with_prefix: the pool also averages the prefix tokens.
    """
    if tokens.valid is None:
        return x
    head, body = x[:, :prefix], x[:, prefix:]
    real = tokens.valid.unsqueeze(-1)
    total = torch.where(real, body, 0).sum(1, keepdim=True)
    count = real.sum(1, keepdim=True)
    if with_prefix:
        total, count = total + head.sum(1, keepdim=True), count + prefix
    return torch.cat([head, torch.where(real, body, total / count.clamp_min(1))], 1)


# fills the rows of features that an encoder dropped, on their way through a model that expects full length: finite, and no
# row of real features has the same number in every channel. Copies, dtypes and scaling leave such a row recognisable.
DROPPED = 2.0**-10


def is_dropped(x: Tensor) -> Tensor:
    """Rows of :data:`DROPPED`, also after scaling: x [..., C] -> bool [...]."""
    first = x[..., :1]
    return (x == first).all(-1) & (first[..., 0] != 0)


def full_length(x: Tensor, tokens: TokenMap, prefix: int, fill_value: float) -> Tensor:
    """Every survivor back at its place, ``fill_value`` in the rows of the others.

    Args:
        x: [B, P + K, C].
        tokens: the survivors.
        prefix: P.
        fill_value: fills the rows of dropped tokens.

    Returns:
        [B, P + N, C].
    """
    index = tokens.index if tokens.valid is None else tokens.index.masked_fill(~tokens.valid, tokens.width)
    full = x.new_full((x.shape[0], prefix + tokens.width + 1, x.shape[2]), fill_value)
    full[:, :prefix] = x[:, :prefix]
    return full.scatter(1, (index + prefix).unsqueeze(-1).expand(-1, -1, x.shape[2]), x[:, prefix:])[:, :-1]


def shorter(ends: Tensor, tokens: TokenMap) -> Tensor:
    """Cumulative lengths of the segments of a packed sequence, counting survivors only; segments that are empty go.

    Args:
        ends: int [segments + 1], from 0 to N.
        tokens: of the one sequence.
    """
    here = torch.nn.functional.pad((~dropped(tokens)[0]).cumsum(0), (1, 0))
    return torch.unique_consecutive(here[ends.long()]).to(ends.dtype)


def dropped(tokens: TokenMap) -> Tensor:
    """Which original tokens are gone, bool [B, N]."""
    index = tokens.index if tokens.valid is None else tokens.index.masked_fill(~tokens.valid, tokens.width)
    gone = torch.ones(index.shape[0], tokens.width + 1, dtype=torch.bool, device=index.device)
    return gone.scatter_(1, index, False)[:, :-1]


def nearest_survivor(tokens: TokenMap, grid: tuple[int, int]) -> Tensor:
    """For each cell of the original grid, the slot of the survivor closest to it on the grid.

    Args:
        tokens: the survivors.
        grid: (rows, columns) of the patch grid; rows * columns = ``tokens.width``.

    Returns:
        int64 [B, N]; ties go to the earlier survivor.
    """
    cells = torch.arange(tokens.width, device=tokens.index.device)
    place = torch.stack([cells // grid[1], cells % grid[1]], 1).float()  # [N, 2]
    distance = torch.cdist(place, place[tokens.index], compute_mode="donot_use_mm_for_euclid_dist")  # [B, N, K]
    if tokens.valid is not None:
        distance = distance.masked_fill(~tokens.valid[:, None], torch.inf)
    return distance.argmin(-1)


def similar_survivor(points: Tensor, selection: Selection) -> Tensor:
    """For each current slot, the new slot of the survivor with the most similar key (itself for a survivor).

    Args:
        points: unit metric of the current slots, [B, N, D] (see ``graph.metric``).
        selection: who stays.

    Returns:
        int64 [B, N] into the new slots.
    """
    batch, count, dim = points.shape
    survivors = points.gather(1, selection.slots.unsqueeze(-1).expand(-1, -1, dim))
    similarity = points @ survivors.mT
    if selection.valid is not None:
        similarity = similarity.masked_fill(~selection.valid[:, None], -torch.inf)
    owner = similarity.argmax(-1)
    new = torch.arange(selection.slots.shape[1], device=points.device).expand(batch, -1)
    if selection.valid is None:
        return owner.scatter(1, selection.slots, new)
    # padding slots name tokens that went: they must not claim to be their own survivors
    own = torch.full((batch, count), -1, device=points.device, dtype=new.dtype)
    own = own.scatter(1, selection.slots, torch.where(selection.valid, new, -1))
    return torch.where(own >= 0, own, owner)
