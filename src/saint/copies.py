"""Which patches show what another one shows: copies, and patches of one colour. Pure tensor functions.

Letters: B batch, N candidate slots, V values of a patch, C channels.
"""

import torch
from torch import Tensor

from .frames import NONE

_BLOCK = 256  # rows whose distances are held at once
_SOME = 12  # values of a row that are compared first, about
_DENSE = 8  # where more than an eighth of the pairs may be near, all are compared at once
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def repeated(rows: Tensor, before: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Mark the rows that equal an earlier one of their sample, or the same place in the frame before: bool [B, N].

    Rows are sorted by a hash and compared with their neighbours, so what is marked is equal beyond doubt; a hash that two
    different rows share could at worst hide a copy.

    Args:
        rows: floats [B, N, V].
        before: see :func:`saint.frames.earlier`.
        valid: bool [B, N], False for padding.
    """
    rows = rows.detach() + 0.0  # -0.0 is 0.0
    hashes = _hashes(rows)
    if valid is None:
        order = torch.sort(hashes, dim=1, stable=True).indices  # of equal rows the earlier first
    else:  # and padding behind them
        ahead = torch.sort((~valid).to(torch.uint8), dim=1, stable=True).indices
        order = ahead.gather(1, torch.sort(hashes.gather(1, ahead), dim=1, stable=True).indices)
    sorted_rows = rows.gather(1, order.unsqueeze(-1).expand_as(rows))
    again = torch.zeros_like(order, dtype=torch.bool)
    again[:, 1:] = (sorted_rows[:, 1:] == sorted_rows[:, :-1]).all(-1)
    out = torch.zeros_like(again).scatter(1, order, again)
    if before is not None:
        past = rows.flatten(0, 1)[before.clamp_min(0)]
        out |= (rows == past).all(-1) & (before != NONE)
    return out if valid is None else out & valid


def _hashes(rows: Tensor) -> Tensor:
    """Numbers that equal rows share and others do not, but for accidents, int64 [B, N]."""
    bits = rows.view(_BITS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, rows.shape[-1:], generator=generator).to(rows.device)
    return (bits * weights).sum(-1)  # modulo 2**64: the same in any order, on any device


def close(rows: Tensor, tau: float, before: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Mark the rows of which no value differs by more than ``tau`` from one that stays: bool [B, N].

    Rows are taken in their order. One leaves if it is close to what stays for the same place in the frame before, or to what
    stays, anywhere, for an earlier row of its sample; whatever leaves is close to its own stand-in, so nothing drifts. With a
    ``tau`` of 0 this marks what :func:`repeated` marks.

    Args:
        rows: floats [B, N, V].
        tau: largest difference of a value.
        before: see :func:`saint.frames.earlier`.
        valid: bool [B, N], False for padding.
    """
    batch, count = rows.shape[:2]
    flat = rows.detach().flatten(0, 1).float()
    stands = torch.arange(batch * count, device=rows.device)  # for each slot the one that stays for it
    for sample in range(batch):
        first = sample * count
        slots = stands[first : first + count].clone()
        slots = slots if valid is None else slots[valid[sample]]
        if before is not None:
            past = before[sample].flatten()[slots - first]
            there = slots[past != NONE]
            kept = stands[past[past != NONE]]
            near = (flat[there] - flat[kept]).abs().amax(-1) <= tau
            stands[there[near]] = kept[near]
        for start in range(0, len(slots), _BLOCK):
            _stand(flat, stands, slots[:start], slots[start : start + _BLOCK], tau)
    return (stands != torch.arange(batch * count, device=rows.device)).view(batch, count)


def _stand(flat: Tensor, stands: Tensor, earlier: Tensor, block: Tensor, tau: float) -> None:
    """Decide on the slots of ``block``, behind the decided ``earlier`` ones of their sample; ``stands`` is written to."""
    anchors = stands[earlier].unique()
    for start in range(0, len(anchors), _BLOCK):
        free = block[stands[block] == block]
        some = anchors[start : start + _BLOCK]
        near = _near(flat[free], flat[some], tau)
        found = near.any(1)
        stands[free[found]] = some[near.to(torch.uint8).argmax(1)][found]
    own = stands[block]
    open_ = own == block
    # to what stands for an earlier one of the block; whether that one stays itself may be open still
    near = _near(flat[block], flat[own], tau)
    near = near.tril(-1) & open_.unsqueeze(1)
    anchored = ~open_
    while bool(open_.any()):
        found = (near & anchored).any(1) & open_
        stands[block[found]] = own[(near & anchored).to(torch.uint8).argmax(1)][found]
        open_ = open_ & ~found
        stays = open_ & ~(near & open_).any(1)
        anchored = anchored | stays
        open_ = open_ & ~stays


def _near(rows: Tensor, others: Tensor, tau: float) -> Tensor:
    """Tell of which pairs no value differs by more than ``tau``: [M, V] and [K, V] -> bool [M, K].

    Most pairs differ in a few values already; of the others all values are compared.
    """
    some = slice(None, None, max(1, rows.shape[1] // _SOME))
    near = torch.cdist(rows[:, some], others[:, some], p=torch.inf) <= tau
    row, other = near.nonzero(as_tuple=True)
    if len(row) * _DENSE > near.numel():
        return torch.cdist(rows, others, p=torch.inf) <= tau
    near[row, other] = (rows[row] - others[other]).abs().amax(-1) <= tau
    return near


def plain(values: Tensor) -> Tensor:
    """Mark the patches of one colour: values [B, N, C, V of a channel] -> bool [B, N]."""
    return (values == values[..., :1]).flatten(2).all(-1)


def in_blocks(
    marked: Tensor, colours: Tensor, index: Tensor, columns: Tensor, side: int, valid: Tensor | None = None
) -> Tensor:
    """Mark all but the first patch of each block of the grid whose patches are all marked and of one colour: bool [B, N].

    Args:
        marked: bool [B, N].
        colours: of each patch, [B, N, C].
        index: of each patch on its grid, row by row, int64 [B, N]; below N.
        columns: of the grid of each sample, int64 [B].
        side: of a block, in patches; at the rim of a grid blocks may be smaller.
        valid: bool [B, N], False for padding.
    """
    real = torch.ones_like(marked) if valid is None else valid
    columns, slots = columns.unsqueeze(1), torch.arange(marked.shape[1], device=marked.device).expand_as(index)
    block = index // columns // side * ((columns + side - 1) // side) + index % columns // side
    ahead = slots.masked_fill(~real, marked.shape[1] - 1)
    first = torch.full_like(slots, marked.shape[1] - 1).scatter_reduce(1, block, ahead, "amin").gather(1, block)
    alike = (colours == colours.gather(1, first.unsqueeze(-1).expand_as(colours))).all(-1) & marked | ~real
    whole = torch.ones_like(slots).scatter_reduce(1, block, alike.long(), "amin").gather(1, block)
    return whole.bool() & (first != slots) & real
