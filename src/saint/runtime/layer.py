"""The one mechanism: a layer runs on the tokens that are left.

The ``forward`` of each layer is replaced, on the instance, by a :class:`PrunedLayer`. It takes the state in front of the layer,
gives the layer what its tokens need, lets the method choose at a drop point, gathers what stays, and hands the state on. What
differs between encoders and decoders is behind :class:`LayerStack`: how a layer's arguments are cut to the tokens, where its
keys show, and what the caller must see at full length.

Letters: Q sequences, S tokens of a sequence, P prefix tokens, B samples, N candidates, C channels, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

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


class LayerStack(Decider[F], ABC):
    """The layers of one module.

    Args:
        path: where the module sits in the user's model, for messages.
        module: owns the layers.
        layers: its layers.
        points: where tokens may go or are shown, in the order of the forward.
        make: makes what a new forward knows.
        observers: of the session.
    """

    stage: str
    packed = False  # hidden states come without batch axis

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
        for index in range(self.first, self.depth):
            refuse_replicas(stack, self.modules[index])
            override(stack, self.modules[index], "forward", partial(PrunedLayer, self, index))
        stack.callback(self.reset)

    # -- what differs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def named(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call behind the hidden states, by name as far as names are known."""

    @abstractmethod
    def arrive(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[F, LayerState | None]:
        """The forward and the state in front of ``layer``; None where nothing can go in this forward. x [Q, P + S, C]."""

    @abstractmethod
    def run(
        self,
        forward: F,
        layer: int,
        state: LayerState,
        call: Callable[..., Any],
        x: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Seen | None]:
        """Run a layer, or its first half, on its tokens; at a drop point also what it shows."""

    @abstractmethod
    def leave(self, forward: F, layer: int, state: LayerState, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Note the state behind ``layer``, and give the hidden states the length that is expected there.

        ``kwargs`` are the arguments that the layer was called with.
        """

    def unpruned(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer in a forward in which nothing can go."""
        return kwargs

    def enter(self, forward: F, state: LayerState, features: Tensor | None) -> None:
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
        forward.states[self.first] = state if state.tokens.whole else replace(state, full_length=True)

    def shorten(self, layer: int, state: LayerState, x: Tensor) -> Tensor:
        """The tokens that are left, of hidden states of full length: [Q, P + N, C] -> [Q, P + K, C].

        Where tokens have left in front of the first layer, it is what stood there; else the layer before has expanded it.
        """
        if layer == self.first and any(
            p.method is not None and p.method.merges and p.method.averages for p in self.entries
        ):
            assert state.merged is not None
            real = torch.ones(x.shape[0], x.shape[1] - self.prefix, device=x.device)
            origin = self.forward.origin
            if origin is not None and origin.candidates.valid is not None:
                real = origin.candidates.valid.to(real.dtype)
            tokens = state.tokens
            return merge_tokens(
                x, real, Selection(tokens.index, tokens.lengths, tokens.valid, state.merged), self.prefix
            )[0]
        return gather_tokens(x, state.tokens.index, self.prefix)


class PrunedLayer(Uncopyable):
    """Stands in for ``layer.forward`` on one instance."""

    def __init__(self, stack: LayerStack[Any], layer: int, original: Callable[..., Any]) -> None:
        self.stack, self.layer, self.original = stack, layer, original
        self.point = stack.points.get(layer)
        self.split = self.point is not None and self.point.placement == "mid"

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        observers = self.stack.observers
        if not observers.layer_time and not observers.pruning_time:
            return self._run(x, args, kwargs)
        start = seconds(x.device)
        out = self._run(x, args, kwargs)
        self._tell(seconds(x.device) - start)
        return out

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack, layer, point = self.stack, self.layer, self.point
        args, kwargs = stack.named(layer, args, kwargs)
        forward, state = stack.arrive(layer, x, kwargs)
        if state is None:
            return self.original(x, *args, **stack.unpruned(layer, x, kwargs))
        x = x.unsqueeze(0) if stack.packed else x
        if state.full_length:
            x = stack.shorten(layer, state, x)
            state = replace(state, full_length=False)
        block, call = stack.blocks[layer], self.original
        if self.split:
            assert block is not None
            call = checkpointed(block.module, block.first)
        elif args:
            call = lambda x, **given: self.original(x, *args, **given)  # noqa: E731
        came, before = state, x
        with self._listening(state):
            out, seen = stack.run(forward, layer, state, call, x, kwargs)
        y = out[0] if isinstance(out, tuple) else out
        if point is not None:
            assert seen is not None
            state, y = stack.drop(forward, point, state, y, seen)
        if self.split:
            assert block is not None
            y = checkpointed(block.module, block.second)(y)
        for _, tell in stack.observers.layer:
            tell(stack.stage, layer, Passed(before.detach(), y.detach(), stack.prefix, came, state))
        y = stack.leave(forward, layer, state, y, kwargs)
        y = y.squeeze(0) if stack.packed else y
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _listening(self, state: LayerState) -> AbstractContextManager[Any]:
        """Tells observers of the attention that runs inside."""
        stack, listeners = self.stack, self.stack.observers.attention
        if not listeners:
            return nullcontext()

        def tell_all(attended: Attended) -> None:
            for _, tell in listeners:
                tell(stack.stage, self.layer, attended)

        return Attending(tell_all, stack.prefix, state)

    def _tell(self, elapsed: float) -> None:
        stack, observers, stage = self.stack, self.stack.observers, self.stack.stage
        for _, tell in observers.layer_time:
            tell(stage, self.layer, elapsed)
        if stack.watch is not None:
            spent = stack.watch.take("scoring"), stack.watch.take("gathering")
            for _, tell in observers.pruning_time:
                tell(stage, self.layer, *spent)
