"""Changes to one instance of a module, their exact undo, and copies that have none of them."""

import copy
import functools
import inspect
import operator
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn, Self

import torch
from torch import nn


class Uncopyable:
    """What belongs to one patched model. Only the model is copied; a copy has no plan applied."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            f"a {type(self).__name__} belongs to one model and cannot be copied or pickled; copy the model itself (a copy has "
            "no plan applied), or call saint.remove(model) first"
        )


class Replacement(functools.partial[Any]):
    """What stands in place of a method: calls ``call``, and is copied and pickled as the method it replaces.

    Has the method's name, documentation and signature. To call it costs what to call ``call`` costs: ``functools.partial`` runs
    no Python code.
    """

    def __new__(cls, call: Callable[..., Any], method: Callable[..., Any]) -> Self:
        self = super().__new__(cls, call)
        functools.update_wrapper(self, method, updated=())
        return self

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(vars(self)["__wrapped__"])

    def give_back(self) -> None:
        """From now on call the method itself."""
        # the one way in which a partial takes another function, made for unpickling
        self.__setstate__((vars(self)["__wrapped__"], (), {}, vars(self)))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(vars(self)["__wrapped__"], memo)  # of a bound method: the same method, bound to the copy

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (vars(self)["__wrapped__"],)  # loads without this library


_MOVED = "_old_forward"  # where the hooks of accelerate keep the forward that they wrap


def override(stack: ExitStack, module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a method on this instance only; the undo restores exactly what was in its ``__dict__``.

    What is put in place has the name, documentation and signature of the method it replaces. Others may have wrapped or moved
    it by the time of the undo, or keep a reference: from then on it calls the method it replaced.
    """
    # accelerate keeps the wrapped forward in `_old_forward` and calls that from its own; stay inside its hook
    slot = _MOVED if name == "forward" and _MOVED in vars(module) else name
    before = vars(module).get(slot)
    original = getattr(module, slot)
    vars(module)[slot] = ours = Replacement(wrap(original), original)

    def undo() -> None:
        ours.give_back()
        for place in (name, _MOVED):
            if vars(module).get(place) is not ours:
                continue
            if place == name and before is None:
                del vars(module)[place]
            else:  # where accelerate has put it since, something must stand
                vars(module)[place] = original if before is None else before

    stack.callback(undo)


_ABSENT = object()
_REDUCE = "__reduce_ex__"  # what `copy` and `pickle` ask an object for; they look on the instance first


# where a module keeps its hooks, by their ids
_HOOKS = tuple(key for key, value in vars(nn.Module()).items() if "hooks" in key and isinstance(value, dict))


class Before:
    """The modules of a model as they are now, for :meth:`hide`."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Any], dict[str, set[Any]]]] = []
        for module in model.modules():  # loops, here and below: of thousands of modules a few are touched
            state = vars(module)
            hooks = {}
            for key in _HOOKS:
                if state.get(key):
                    hooks[key] = set(state[key])
            self._modules.append((module, state.copy(), hooks))

    def hide(self, stack: ExitStack) -> None:
        """From now on a copy or pickle of a module is without what was put on it since: attributes and hooks.

        A copy is then the model as if nothing were applied; the original stays as it is. ``stack`` undoes this.
        """
        for module, before, hooks in self._modules:
            state = vars(module)
            put, added = {}, {}
            if len(state) != len(before) or not all(map(operator.is_, state.values(), before.values())):
                put = {key: value for key, value in state.items() if before.get(key, _ABSENT) is not value}
            for key in _HOOKS:
                ids, known = state.get(key, ()), hooks.get(key, ())
                if len(ids) != len(known):
                    added[key] = set(ids).difference(known)
            if put or added:
                hide(stack, module, put, {key: before[key] for key in put if key in before}, added)


def hide(
    stack: ExitStack,
    module: nn.Module,
    put: dict[str, Any],
    was: dict[str, Any] | None = None,
    hooks: dict[str, set[Any]] | None = None,
) -> None:
    """Let a copy or pickle of ``module`` be without what was put on it; ``stack`` undoes this.

    Args:
        stack: takes the undo.
        module: stays as it is.
        put: attributes.
        was: what stood in the place of some of them.
        hooks: ids of hooks, by the dictionary they are in.
    """
    override(stack, module, _REDUCE, functools.partial(_reduce, type(module).__name__, put, was or {}, hooks or {}))


def _reduce(
    name: str,
    put: dict[str, Any],
    was: dict[str, Any],
    hooks: dict[str, set[Any]],
    original: Callable[..., Any],
) -> Callable[..., Any]:
    def reduce(protocol: int) -> tuple[Any, ...]:
        make, args, state, *rest = original(protocol)
        if not isinstance(state, dict):
            raise RuntimeError(
                f"{name} keeps a state of its own for copies, from which a plan cannot be taken out: call "
                "saint.remove(model) first"
            )
        clean = {}
        for key, value in state.items():
            if value is put.get(key, _ABSENT):  # else a later patch wraps it: its reference reduces by itself
                if key in was:
                    clean[key] = was[key]
            elif key != _REDUCE:
                ours = hooks.get(key)
                clean[key] = type(value)((i, h) for i, h in value.items() if i not in ours) if ours else value
        return make, args, clean, *rest

    return reduce


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
