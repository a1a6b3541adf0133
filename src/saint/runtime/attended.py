"""What a layer's attention is computed from, seen when the layer calls torch for it.

The layer's own attention runs as it always does, whichever kernel computes it; nothing is computed a second time here.

Letters: B sequences of the call, H heads, G key heads, Q queries, N keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .state import LayerState


@dataclass(frozen=True)
class Attended:
    """One call of a layer's attention; layers with parallel attentions, or with segments, make several.

    Attributes:
        query: behind norms and rotary tables, [B, H, Q, D].
        key: likewise, [B, G, N, D], H a multiple of G.
        value: [B, G, N, D of values].
        scale: of the logits; None means 1 / sqrt(D).
        mask: broadcastable to [B, H, Q, N]: bool (True: may be attended to), or added to the logits; None: all see all.
        causal: query i sees the keys 0..i only.
        prefix: protected tokens in front of each sequence, P.
        state: the tokens in front of the layer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    mask: Tensor | None
    causal: bool
    prefix: int
    state: LayerState

    def mask_of(self, sample: int) -> Tensor | None:
        """The mask of one sequence, broadcastable to [H, Q, N]."""
        if self.mask is None or self.mask.ndim < 4:
            return self.mask
        return self.mask[sample % len(self.mask)]


class Attending(TorchFunctionMode):
    """While it is entered, calls of torch's attention functions are told; it changes none of them."""

    def __init__(self, tell: Callable[[Attended], None], prefix: int, state: LayerState) -> None:
        super().__init__()
        self._tell, self._prefix, self._state = tell, prefix, state

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            self._told(**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs)
        elif func is nn.functional.multi_head_attention_forward:
            names = ("query", "key", "value", "width", "heads", "in_proj_weight", "in_proj_bias")
            self._of_module(**dict(zip(names, args, strict=False)), **kwargs)
        return out

    def _told(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        if query.ndim != 4:  # no attention over tokens of a sequence that any supported model computes
            return
        query, key, value = query.detach(), key.detach(), value.detach()
        self._tell(Attended(query, key, value, scale, attn_mask, bool(is_causal), self._prefix, self._state))

    def _of_module(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        **_: Any,
    ) -> None:
        """nn.MultiheadAttention projects inside: its queries, keys and values are projected here again. query [Q, B, C]."""
        if use_separate_proj_weight or in_proj_weight is None or query.ndim != 3:
            return
        width = query.shape[2]
        rows = in_proj_weight.detach().split(width)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.detach().split(width)
        with torch.no_grad():
            q, k, v = (
                nn.functional.linear(x.detach(), w, b).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
                for x, w, b in zip((query, key, value), rows, biases, strict=True)
            )
        mask = None if attn_mask is None else _allows(attn_mask)
        if mask is not None and mask.ndim == 3:  # [B * H, Q, N]
            mask = mask.unflatten(0, (-1, heads))
        if key_padding_mask is not None:
            padding = _allows(key_padding_mask)[:, None, None]
            mask = padding if mask is None else _both(mask, padding)
        self._tell(Attended(q, k, v, None, mask, False, self._prefix, self._state))


def _allows(mask: Tensor) -> Tensor:
    """nn.MultiheadAttention's bool masks say what is hidden; ours what is seen."""
    return ~mask if mask.dtype == torch.bool else mask


def _both(mask: Tensor, padding: Tensor) -> Tensor:
    if mask.dtype == padding.dtype == torch.bool:
        return mask & padding
    a, b = (
        torch.zeros(m.shape, device=m.device).masked_fill(~m, -torch.inf) if m.dtype == torch.bool else m
        for m in (mask, padding)
    )
    return a + b
