"""Where a layer's attention goes, from its queries and keys, a block of queries at a time.

Averaged over heads as in the development code of the authors of SAINT, and summed up at once.

Letters: H heads, G KV heads, Q queries, N keys, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.rows import BLOCK, rows


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
    block: int = BLOCK,
) -> Summary:
    """The :class:`Summary` of an attention of one sample; arguments as of :func:`rows`, without its axis.

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
    found = rows(query.unsqueeze(0), key.unsqueeze(0), scale=scale, mask=mask, causal=causal, block=block)
    for start, (part,) in found:
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
