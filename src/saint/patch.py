"""Changes to one instance of somebody's module, and their exact undo."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import nn


def override(stack: ExitStack, module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a method on this instance only; the undo restores exactly what was in its ``__dict__``."""
    # accelerate keeps the wrapped forward in `_old_forward` and calls that from its own; stay inside its hook
    slot = "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name
    before = vars(module).get(slot)
    original = getattr(module, slot)
    vars(module)[slot] = wrap(original)

    def undo() -> None:
        if before is None:
            del vars(module)[slot]
        else:
            vars(module)[slot] = before

    stack.callback(undo)


def refuse_replicas(stack: ExitStack, module: nn.Module) -> None:
    """``DataParallel`` copies a module's ``__dict__``, so its replicas would run the original's weights: refuse that."""

    def wrap(_original: Callable[..., Any]) -> Callable[..., NoReturn]:
        def replicate(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(
                "a patched model cannot be replicated by DataParallel; use DistributedDataParallel, one process and one "
                "saint.apply() per device, or call saint.remove(model) first"
            )

        return replicate

    override(stack, module, "_replicate_for_data_parallel", wrap)


def refuse_tracing() -> None:
    """A trace would fix the tokens of the pictures it was made with."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace would fix the tokens of one picture for all; use torch.compile, or torch.export with a fixed budget"
        )


class Uncopyable:
    """What a patched model must not carry into a copy."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "a model cannot be copied or pickled while a plan is applied; call saint.remove(model) first"
        )
