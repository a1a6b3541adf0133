"""Every gather along the token axis, and how full length comes back.

Letters: B batch, N candidate slots, P protected prefix tokens, K survivors of the longest sample, C channels. Slots and indices:
see :mod:`saint.tokens`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .tokens import Selection, TokenMap


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
    if not torch.compiler.is_exporting() and batch == 1:  # an exported graph may not ask for the size of its batch
        index = slots[0] + prefix if prefix else slots[0]  # [K]
        if prefix:
            index = torch.cat([torch.arange(prefix, device=x.device), index])  # [P + K]
        return x.index_select(1, index)
    # one copy of whole vectors instead of an element-wise gather with an expanded index
    first = torch.arange(prefix, prefix + batch * count, count, device=x.device).unsqueeze(1)  # candidates, [B, 1]
    if prefix == 1:
        slots = torch.nn.functional.pad(slots, (1, 0), value=-1)  # the slot in front of the first
    elif prefix:
        slots = torch.cat([torch.arange(-prefix, 0, device=x.device).expand(batch, prefix), slots], 1)
    return x.reshape(batch * count, channels).index_select(0, (slots + first).view(-1)).view(batch, -1, channels)


def merged_sizes(sizes: Tensor, selection: Selection) -> Tensor:
    """Count what each survivor stands for behind a merge: float [B, N] -> [B, K]."""
    assert selection.owner is not None
    return sizes.new_zeros(selection.slots.shape).scatter_add(1, selection.owner, _part(sizes, selection))


def _part(sizes: Tensor, selection: Selection) -> Tensor:
    """Sizes of what becomes part of a survivor, 0 of the others: float [B, N]."""
    return sizes if selection.gone is None else sizes.masked_fill(selection.gone, 0)


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
    total = merged_sizes(sizes, selection)
    dtype = torch.promote_types(x.dtype, torch.float32)
    share = _part(sizes, selection).to(dtype) / total.to(dtype).gather(1, owner).clamp_min(1)
    body = x[:, prefix:] * share.unsqueeze(-1)
    rows = owner.unsqueeze(-1).expand_as(body)
    merged = body.new_zeros(batch, kept, x.shape[2]).scatter_add(1, rows, body).to(x.dtype)
    return torch.cat([x[:, :prefix], merged], 1), total


def added(rows: Tensor, selection: Selection) -> Tensor:
    """Gather what stays, with what a selection adds to it: rows [B, N, C] -> [B, K, C].

    In at least float32; a token that nothing is added to is exactly as before.
    """
    assert selection.adds is not None
    dtype = torch.promote_types(rows.dtype, torch.float32)
    stay = gather_tokens(rows, selection.slots, 0)
    return (stay.to(dtype) + selection.adds.to(dtype) @ rows.to(dtype)).to(rows.dtype)


def gather_along(x: Tensor, index: Tensor, axis: int, samples: int = 0) -> Tensor:
    """Keep places along one axis of a tensor of any shape.

    Args:
        x: its axis ``samples`` is B or 1.
        index: int64 [B, K].
        axis: runs along the places, behind ``samples``; neither counts from the end.
        samples: runs along the samples.

    Returns:
        ``x`` with B samples, and K places along ``axis``.
    """
    shape, wide = [1] * x.ndim, list(x.shape)
    shape[samples], shape[axis] = index.shape
    wide[samples] = index.shape[0]
    x = x.expand(wide)
    wide[axis] = index.shape[1]
    return x.gather(axis, index.view(shape).expand(wide))


def gather_table(table: Tensor, tokens: TokenMap) -> Tensor:
    """Rows of a positional table (RoPE) for the survivors.

    Args:
        table: [N, D], or [H, N, D] when every head has its own, or [B, 1 or H, N, D] when every sample has.
        tokens: the survivors.

    Returns:
        [B, 1, K, D] or [B, H, K, D]; for one sample the batch axis is left out.
    """
    if table.ndim == 4:
        return gather_along(table, tokens.index, 2)
    if not torch.compiler.is_exporting() and tokens.index.shape[0] == 1:
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
    mask = gather_along(mask, rows, 3)
    return gather_along(mask, rows, 2) if mask.shape[2] == prefix + tokens.width else mask


def visible(tokens: TokenMap, prefix: int) -> Tensor | None:
    """Mark the keys that may be attended to: bool [B, P + K] (True = real), or None when nothing is padded."""
    if tokens.valid is None:
        return None
    return torch.nn.functional.pad(tokens.valid, (prefix, 0), value=True) if prefix else tokens.valid


def fill_padding(
    x: Tensor, tokens: TokenMap, prefix: int, *, with_prefix: bool = False, keys: Tensor | None = None
) -> Tensor:
    """Overwrite padding rows with the mean of the real ones, so that an average pool is unchanged by them.

    Args:
        x: [B, P + K, C].
        tokens: the survivors.
        prefix: P.
        with_prefix: the pool also averages the prefix tokens.
        keys: what :func:`visible` gives, where it is known.
    """
    if tokens.valid is None:
        return x
    # padding rows are finite, being copies of real ones
    total = torch.bmm(tokens.valid.unsqueeze(1).to(x.dtype), x[:, prefix:])  # [B, 1, C]
    more = prefix if with_prefix else 0
    total = total + x[:, :prefix].sum(1, keepdim=True) if more else total
    count = torch.tensor([max(1, n + more) for n in tokens.lengths], device=x.device).view(-1, 1, 1)
    keys = visible(tokens, prefix) if keys is None else keys
    assert keys is not None
    return torch.where(keys.unsqueeze(-1), x, total / count)


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
    here = torch.nn.functional.pad(tokens.here[0].cumsum(0), (1, 0))
    return torch.unique_consecutive(here[ends.long()]).to(ends.dtype)


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
        selection: the slots that stay.

    Returns:
        int64 [B, N] into the new slots.
    """
    batch, count, dim = points.shape
    survivors = points.gather(1, selection.slots.unsqueeze(-1).expand(-1, -1, dim))
    similarity = points @ survivors.mT
    if selection.valid is not None:
        similarity = similarity.masked_fill(~selection.valid[:, None], -torch.inf)
    nearest = similarity.argmax(-1)  # [B, N]
    new = torch.arange(selection.slots.shape[1], device=points.device).expand(batch, -1)
    if selection.valid is None:
        return nearest.scatter(1, selection.slots, new)
    # padding slots name tokens that went: they are not their own survivors
    own = torch.full((batch, count), -1, device=points.device, dtype=new.dtype)
    own = own.scatter(1, selection.slots, torch.where(selection.valid, new, -1))
    return torch.where(own >= 0, own, nearest)


def by_length(tokens: TokenMap, x: Tensor, run: Callable[[Tensor, TokenMap], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run samples of equal length together, without their padding, and put the results back in order.

    Args:
        tokens: the survivors, K of the longest sample.
        x: [B, P + K, C].
        run: takes some samples, [b, P + k, C], and their survivors.

    Returns:
        The results of ``run`` for all samples; those that keep the token axis are padded with zeros again.
    """
    if tokens.valid is None:  # all are equally long, however many: an exported graph has one length for all
        return run(x, tokens)
    groups: dict[int, list[int]] = {}
    for sample, length in enumerate(tokens.lengths):
        groups.setdefault(length, []).append(sample)
    head = x.shape[1] - tokens.slots
    order: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    for length, samples in groups.items():
        pick = torch.tensor(samples, device=x.device)
        total = tuple(tokens.total[i] for i in samples)
        # survivors come first in a row, so cutting the row cuts the padding
        short = TokenMap(tokens.index[pick, :length], (length,) * len(samples), total, tokens.width)
        missing = tokens.slots - length
        parts.append(
            tuple(
                torch.nn.functional.pad(y, (0, 0, 0, missing))
                if y.ndim == 3 and y.shape[1] in (length, head + length)
                else y
                for y in run(x[pick, : head + length], short)
            )
        )
        order += samples
    back = torch.argsort(torch.tensor(order, device=x.device))
    return tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))
