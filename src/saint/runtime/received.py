"""Attention that the tokens of an encoder's layer get, and how long their values are, from what it computed.

One row of the attention matrix, or its columns summed block by block: the matrix as a whole is never held, and the layer's own
attention runs as it does.

Letters: B sequences of a call, H heads, G key heads, Q queries, N keys, D head dim, P prefix tokens, S tokens behind them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import HookNeverFiredError
from ..needs import TOWER_JOINED, TOWER_RECEIVED, TOWER_VALUES
from .attended import Attended, Attending
from .rows import rows
from .state import LayerState


class Received:
    """What is summed up of one run of a layer.

    Args:
        kinds: that are asked for, of ``needs.TOWER_ATTENTION``.
        prefix: protected tokens in front of each sequence, the first of them the class token.
        state: the tokens in front of the layer.
        real: which tokens of the sequences are no padding, bool [B, P + S]; None: all.
    """

    def __init__(self, kinds: Sequence[str], prefix: int, state: LayerState, real: Tensor | None) -> None:
        self._kinds, self._prefix, self._real = kinds, prefix, real
        self._parts: list[Tensor] = []
        self.listening = Attending(self._told, prefix, state)

    def _told(self, attended: Attended) -> None:
        with torch.no_grad():
            made = [self._made(kind, attended) for kind in self._kinds]
        self._parts.append(torch.stack(made, -1)[:, self._prefix :])

    def _made(self, kind: str, attended: Attended) -> Tensor:
        if kind == TOWER_VALUES:
            return lengths(attended)
        if is_sum(kind, self._prefix):
            return summed(attended, self._real)
        return class_attention(joined(attended) if kind == TOWER_JOINED else attended)

    def take(self, count: int, name: str) -> Tensor:
        """Give what was asked for, attention received as the sum over all queries: float32 [B, S, kinds].

        Args:
            count: S.
            name: of the layer, for messages.

        Raises:
            HookNeverFiredError: no attention over these tokens went through torch.
        """
        parts = torch.cat(self._parts, 1) if self._parts else None  # segments follow each other
        if parts is None or parts.shape[1] % count:
            raise HookNeverFiredError(
                f"the attention of {name} did not go through torch's scaled_dot_product_attention, so what its tokens get is not "
                'seen: load the model with attn_implementation="sdpa", or use a method that does not look at attention'
            )
        return parts.unflatten(1, (-1, count)).mean(1)  # of parallel attentions the mean


def is_sum(kind: str, prefix: int) -> bool:
    """Tell whether what is asked for is summed over all queries: attention received, which stands for a class token's too."""
    return kind == TOWER_RECEIVED or (kind != TOWER_VALUES and not prefix)


def joined(attended: Attended) -> Attended:
    """The same call with all heads as one, of H * D channels."""
    query, key, mask = attended.query, attended.key, attended.mask
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    query, key = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (query, key))
    mask = mask[:, :1] if mask is not None and mask.ndim == 4 else mask
    return replace(attended, query=query, key=key, mask=mask, scale=query.shape[-1] ** -0.5)


def lengths(attended: Attended) -> Tensor:
    """Length of each token's value, of all heads side by side, float32 [B, N]."""
    return torch.linalg.vector_norm(attended.value.float(), dim=(1, 3))


def class_attention(attended: Attended) -> Tensor:
    """Attention of the first token, averaged over heads, float32 [B, N]."""
    mask = attended.mask if attended.mask is None else attended.mask[..., :1, :]
    ((_, row),) = rows(attended.query[:, :, :1], attended.key, scale=attended.scale, mask=mask, causal=attended.causal)
    return row.squeeze(1)


def summed(attended: Attended, real: Tensor | None = None) -> Tensor:
    """Attention that each token gets, averaged over heads and summed over the queries, float32 [B, N].

    Args:
        attended: a call.
        real: queries that count, bool [B, Q]; None: all.
    """
    query, key = attended.query, attended.key
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    made = rows(query, key, scale=attended.scale, mask=attended.mask, causal=attended.causal)
    for first, part in made:  # [B, q, N]
        counted = part if real is None else part.masked_fill(~real[:, first : first + part.shape[1], None], 0)
        total += counted.sum(1)
    return total
