"""One row of a layer's attention: the last prompt token over everything the layer sees.

Fused attention stays on and no L x L matrix is made: the layer's own attention module runs a second time, on the last token
alone, with its eager implementation, which returns weights. Projections, norms, rotary tables, head groups, scaling, soft
caps and sinks are therefore the model's own; the keys are those the layer has just cached.

Letters: B batch, H heads, S tokens of the sequence, T entries of the cache with the sequence, C channels.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, UnsupportedModelError
from ..gathers import gather_along, gather_tokens
from ..tokens import TokenMap
from ..upstream.names import ATTENTION, CACHE, HIDDEN, IMPLEMENTATION, MASK, POSITIONS, ROTARY, Parameters, Role
from .masks import lets_through
from .positions import gather_ids, gather_rotary

_ARGUMENTS = (HIDDEN, ROTARY, MASK, CACHE)


def check_attention(layer: nn.Module, path: str, flash: bool) -> None:
    """Raise ``UnsupportedModelError`` unless :func:`last_row` can work on this layer."""
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
            f"the attention of the last token cannot be computed at {path} ({type(layer).__name__}): {why}; use a layer or a "
            "method that does without"
        )


def last_row(
    layer: nn.Module,
    path: str,
    call: tuple[Parameters, dict[str, Any]] | None,
    held: tuple[Tensor, Tensor],
    valid: Tensor | None,
) -> Tensor:
    """Attention of each sample's last real token, averaged over heads, over the tokens of the sequence.

    Args:
        layer: has just run.
        path: of the layer, for messages.
        call: how its attention spells its arguments, and those it ran with; None when it did not run.
        held: keys and values of the layer, the sequence's last, [B, H, T, D].
        valid: bool [B, S], False for padding that we added; None when there is none.

    Returns:
        float32 [B, S], from probabilities of the model's dtype.

    Raises:
        HookNeverFiredError: the attention did not run.
        UnsupportedModelError: it returned no weights.
    """
    attention: Any = ATTENTION.get(layer)
    if call is None:
        raise HookNeverFiredError(f"the attention of {path} was not called, so its queries are not known")
    parameters, given = call
    hidden, mask = HIDDEN.read(given).detach(), MASK.read(given)
    batch, count = hidden.shape[:2]
    real = _real(mask, batch, count, hidden.device)
    real = real if valid is None else real & valid
    place = torch.arange(count, device=hidden.device)
    last = torch.where(real, place, -1).amax(1).clamp_min(0).unsqueeze(1)  # [B, 1]
    one = TokenMap(last, (1,) * batch, (count,) * batch, count)
    changes: dict[Role, Any] = {
        HIDDEN: gather_tokens(hidden, last, 0),  # [B, 1, C]
        ROTARY: gather_rotary(ROTARY.read(given), one),
        MASK: _row(mask, last, hidden.dtype, valid, held[0].shape[2]),
        CACHE: _Held(held),
    }
    if isinstance(ids := POSITIONS.read(given), Tensor):
        changes[POSITIONS] = gather_ids(ids, one)
    again = given
    for role, value in changes.items():
        again = parameters.put(again, role, value)
    with torch.no_grad(), _eager(attention) as eager:
        weights = eager.forward(**again)[1]
    if not isinstance(weights, Tensor) or weights.shape[:1] + weights.shape[2:] != (batch, 1, held[0].shape[2]):
        raise UnsupportedModelError(
            f"the attention of {path} ({type(attention).__name__}) returned no attention weights of its eager "
            "implementation, so the row of the last token is not known; use a method that does without"
        )
    return weights.float().mean(1)[:, 0, -count:]  # [B, H, 1, T] -> [B, S]


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


def _row(mask: Tensor | None, last: Tensor, dtype: torch.dtype, valid: Tensor | None, total: int) -> Tensor | None:
    """The additive mask of one query per sample, [B, 1 or H, 1, T]; ``valid`` [B, S] is used where causality masks alone."""
    if mask is None:
        if valid is None:
            return None  # nothing is hidden from a last token
        # padding stands behind what was there
        mask = torch.nn.functional.pad(valid, (total - valid.shape[1], 0), value=True)  # [B, T]
    if mask.ndim == 2:
        mask = mask.bool()[:, None, None]  # [B, 1, 1, T]
    elif mask.shape[2] > 1:
        mask = gather_along(mask, last, 2)  # [B, 1 or H, 1, T]
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
