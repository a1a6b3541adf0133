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
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..gathers import gather_tokens, merge_tokens, merged_sizes
from ..patch import Uncopyable, override, refuse_replicas
from ..tokens import Candidates, LayerTrace, Selection, reads_are_free
from ..upstream.autograd import checkpointed
from .attended import Attended, Attending
from .blocks import Block
from .forwards import Forwards
from .observe import Observers, Passed, Stopwatch, seconds
from .points import DropPoint, refuse_non_finite, select_some
from .state import Forward, LayerState


class Seen(NamedTuple):
    """What a layer shows at a drop point.

    Attributes:
        keys: attention keys averaged over heads, of the tokens behind the prefix, [Q, S, D].
        attention: attention of the last prompt token, float32 [Q, S], where it is needed.
    """

    keys: Tensor
    attention: Tensor | None = None


F = TypeVar("F", bound=Forward)


class LayerStack(ABC, Uncopyable, Generic[F]):
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
    prefix = 0  # protected tokens in front of every sequence, P
    carries = False  # what full length needs of dropped rows is kept, see `carry`
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
        self.path, self.module, self.modules = path, module, list(layers)
        self.depth = len(self.modules)
        self.entries = [point for point in points if point.placement == "input"]
        self.points = {point.layer: point for point in points if point.placement != "input"}
        self.forwards: Forwards[F] = Forwards(make, path or type(module).__name__)
        self.observers = observers
        self.first = 0  # the first layer that is patched
        self.blocks: list[Block | None] = [None] * self.depth
        self.watch: Stopwatch | None = None
        if observers.pruning_time:
            self._time_steps()

    @property
    def forward(self) -> F:
        """The forward that runs, or ran last."""
        return self.forwards.state

    def trace(self) -> list[LayerTrace]:
        """The drop points of the last forward, in order."""
        return self.forward.trace()

    def reset(self) -> None:
        """Forget all forwards."""
        self.forwards.forget()

    @property
    def wants_frames(self) -> bool:
        """Whether a method asks which candidates show the same place of a video at different times."""
        return any("frames" in point.needs for point in (*self.entries, *self.points.values()))

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

    def stand_in(self, keys: Tensor, selection: Selection) -> Tensor | None:
        """For each candidate the new slot that stands for it at full length, int64 [B, N]; None: not asked for."""
        return None

    def carry(self, state: LayerState, rows: Tensor, after: LayerState, stay: Tensor) -> LayerState:
        """``after`` with what full length needs of the rows in front of a drop, [B, N, C], and behind it, [B, K, C]."""
        return after

    def columns(self, forward: F, state: LayerState) -> int | None:
        """Of the grid of candidates, where there is one."""
        return None

    def least(self, forward: F, state: LayerState) -> tuple[int, ...] | None:
        """Tokens of each sample that stay at least; None: as many as the budget says."""
        return None

    def cells(self, forward: F, state: LayerState) -> Tensor | None:
        """Of each candidate, see :class:`saint.tokens.Candidates`, int64 [B, N]."""
        whole = forward.cells
        return None if whole is None else whole.gather(1, state.candidates.index)

    def where(self, point: DropPoint) -> str:
        """The keys of a drop point, for messages."""
        return f"the keys of {self.path} layer {point.layer}"

    def enter(self, forward: F, state: LayerState, features: Tensor | None) -> None:
        """Note the state in front of the first layer, behind the drop points that lie in front of it.

        Args:
            forward: begins.
            state: nothing was chosen yet.
            features: hidden states behind the prefix that enter the first layer, those of ``state``, [Q, S, C]; None where no
                drop point lies in front of it.
        """
        for point in self.entries:
            assert features is not None
            # saved for backward only where a row that is dropped here shows again: checkpoints recompute none of this
            features = features if self.carries else features.detach()
            after, chosen, selection = self.choose(forward, point, state, features.detach(), Seen(features.detach()))
            if chosen is not None and selection is not None:
                after, features = self.go(point, state, after, chosen, selection, features, 0)
            state = after
        forward.states[self.first] = state if state.tokens.whole else replace(state, full_length=True)

    # -- a drop point -------------------------------------------------------------------------------------------------

    def choose(
        self, forward: F, point: DropPoint, state: LayerState, features: Tensor, seen: Seen
    ) -> tuple[LayerState, Selection | None, Selection | None]:
        """Let the method choose.

        Args:
            forward: the forward.
            point: the drop point.
            state: in front of it.
            features: residual stream behind the prefix, [Q, S, C].
            seen: what shows there.

        Returns:
            The state behind it, which tokens of the sequences stay, and which candidates (None: all).
        """
        if point.step == 0 and point.method is not None:
            state = replace(state, began=state.candidates.lengths)
            for total in sorted({n for n in state.began if n}):
                point.method.validate(total, point.steps)
        keys, features = state.of_candidates(seen.keys), state.of_candidates(features.detach())
        if point.step == 0 and point.method is not None and reads_are_free(keys.device):
            refuse_non_finite(keys, self.where(point))
        attention = seen.attention
        if attention is not None:
            attention = state.of_candidates(attention.unsqueeze(-1)).squeeze(-1)
        columns = self.columns(forward, state)
        least = self.least(forward, state)
        cells = self.cells(forward, state) if "frames" in point.needs else None
        shown = Candidates(keys, features, state.counted, point.step, point.steps, attention, columns, least, cells)
        selection = self.select(point, shown)
        if selection is None:
            after, chosen = state, None
        else:
            after, chosen = state.after(selection, self.stand_in(keys, selection))
        if point.method is not None:
            forward.drops[point.stage, point.placement, point.layer] = state, after
        return after, chosen, selection

    def select(self, point: DropPoint, candidates: Candidates) -> Selection | None:
        """The method's decision, told to observers; samples without candidates have nothing to decide."""
        tokens = candidates.tokens
        if point.shown:
            for _, tell in self.observers.candidates:
                tell(point.stage, point.layer, candidates)
        if point.method is None:
            return None
        some = [sample for sample, n in enumerate(tokens.lengths) if n]
        if len(some) == len(tokens.lengths):
            selection = point.method.select(candidates)
        else:
            selection = select_some(point.method, candidates, some) if some else None
        if self.observers.selected:
            stays = selection
            if stays is None:
                slots = torch.arange(tokens.slots, device=tokens.index.device).expand_as(tokens.index)
                stays = Selection(slots, tokens.lengths, tokens.valid)
            for _, tell in self.observers.selected:
                tell(point.stage, point.layer, stays)
        return selection

    def drop(self, forward: F, point: DropPoint, state: LayerState, y: Tensor, seen: Seen) -> tuple[LayerState, Tensor]:
        """The state behind a drop point and its tokens: y [Q, P + S, C] -> [Q, P + K, C]."""
        after, chosen, selection = self.choose(forward, point, state, y[:, self.prefix :], seen)
        if chosen is None or selection is None:
            return after, y
        return self.go(point, state, after, chosen, selection, y, self.prefix)

    def go(
        self,
        point: DropPoint,
        state: LayerState,
        after: LayerState,
        chosen: Selection,
        selection: Selection,
        y: Tensor,
        prefix: int,
    ) -> tuple[LayerState, Tensor]:
        """What a decision makes of tokens.

        Args:
            point: where.
            state: in front of it.
            after: behind it, as far as the decision alone says.
            chosen: which tokens of the sequences stay.
            selection: which candidates.
            y: [Q, prefix + S, C].
            prefix: protected tokens in ``y``.

        Returns:
            The state behind it, and [Q, prefix + K, C].
        """
        old = y
        if selection.owner is None:
            y = gather_tokens(y, chosen.slots, prefix)
            return self.carry(state, old[:, prefix:], after, y[:, prefix:]), y
        assert point.method is not None
        tokens, sizes = state.candidates, state.sizes
        if sizes is None:
            like = torch.ones_like(tokens.index) if tokens.valid is None else tokens.valid
            sizes = like.to(torch.float32)
        if not point.method.averages:
            y, sizes = gather_tokens(y, chosen.slots, prefix), merged_sizes(sizes, selection)
        elif state.places is None:
            y, sizes = merge_tokens(y, sizes, selection, prefix)
        else:
            rows, sizes = merge_tokens(state.of_candidates(y), sizes, selection, 0)
            y = after.put(gather_tokens(y, chosen.slots, prefix), rows)
        after = self.carry(state, old[:, prefix:], after, y[:, prefix:])
        return replace(after, sizes=sizes, beta=point.method.size_bias()), y

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

    # -- time ---------------------------------------------------------------------------------------------------------

    def _time_steps(self) -> None:
        self.watch = watch = Stopwatch(next(self.module.parameters()).device)
        for kind, names in (("scoring", ("select", "keys")), ("gathering", ("drop", "arguments", "leave"))):
            for name in names:
                if hasattr(self, name):
                    setattr(self, name, watch.timed(kind, getattr(self, name)))


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
