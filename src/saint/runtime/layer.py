"""The one mechanism: a layer runs on the tokens that are left.

The ``forward`` of each layer is replaced, on the instance, by a :class:`PrunedLayer`. It takes the state in front of the layer,
gives the layer what its tokens need, lets the method choose at a drop point, gathers what stays, and hands the state on. What
differs between encoders and decoders is behind :class:`LayerStack`: how a layer's arguments are cut to the tokens, where its
keys show, and what the caller must see at full length.

Letters: Q sequences, S tokens of a sequence, P prefix tokens, B samples, N candidates, C channels, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..gathers import gather_tokens, merge_tokens
from ..patch import Uncopyable, override, refuse_replicas
from ..tokens import Selection
from ..upstream.autograd import checkpointed
from .attended import Attended, Attending
from .blocks import Block
from .deciding import Decider, F, Seen
from .observe import Observers, Passed, seconds
from .points import DropPoint
from .state import LayerState

C = TypeVar("C")  # the arguments of a layer's call behind the hidden states


class LayerStack(Decider[F], ABC, Generic[F, C]):
    """The layers of one module.

    Args:
        path: where the module sits in the user's model, for messages.
        module: owns the layers.
        layers: its layers.
        points: where tokens may go or are shown, in the order of the forward.
        make: makes what a new forward knows.
        observers: of the session.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        layers: Sequence[nn.Module],
        points: Sequence[DropPoint],
        make: Callable[[], F],
        observers: Observers,
    ) -> None:
        super().__init__(path, module, points, make, observers)
        self.modules = list(layers)
        self.depth = len(self.modules)
        self.first = 0  # the first layer that is patched
        self.blocks: list[Block | None] = [None] * self.depth

    @property
    def first_short(self) -> int:
        """The first layer that tokens may be missing from."""
        drops = [layer for layer, point in self.points.items() if point.method is not None]
        return 0 if any(point.method is not None for point in self.entries) else min(drops, default=self.depth - 1) + 1

    def replace_layers(self, stack: ExitStack) -> None:
        """Patch the layers from ``first`` on; ``stack`` undoes it."""
        refuse_replicas(stack, self.module)
        timed = self.observers.layer_time or self.observers.pruning_time
        kinds = [TimedLayer] * self.depth if timed else self.layer_kinds
        for index in range(self.first, self.depth):
            refuse_replicas(stack, self.modules[index])
            override(stack, self.modules[index], "forward", partial(kinds[index], self, index))
        stack.callback(self.reset)

    @property
    def layer_kinds(self) -> "Sequence[type[PrunedLayer]]":
        """Return what stands in for each layer."""
        return [PrunedLayer] * self.depth

    # -- what differs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def named(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], C]:
        """The arguments of a call behind the hidden states, by name or role; those without either as they came."""

    @abstractmethod
    def arrive(self, layer: int, x: Tensor, call: C) -> tuple[F, LayerState | None]:
        """The forward and the state in front of ``layer``; None where nothing can go in this forward. x [Q, P + S, C]."""

    @abstractmethod
    def run(
        self, forward: F, layer: int, state: LayerState, original: Callable[..., Any], x: Tensor, call: C
    ) -> tuple[Any, Seen | None]:
        """Run a layer, or its first half, on its tokens; at a drop point also what it shows."""

    @abstractmethod
    def leave(self, forward: F, layer: int, state: LayerState, y: Tensor, call: C) -> Tensor:
        """Note the state behind ``layer``, and give the hidden states the length that is expected there.

        ``call`` is what the layer was called with.
        """

    def unpruned(self, forward: F, layer: int, original: Callable[..., Any], x: Tensor, call: C) -> Any:
        """Run a layer in a forward in which nothing can go, of modules that have such."""
        raise NotImplementedError

    def begin_layers(self, forward: F, state: LayerState, features: Tensor | None) -> None:
        """Note the state in front of the first layer, behind the drop points that lie in front of it.

        Args:
            forward: begins.
            state: nothing was chosen yet.
            features: hidden states behind the prefix that enter the first layer, those of ``state``, [Q, S, C]; None where no
                drop point lies in front of it.
        """
        if self.entries:
            assert features is not None
            # saved for backward only where a row that is dropped here shows again: checkpoints recompute none of this
            state, _ = self.pass_entries(forward, state, features if self.carries else features.detach())
        forward.states[self.first] = state if state.tokens.nothing_dropped else replace(state, full_length=True)

    def apply_to_full(self, layer: int, state: LayerState, x: Tensor) -> Tensor:
        """The tokens that are left, of hidden states of full length: [Q, P + N, C] -> [Q, P + K, C].

        Where tokens have left in front of the first layer, it is what stood there; else the layer before has expanded it.
        """
        if layer == self.first and any(
            p.method is not None and p.method.merges and p.method.averages for p in self.entries
        ):
            assert state.merged_into is not None
            real = torch.ones(x.shape[0], x.shape[1] - self.prefix, device=x.device)
            origin = self.forward.origin
            if origin is not None and origin.candidates.valid is not None:
                real = origin.candidates.valid.to(real.dtype)
            tokens = state.tokens
            return merge_tokens(
                x, real, Selection(tokens.index, tokens.lengths, tokens.valid, state.merged_into), self.prefix
            )[0]
        return gather_tokens(x, state.tokens.index, self.prefix)


class PrunedLayer(Uncopyable):
    """Stands in for ``layer.forward`` on one instance."""

    def __init__(self, stack: LayerStack[Any, Any], layer: int, original: Callable[..., Any]) -> None:
        self.stack, self.layer, self.original = stack, layer, original
        self.point = stack.points.get(layer)
        self.split = self.point is not None and self.point.placement == "mid"

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack, layer, point = self.stack, self.layer, self.point
        args, call = stack.named(layer, args, kwargs)
        forward, state = stack.arrive(layer, x, call)
        if state is None:
            return stack.unpruned(forward, layer, self.original, x, call)
        flat = x.ndim == 2  # all samples in one sequence without batch axis
        x = x.unsqueeze(0) if flat else x
        if state.full_length:
            x = stack.apply_to_full(layer, state, x)
            state = replace(state, full_length=False)
        block, original = stack.blocks[layer], self.original
        if self.split:
            assert block is not None
            original = checkpointed(block.module, block.first)
        elif args:
            original = lambda x, **given: self.original(x, *args, **given)  # noqa: E731
        came, before = state, x
        with self._listening(state) if stack.observers.attention else nullcontext():
            out, seen = stack.run(forward, layer, state, original, x, call)
        y = out[0] if isinstance(out, tuple) else out
        if point is not None:
            assert seen is not None
            with stack.gathering:
                # the decision is not held: what it chose with would stay in memory while the second half runs
                state, y = stack.apply(stack.decide(forward, point, state, y[:, stack.prefix :], seen), y, stack.prefix)
        if self.split:
            assert block is not None
            y = checkpointed(block.module, block.second)(y)
        for _, tell in stack.observers.layer:
            tell(stack.slot, layer, Passed(before.detach(), y.detach(), stack.prefix, came, state))
        with stack.gathering:
            y = stack.leave(forward, layer, state, y, call)
        y = y.squeeze(0) if flat else y
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _listening(self, state: LayerState) -> Attending:
        """Tells observers of the attention that runs inside."""
        stack = self.stack

        def tell_all(attended: Attended) -> None:
            for _, tell in stack.observers.attention:
                tell(stack.slot, self.layer, attended)

        return Attending(tell_all, stack.prefix, state)


class TimedLayer(PrunedLayer):
    """Tells observers how long it took."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.layer
        start = seconds(x.device)
        out = super().__call__(x, *args, **kwargs)
        elapsed = seconds(x.device) - start
        for _, tell in stack.observers.layer_time:
            tell(stack.slot, layer, elapsed)
        if stack.watch is not None:
            spent = stack.watch.take()
            for _, tell in stack.observers.pruning_time:
                tell(stack.slot, layer, *spent)
        return out
