"""Where a layer's attention goes, from its queries and keys, a block of queries at a time.

The model's own attention stays as it is (fused, say); here its probabilities are computed again, averaged over heads as in the
development code of the authors of SAINT, and summed up at once: no N x N matrix is held.

Letters: H heads, G KV heads, Q queries, N keys, D head dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**19  # probabilities held at once over all heads (2 MiB, and as much again while they are made)


def rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int = _BLOCK,
) -> Iterator[tuple[int, Tensor]]:
    """Attention probabilities ``mean_h softmax_j(scale q_i . k_j + mask_ij)``, in blocks of queries.

    Args:
        query: of one sample, [H, Q, D].
        key: [G, N, D], H a multiple of G.
        scale: of the logits; None means 1 / sqrt(D).
        mask: broadcastable to [H, Q, N]; bool (True: may be attended to) or added to the logits.
        causal: query i sees the keys 0..i.
        block: numbers to hold at once.

    Yields:
        The first query of a block, and float32 [queries of the block, N]. Rows that see nothing are zero.
    """
    heads, count, dim = query.shape
    groups, total = key.shape[:2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    size = max(1, block // (heads * total))
    place = torch.arange(total, device=key.device)
    for start in range(0, count, size):
        part = query[:, start : start + size].float() * scale
        logits = part.reshape(groups, -1, dim) @ key.float().mT  # heads that share a key head lie one behind the other
        logits = logits.view(heads, -1, total)
        if mask is not None:
            given = mask if mask.shape[-2] == 1 else mask[..., start : start + size, :]
            hides = given.dtype == torch.bool
            logits = logits.masked_fill(~given, -torch.inf) if hides else logits + given.float()
        if causal:
            seen = place <= torch.arange(start, start + logits.shape[1], device=key.device).unsqueeze(1)
            logits = logits.masked_fill(~seen, -torch.inf)
        yield start, torch.softmax(logits, -1).nan_to_num_(0.0).mean(0)


@dataclass(frozen=True)
class Summary:
    """What is kept of the attention of one layer for one image.

    Attributes:
        entropy: of each query's row, ``H_i = -sum_j a_ij ln a_ij``, nat, float32 [Q].
        share: of each query's row, what falls on the asked keys, ``sum_{j asked} a_ij``, float32 [Q].
        received: what each key gets from the asked queries, ``u_j = sum_{i asked} a_ij``, float32 [N].
    """

    entropy: Tensor
    share: Tensor
    received: Tensor


def summarize(
    query: Tensor,
    key: Tensor,
    senders: Tensor,
    onto: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int = _BLOCK,
) -> Summary:
    """The :class:`Summary` of an attention; arguments as of :func:`rows`.

    Args:
        query: [H, Q, D].
        key: [G, N, D].
        senders: queries whose attention is counted as received, bool [Q].
        onto: keys whose share is asked for, bool [N].
        scale: see :func:`rows`.
        mask: see :func:`rows`.
        causal: see :func:`rows`.
        block: see :func:`rows`.
    """
    entropies, shares = [], []
    received = torch.zeros(key.shape[1], device=key.device)
    for start, part in rows(query, key, scale=scale, mask=mask, causal=causal, block=block):
        entropies.append(torch.special.entr(part).sum(-1))
        shares.append(part[:, onto].sum(-1))
        received += senders[start : start + len(part)].float() @ part
    return Summary(torch.cat(entropies), torch.cat(shares), received)


def received_entropy(received: Tensor) -> float:
    """Entropy of the received attention as a distribution: ``-sum_j p_j ln p_j``, p_j = u_j / sum u, nat; u [N]."""
    return float(torch.special.entr(received.double() / received.double().sum()).sum())


def received_entropy_by_max(received: Tensor) -> float:
    """The authors' version: ``-sum_j v_j ln v_j``, v_j = u_j / max u. No entropy (v does not sum to 1), given for comparison."""
    return float(torch.special.entr(received.double() / received.double().max()).sum())
