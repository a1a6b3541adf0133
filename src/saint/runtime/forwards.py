"""Finds the state of the forward that a layer runs in.

A state belongs to one forward. Threads that share a patched model have one each; a layer that is run again for its gradients
(checkpointing) finds the state its input was first seen with, however many forwards have run since.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..upstream.autograd import Memory, backward_pass

S = TypeVar("S")


class PerThread(Generic[S]):
    """A value that every thread has for itself, and compiled code, which knows no thread, too.

    Args:
        make: makes the first.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make, self._own, self._compiled = make, threading.local(), make()

    def get(self) -> S:
        """The value here."""
        if torch.compiler.is_compiling():
            return self._compiled
        if not hasattr(self._own, "value"):
            self._own.value = self._make()
        return self._own.value

    def set(self, value: S) -> S:
        """Put another in its place, which is given back."""
        if torch.compiler.is_compiling():
            self._compiled = value
        else:
            self._own.value = value
        return value


class Here(threading.local, Generic[S]):
    """A state that every thread has for itself, to be read without a call."""

    state: S | None = None


class Forwards(Generic[S]):
    """The states of one patched module.

    Args:
        make: makes the state of a new forward.
        name: of the module, for messages.

    Attributes:
        compiled: the forward that began last is compiled code's.
        here: of this thread, the state of the forward that began last, where that is neither compiled nor run again.
    """

    def __init__(self, make: Callable[[], S], name: str) -> None:
        self._make, self._name = make, name
        self._latest = make()  # of any thread
        self._own = threading.local()  # state, replayed
        self.compiled = False  # dynamo cannot trace a thread's own storage: a compiled forward is the latest
        self.here: Here[S] = Here()
        self._held = False
        self._open = PerThread(bool)  # a forward has begun and not reached its first layer
        self._inputs: dict[tuple[int, int], tuple[Memory, S]] = {}

    @property
    def state(self) -> S:
        """The forward that runs on this thread, or ran last; of any thread where this one ran none."""
        if torch.compiler.is_compiling() or self.compiled:
            return self._latest
        if (replayed := self._replayed()) is not None:
            return replayed[1]
        return getattr(self._own, "state", self._latest)

    def _replayed(self) -> tuple[int, S] | None:
        """In a backward pass, the layer that was run again last and its state."""
        task = backward_pass()
        found = None if task is None else getattr(self._own, "replayed", None)
        return found[1:] if found is not None and found[0] == task else None

    def begin(self) -> S:
        """A new forward on this thread; inside a backward pass, one that is run again from its beginning."""
        task = backward_pass()
        if task is not None:
            self._own.replayed = (task, -1, self._make())
            return self._own.replayed[2]
        self._latest = state = self._make()
        self.compiled = torch.compiler.is_compiling()
        if not self.compiled:
            self._own.state = state
        return state

    def prelude(self) -> S:
        """The forward that has not reached its first layer yet, begun now where there is none."""
        if self._open.get():
            return self.state
        self._open.set(True)
        return self.begin()

    def _begun(self) -> S:
        """Give the first layer what it runs in: the forward of the prelude, or a new one."""
        if not self._open.get():
            return self.begin()
        self._open.set(False)
        return self.state

    def enter(self, layer: int, x: Tensor, *, begins: bool = False) -> S:
        """The forward that a layer runs in, called by every layer with its input.

        A layer that is run again for its gradients runs in the forward in which its input was first seen.

        Args:
            layer: its number.
            x: its input.
            begins: it is the first of a forward, of which no more than the prelude has run.

        Raises:
            RuntimeError: run again, and its forward cannot be told.
        """
        if torch.compiler.is_compiling():
            return self._begun() if begins else self._latest
        task = backward_pass()
        if task is not None:
            state = self._first_state(layer, x)
            self._own.replayed = (task, layer, state)
            if begins:
                self._open.set(False)
        elif begins:
            state = self._begun()
        elif layer and not self.compiled and not hasattr(self._own, "state"):
            raise RuntimeError(
                f"layer {layer} of {self._name} ran on a thread on which the layers before it did not: a pruned forward runs "
                "on one thread"
            )
        else:
            state = self._latest if self.compiled else getattr(self._own, "state", self._latest)
        if begins:
            self.here.state = state if task is None else None
        if torch.is_grad_enabled() or x.requires_grad:
            self._remember(layer, x, state)
        return state

    def _remember(self, layer: int, x: Tensor, state: S) -> None:
        """Note in which forward ``layer`` runs with this input, while its memory is held; checkpointing holds it."""
        if (where := _address(x)) is not None:
            for key, (memory, _) in list(self._inputs.items()):  # a copy: other threads note theirs
                if memory.freed:
                    self._inputs.pop(key, None)
            self._inputs[layer, where] = (Memory(x), state)

    def _first_state(self, layer: int, x: Tensor) -> S:
        found = self._inputs.get((layer, _address(x) or 0))
        if found is not None and not found[0].freed:
            return found[1]
        before = self._replayed()
        if before is not None and before[0] in (-1, layer - 1):
            return before[1]  # inside a checkpointed model or segment of several layers, whose beginning was seen
        if layer == 0:
            return self._make()  # the model is run again from its beginning
        raise RuntimeError(
            f"layer {layer} of {self._name} is run again for its gradients with an input that no forward has seen (are saved "
            "tensors packed or moved to another device?), so its tokens are not known: switch gradient checkpointing off"
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is forgotten: patches are taken off only to be put on again."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def forget(self) -> None:
        """Drop all states."""
        if self._held:
            return
        self._latest, self._own = self._make(), threading.local()
        self.compiled, self._open, self.here = False, PerThread(bool), Here()
        self._inputs.clear()


def _address(x: Tensor) -> int | None:
    """Return where the data of ``x`` lies, which detaching does not change; None for a tensor without data of its own."""
    return x.data_ptr() if type(x) in (Tensor, torch.nn.Parameter) and not _wrapped(x) else None


def _wrapped(x: Any) -> bool:
    return x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)
