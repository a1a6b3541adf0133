"""Some rows of a layer's attention: those of a few prompt tokens over everything the layer sees.

Fused attention stays on and no L x L matrix is made: the layer's own attention module runs a second time, on the tokens that ask
alone, with its eager implementation, which returns weights. Projections, norms, rotary tables, head groups, scaling, soft
caps and sinks are therefore the model's own; the keys are those the layer has just cached.

Letters: B batch, H heads, S tokens of the sequence, R that ask, T entries of the cache with the sequence, C channels.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, UnsupportedModelError
from ..gathers import gather_along, gather_tokens
from ..needs import LAST
from ..tokens import TokenMap
from ..upstream.names import ATTENTION, CACHE, HIDDEN, IMPLEMENTATION, MASK, POSITIONS, ROTARY, Parameters, Role
from .masks import lets_through
from .positions import gather_ids, gather_rotary
from .queries import Askers

_ARGUMENTS = (HIDDEN, ROTARY, MASK, CACHE)


def check_attention(layer: nn.Module, path: str, flash: bool) -> None:
    """Raise ``UnsupportedModelError`` unless :func:`rows` can work on this layer."""
    attention = ATTENTION.get(layer)
    why = None
    if attention is None or IMPLEMENTATION.of(getattr(attention, "config", None)) is None:
        why = f"it has no {ATTENTION} whose config names an attention implementation"
    else:
        missing = Parameters(type(attention).forward).missing(*_ARGUMENTS)
        if missing:
            why = f"its {ATTENTION} takes no {', '.join(missing)}"
        elif flash and getattr(attention, "sliding_window", None):
            why = 'its sliding window shows in no mask under flash attention: load the model with attn_implementation="sdpa"'
    if why is not None:
        raise UnsupportedModelError(
            f"the attention of single tokens cannot be computed at {path} ({type(layer).__name__}): {why}; use a layer or a "
            "method that does without"
        )


def rows(
    layer: nn.Module,
    path: str,
    call: tuple[Parameters, dict[str, Any]] | None,
    held: tuple[Tensor, Tensor],
    valid: Tensor | None,
    who: Callable[[Tensor], Askers],
) -> dict[str, Tensor]:
    """Attention of some tokens of each sample, averaged over heads and tokens, over the tokens of the sequence.

    Args:
        layer: has just run.
        path: of the layer, for messages.
        call: how its attention spells its arguments, and those it ran with; None when it did not run.
        held: keys and values of the layer, the sequence's last, [B, H, T, D].
        valid: bool [B, S], False for padding that we added; None when there is none.
        who: of the tokens that are no padding, bool [B, S], those that ask.

    Returns:
        By name, float32 [B, S], from probabilities of the model's dtype.

    Raises:
        HookNeverFiredError: the attention did not run.
        UnsupportedModelError: it returned no weights.
    """
    attention: Any = ATTENTION.get(layer)
    if call is None:
        raise HookNeverFiredError(f"the attention of {path} was not called, so its queries are not known")
    parameters, given = call
    hidden, mask = HIDDEN.read(given).detach(), MASK.read(given)
    (batch, count), total = hidden.shape[:2], held[0].shape[2]
    mask = None if mask is None else mask[..., :total]  # of a static layer more is shown than is filled
    real = _real(mask, batch, count, hidden.device)
    slots, weights = who(real if valid is None else real & valid)
    asked = slots.shape[1]
    some = TokenMap(slots, (asked,) * batch, (count,) * batch, count)
    changes: dict[Role, Any] = {
        HIDDEN: gather_tokens(hidden, slots, 0),  # [B, R, C]
        ROTARY: gather_rotary(ROTARY.read(given), some),
        MASK: _mask(mask, slots, hidden.dtype, valid, count, total, causal=weights.keys() != {LAST}),
        CACHE: _Held(held),
    }
    if isinstance(ids := POSITIONS.read(given), Tensor):
        changes[POSITIONS] = gather_ids(ids, some)
    again = given
    for role, value in changes.items():
        again = parameters.put(again, role, value)
    with torch.no_grad(), _eager(attention) as eager:
        seen = eager.forward(**again)[1]
    if not isinstance(seen, Tensor) or seen.shape[:1] + seen.shape[2:] != (batch, asked, total):
        raise UnsupportedModelError(
            f"the attention of {path} ({type(attention).__name__}) returned no attention weights of its eager "
            "implementation, so what single tokens attend to is not known; use a method that does without"
        )
    found = seen.float().mean(1)[..., -count:]  # [B, H, R, T] -> [B, R, S]
    return {
        name: found[:, 0] if weight is None else (weight.unsqueeze(-1) * found).sum(1)
        for name, weight in weights.items()
    }


class _Held:
    """A cache that takes nothing and gives what the layer has."""

    def __init__(self, held: tuple[Tensor, Tensor]) -> None:
        self.held = held

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.held


class _EagerConfig:
    def __init__(self, config: Any) -> None:
        self._config = config
        vars(self).update(dict.fromkeys(IMPLEMENTATION.spellings, "eager"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextmanager
def _eager(attention: nn.Module) -> Iterator[Any]:
    """The module with its eager implementation and without dropout; neither it nor the config that it shares is touched."""
    own = {"config": _EagerConfig(vars(attention)["config"]), "training": False}
    if "forward" not in vars(attention):
        copy: Any = object.__new__(type(attention))  # the same parameters, submodules and hooks
        vars(copy).update(vars(attention), **own)
        yield copy
        return
    with _WRAPPED:  # accelerate has wrapped the forward of this very module, to bring its weights
        kept = {name: vars(attention)[name] for name in own}
        vars(attention).update(own)
        try:
            yield attention
        finally:
            vars(attention).update(kept)


_WRAPPED = threading.Lock()


def _real(mask: Tensor | None, batch: int, count: int, device: torch.device) -> Tensor:
    """Mark the tokens of the sequence that are no padding, bool [B, S]: a real token sees itself."""
    if mask is None:
        return torch.ones(batch, count, dtype=torch.bool, device=device)
    own = mask[..., -count:]  # [B or 1, S] or [B or 1, 1 or H, Q, S]
    if mask.ndim == 4:
        own = own[:, 0].diagonal(dim1=-2, dim2=-1) if own.shape[2] == count else own[:, 0, 0]  # [B or 1, S]
    return lets_through(own).expand(batch, count)


def _mask(
    mask: Tensor | None,
    slots: Tensor,
    dtype: torch.dtype,
    valid: Tensor | None,
    count: int,
    total: int,
    *,
    causal: bool,
) -> Tensor | None:
    """The additive mask of some queries, [B, 1 or H, 1 or R, T].

    Args:
        mask: of the sequence, as the layer was given it.
        slots: of the queries, int64 [B, R].
        dtype: of the hidden states.
        valid: bool [B, S], for where causality masks alone.
        count: S.
        total: T.
        causal: there are others than last tokens, from which causality hides something.
    """
    if mask is None or mask.ndim == 2:
        if mask is None and valid is not None:
            # padding stands behind what was there
            mask = torch.nn.functional.pad(valid, (total - count, 0), value=True)  # [B, T]
        shown = None if mask is None else mask.bool()[:, None, None]  # [B, 1, 1, T]
        if causal:
            before = torch.arange(total, device=slots.device) <= (slots + total - count).unsqueeze(-1)  # [B, R, T]
            shown = before.unsqueeze(1) if shown is None else before.unsqueeze(1) & shown
        if shown is None:
            return None  # nothing is hidden from a last token
        mask = shown
    elif mask.shape[2] > 1:
        mask = gather_along(mask, slots, 2)  # [B, 1 or H, R, T]
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
