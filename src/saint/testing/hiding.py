"""Hides tokens, as keys, from attention that torch computes: what both oracles stand on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..upstream.specs import EncoderSpec, part


class HideKeys(TorchFunctionMode):
    """Adds a key mask to every attention that torch computes while ``visible`` or ``pieces`` is set.

    A bool one hides keys, a float one is added to their logits. ``softer`` [B] multiplies all logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.softer: Tensor | None = None
        self.visible: Tensor | None = None  # [B, keys]
        self.pieces: list[Tensor] = []  # packed: bool [1, keys] of each segment, in the order of their attentions
        self.masked = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        seen = self.pieces[0] if self.pieces else self.visible
        if self.softer is not None and func is nn.functional.scaled_dot_product_attention:
            kwargs |= dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            args, kwargs["query"] = (), kwargs["query"] * self.softer.to(kwargs["query"].dtype).view(-1, 1, 1, 1)
        if seen is None:
            return func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            if kwargs["key"].shape[-2] == seen.shape[1]:
                self.masked += 1
                if self.pieces:
                    self.pieces.pop(0)
                hide = seen[:, None, None]
                given = kwargs.get("attn_mask")
                if kwargs.get("is_causal"):
                    given, kwargs["is_causal"] = (
                        torch.ones_like(hide, dtype=torch.bool).expand(-1, -1, seen.shape[1], -1).tril(),
                        False,
                    )
                if given is None:
                    kwargs["attn_mask"] = hide
                elif hide.is_floating_point():
                    zero = torch.zeros((), dtype=hide.dtype, device=hide.device)
                    kwargs["attn_mask"] = hide + (zero.masked_fill(~given, -torch.inf) if _bool(given) else given)
                elif given.dtype == torch.bool:
                    kwargs["attn_mask"] = given & hide
                else:
                    kwargs["attn_mask"] = given.masked_fill(~hide, -torch.inf)
            return func(**kwargs)
        if func is nn.functional.multi_head_attention_forward and args[1].shape[0] == seen.shape[1]:
            self.masked += 1
            kwargs["key_padding_mask"] = seen if seen.is_floating_point() else ~seen
            kwargs["attn_mask"] = None  # what the caller masks (padding) is never a survivor
        return func(*args, **kwargs)


def _bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


@contextmanager
def unfused() -> Iterator[None]:
    """Keeps torch's fused path of ``nn.MultiheadAttention`` off: no interception and no FLOP counter sees into it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def hide_in_pools(stack: ExitStack, mode: HideKeys, encoder: nn.Module, spec: EncoderSpec) -> None:
    """Hides keys from the attention pools of an encoder too, of which some are shown the candidates alone.

    Args:
        stack: takes the removal of the hooks.
        mode: its ``visible`` [B, P + N] becomes [B, N] where a pool's input has N rows.
        encoder: holds the pools.
        spec: says where they are.
    """

    def trim(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if mode.visible is not None:  # a pool may be shown the candidates alone, without the prefix
            mode.visible = mode.visible[:, -args[0].shape[1] :]

    for path in spec.pools:
        if (pool := part(encoder, path)) is not None:
            stack.callback(pool.register_forward_pre_hook(trim).remove)


def stand_in(stack: ExitStack, module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    """Until ``stack`` unwinds, ``wrap(original)`` stands in place of a method of this instance, with its signature."""
    original = getattr(module, name)
    stack.enter_context(mock.patch.object(module, name, wraps(original)(wrap(original))))
