"""A part of a vision-language model that was pruned alone: its first forward shows whose part it is."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..upstream.names import IMAGE_TOKEN, MERGER, PLACEHOLDER_MASK
from .locate import find


def refuse_part(stack: ExitStack, module: nn.Module, full_length: bool = False) -> None:
    """Watch the first forward of ``module`` and refuse it inside a model that places its tokens in a prompt.

    What such a model does with fewer features than it has placeholders ends in an error of its own that names neither; its
    language model alone does not tell text from visual tokens, and would lose text. Who calls is known only in a call: a module
    does not know what holds it.

    Args:
        stack: undoes it.
        module: an encoder, or the decoder of a language model.
        full_length: it hands on as much as ever, which a model of no known family may take.
    """

    def look(part: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        hook.remove()
        for caller in _callers(part):
            known = find(caller)
            written = known is not None and known[0] == "" and not known[2].derived
            title = known[2].title if known is not None and written else ""
            places = PLACEHOLDER_MASK.of(caller) or MERGER.of(caller)
            sign = bool(places) and IMAGE_TOKEN.get(caller.config) is not None and not full_length
            if title or sign:
                raise UnsupportedModelError(
                    f"the plan was applied to a {type(part).__name__} alone, and this forward runs it as a part of "
                    f"{type(caller).__name__}{title and f' ({title})'}, which must know what leaves: call session.remove(), then "
                    "apply the plan to the whole model, saint.apply(model, ...)"
                )

    hook = module.register_forward_pre_hook(look, prepend=True)
    stack.callback(hook.remove)


def _callers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules around ``module`` whose forward is running, the innermost first."""
    frame = sys._getframe(2)
    seen = {id(module)}
    while frame is not None:
        # a look at the locals of a frame keeps them while it runs: of methods alone, not of a function that holds the model
        one = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(one, nn.Module) and id(one) not in seen:
            seen.add(id(one))
            if any(inner is module for inner in one.modules()):
                yield one
        frame = frame.f_back  # type: ignore[assignment]
