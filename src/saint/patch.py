"""Changes to one instance of somebody's module, and their exact undo."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

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


class Uncopyable:
    """What a patched model must not carry into a copy."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "a model cannot be copied or pickled while a plan is applied; call saint.remove(model) first"
        )
