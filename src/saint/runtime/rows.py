"""Attention probabilities from the queries and keys of a layer, a block of queries at a time.

The layer's own attention stays as it is (fused, say). Here its rows are computed again and averaged over heads, and the N x N
matrix is never held.

Letters: B sequences, H heads, G key heads, Q queries, N keys, D head dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**19  # probabilities held at once over all heads (2 MiB, and as much again while they are made)


def rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int = BLOCK,
) -> Iterator[tuple[int, Tensor]]:
    """Attention probabilities ``mean_h softmax_j(scale q_i . k_j + mask_ij)``, in blocks of queries.

    Args:
        query: [B, H, Q, D].
        key: [B, G, N, D], H a multiple of G.
        scale: of the logits; None means 1 / sqrt(D).
        mask: broadcastable to [B, H, Q, N]; bool (True: may be attended to) or added to the logits.
        causal: query i sees the keys 0..i.
        block: numbers to hold at once.

    Yields:
        The first query of a block, and float32 [B, queries of the block, N]. Rows that see nothing are zero.
    """
    batch, heads, count, dim = query.shape
    groups, total = key.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    # one row is one block: an exported graph has any number of samples
    size = max(1, block // (batch * heads * total)) if count > 1 else 1
    keys, place = key.float().mT, torch.arange(total, device=key.device)
    for start in range(0, count, size):
        part = query[:, :, start : start + size].float() * scale
        # heads that share a key head lie one behind the other
        logits = (part.reshape(batch, groups, -1, dim) @ keys).view(batch, heads, -1, total)
        if mask is not None:
            given = mask if mask.shape[-2] == 1 else mask[..., start : start + size, :]
            logits = logits.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else logits + given.float()
        if causal:
            seen = place <= torch.arange(start, start + logits.shape[2], device=key.device).unsqueeze(1)
            logits = logits.masked_fill(~seen, -torch.inf)
        yield start, torch.softmax(logits, -1).nan_to_num_(0.0).mean(1)
