"""What looks at a pruned forward from outside.

An observer is any object with some of the methods of :class:`Observer`. A method that an observer lacks costs nothing; a plan
without observers runs as if there were none.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tokens import Candidates, Selection
from .attended import Attended
from .state import LayerState

EVENTS = ("candidates", "selected", "decided", "layer", "attention", "layer_time", "pruning_time")


@dataclass(frozen=True)
class Passed:
    """The residual stream on both sides of a layer, with protected and text tokens.

    Attributes:
        before: in front of it, [Q, P + S, C] (Q sequences, P protected tokens, S others).
        after: behind it and its drop point, [Q, P + K, C].
        prefix: P.
        came: the tokens in front of it.
        left: the tokens behind it.
    """

    before: Tensor
    after: Tensor
    prefix: int
    came: LayerState
    left: LayerState

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Rows of the candidates on both sides, [B, N, C] and [B, K, C]; of groups of tokens the means."""
        before, after = self.before[:, self.prefix :], self.after[:, self.prefix :]
        return self.came.of_candidates(before), self.left.of_candidates(after)


class Observer:
    """The events. Deriving from this class is not required; only methods that are defined are called.

    An observer may have two attributes. ``layers``: in which layers ``candidates`` is wanted: a list of ints or "all"; without
    it those in which the plan drops, and all where the plan is empty. ``needs``: what shall be computed for it, as for methods:
    ``{"last_query"}`` fills ``candidates.attention`` in the language stage, other tokens of the prompt ``candidates.rows``.
    """

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        """See what a method sees at a layer: keys, residual stream and map of the candidates.

        Cost: a mean of the keys over heads, per layer; nothing is copied or read back. Where nothing is dropped the residual
        stream is that behind the layer.
        """

    def selected(self, stage: str, layer: int, selection: Selection) -> None:
        """The slots that stay at a drop point. No cost."""

    def decided(self, stage: str, layer: int, candidates: Candidates, selection: Selection) -> None:
        """See what a method saw at a drop point, and which of it stays. No cost."""

    def layer(self, stage: str, layer: int, passed: Passed) -> None:
        """The whole residual stream on both sides of a layer that is patched: of all layers where the plan is empty.

        Cost: what stood in front of the layer is held until it has run; nothing is copied.
        """

    def attention(self, stage: str, layer: int, attended: Attended) -> None:
        """Queries, keys and mask of a call of torch's attention by a layer that is patched, when it has run.

        Not told of attention that does not go through ``scaled_dot_product_attention`` or ``nn.MultiheadAttention`` (eager
        implementations, flash attention of transformers). Cost: every call of a torch function inside the layer passes through
        python once more, and ``nn.MultiheadAttention`` leaves its fused path and has queries and keys projected twice.
        """

    def layer_time(self, stage: str, layer: int, seconds: float) -> None:
        """Duration of a layer with all that pruning adds to it. Cost: on a GPU, every layer is waited for."""

    def pruning_time(self, stage: str, layer: int, scoring: float, gathering: float) -> None:
        """Seconds of a layer spent on choosing tokens, and on gathering hidden states, tables and masks. Cost: as above."""


class Observers:
    """The observers of one session, by event.

    Args:
        observers: objects with at least one method of :class:`Observer`.

    Raises:
        TypeError: one without any.
        ValueError: ``layers`` of one is no list of layers.
    """

    def __init__(self, observers: Sequence[Any] = ()) -> None:
        self._all = tuple(observers)
        for observer in self._all:
            if not any(callable(getattr(observer, event, None)) for event in EVENTS):
                raise TypeError(
                    f"an observer has at least one of the methods {', '.join(EVENTS)}; got {observer!r:.80}"
                )
            _check_layers(observer)
        self.candidates = self._listeners("candidates")
        self.selected = self._listeners("selected")
        self.decided = self._listeners("decided")
        self.layer = self._listeners("layer")
        self.attention = self._listeners("attention")
        self.layer_time = self._listeners("layer_time")
        self.pruning_time = self._listeners("pruning_time")

    def __bool__(self) -> bool:
        return bool(self._all)

    def _listeners(self, event: str) -> list[tuple[Any, Callable[..., None]]]:
        return [(o, call) for o in self._all if callable(call := getattr(o, event, None)) and not _empty(call, event)]

    def layers(self, depth: int, drops: Sequence[int], idle: bool) -> list[int]:
        """Layers of a stage of ``depth`` layers at which candidates are to be shown.

        Args:
            depth: number of layers.
            drops: where the plan drops.
            idle: the plan drops nowhere at all.
        """
        chosen: set[int] = set()
        for observer, _ in self.candidates:
            wanted = getattr(observer, "layers", None)
            if wanted is None:
                wanted = range(depth) if idle else drops
            elif wanted == "all":
                wanted = range(depth)
            elif max(wanted, default=-1) >= depth:
                raise ValueError(f"an observer wants layer {max(wanted)}, and there are layers 0..{depth - 1}")
            chosen.update(wanted)
        return sorted(chosen)

    @property
    def everywhere(self) -> bool:
        """Tell whether some observer looks at layers themselves, of which an empty plan has no drop points."""
        return bool(self.layer or self.attention)

    @property
    def choosy(self) -> bool:
        """Tell whether some observer of candidates names its layers itself."""
        return any(getattr(observer, "layers", None) is not None for observer, _ in self.candidates)

    @property
    def needs(self) -> frozenset[str]:
        """Return what shall be computed at layers that are shown."""
        return frozenset[str]().union(*(getattr(o, "needs", ()) for o, _ in self.candidates))


def _check_layers(observer: Any) -> None:
    layers = getattr(observer, "layers", None)
    if layers is None or layers == "all":
        return
    if isinstance(layers, str) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers):
        raise ValueError(f'layers of an observer are a list of ints, "all" or None; got {layers!r:.80}')


def _empty(call: Callable[..., None], event: str) -> bool:
    return getattr(call, "__func__", None) is getattr(Observer, event)


class Stopwatch:
    """Adds up the time of two kinds of steps; of steps within each other the innermost is charged.

    Attributes:
        scoring: inside it, time is spent on choosing tokens.
        gathering: inside it, on gathering hidden states, tables and masks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._open: list[str] = []
        self._last = 0.0
        self.scoring, self.gathering = Charged(self, "scoring"), Charged(self, "gathering")

    def take(self) -> tuple[float, float]:
        """Seconds of scoring and of gathering since they were taken last."""
        return self._spent.pop("scoring", 0.0), self._spent.pop("gathering", 0.0)

    def switch(self, kind: str | None) -> None:
        """A step of ``kind`` begins; None: the one that began last is over."""
        now = seconds(self._device)
        if self._open:
            self._spent[self._open[-1]] = self._spent.get(self._open[-1], 0.0) + now - self._last
        if kind is None:
            self._open.pop()
        else:
            self._open.append(kind)
        self._last = time.perf_counter()


class Charged:
    """The length of a step, charged to its kind. Entered as often as wanted, also inside itself."""

    def __init__(self, watch: Stopwatch, kind: str) -> None:
        self._watch, self._kind = watch, kind

    def __enter__(self) -> None:
        self._watch.switch(self._kind)

    def __exit__(self, *_: Any) -> None:
        self._watch.switch(None)


def seconds(device: torch.device) -> float:
    """Now, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
