"""What happens at a drop point: a method is shown the candidates, and its decision is carried out on the tokens.

Where drop points lie is another matter: in and behind the layers of a module (``layer.LayerStack``), or in front of a language
model (``language.doorway``).

Letters: Q sequences, S tokens of a sequence, P prefix tokens, B samples, N candidates, C channels, D head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..gathers import added, gather_tokens, merge_tokens, merged_sizes
from ..needs import TOWER
from ..patch import Uncopyable
from ..tokens import Candidates, Selection, reads_are_free
from .forwards import Forwards
from .observe import Observers, Stopwatch
from .points import DropPoint, refuse_non_finite, select_some
from .state import Forward, LayerState


class Seen(NamedTuple):
    """What a layer shows at a drop point.

    Attributes:
        keys: attention keys averaged over heads, of the tokens behind the prefix, [Q, S, D].
        rows: attention of tokens that a method wants asked, by what it needs, float32 [Q, S].
        received: of encoders, what is asked of their attention, in order, float32 [Q, S, kinds]; see ``received.py``.
    """

    keys: Tensor
    rows: Mapping[str, Tensor] = {}
    received: Tensor | None = None


class Decision(NamedTuple):
    """What was decided at a drop point.

    Attributes:
        point: the drop point.
        before: the state in front of it.
        after: the state behind it, as far as the decision alone says.
        selection: which candidates stay; None: all.
        tokens: which tokens of the sequences stay; None: all.
    """

    point: DropPoint
    before: LayerState
    after: LayerState
    selection: Selection | None
    tokens: Selection | None


F = TypeVar("F", bound=Forward)


class Decider(Uncopyable, Generic[F]):
    """Drop points of one module, and the forwards that pass them.

    Args:
        path: where the module sits in the user's model, for messages.
        module: the module.
        points: where tokens may go or are shown, in the order of the forward.
        make: makes what a new forward knows.
        observers: of the session.
    """

    slot: str  # of a plan
    depth: int  # layers of the module
    prefix = 0  # protected tokens in front of every sequence, P
    carries = False  # what full length needs of dropped rows is kept, see `carry`

    def __init__(
        self, path: str, module: nn.Module, points: Sequence[DropPoint], make: Callable[[], F], observers: Observers
    ) -> None:
        self.path, self.module, self.observers = path, module, observers
        self.entries = [point for point in points if point.placement == "input"]
        self.points = {point.layer: point for point in points if point.placement != "input"}
        self.forwards: Forwards[F] = Forwards(make, path or type(module).__name__)
        self.watch = Stopwatch(next(module.parameters()).device) if observers.pruning_time else None
        self.scoring: AbstractContextManager[None] = nullcontext() if self.watch is None else self.watch.scoring
        self.gathering: AbstractContextManager[None] = nullcontext() if self.watch is None else self.watch.gathering

    @property
    def forward(self) -> F:
        """The forward that runs, or ran last."""
        return self.forwards.state

    def reset(self) -> None:
        """Forget all forwards."""
        self.forwards.forget()

    @property
    def wants_frames(self) -> bool:
        """Tell whether a method asks which candidates show the same place of a video at different times."""
        return any(point.needs & {"frames", "pixels"} for point in (*self.entries, *self.points.values()))

    @property
    def wants_pixels(self) -> bool:
        """Tell whether a method in front of the first layer asks what its candidates show."""
        return any("pixels" in point.needs for point in self.entries)

    @property
    def wants_channels(self) -> bool:
        """Tell whether such a method asks which values of a patch are of one channel."""
        return any("channels" in point.needs for point in self.entries)

    @property
    def wants_text(self) -> bool:
        """Tell whether a method in front of the first layer asks for the other tokens of a prompt."""
        return any("text" in point.needs for point in self.entries)

    @property
    def wants_tower(self) -> bool:
        """Tell whether a method in front of the first layer asks what the vision tower showed."""
        return any(point.needs & TOWER for point in self.entries)

    @property
    def resize(self) -> int | float | None:
        """Return what is left of pictures that get smaller in front of everything; None where they stay as they are."""
        return next((p.method.fixed for p in self.entries if p.method is not None and "resized" in p.needs), None)

    # -- what differs -------------------------------------------------------------------------------------------------

    def stand_in(self, keys: Tensor, selection: Selection) -> Tensor | None:
        """For each candidate the new slot that stands for it at full length, int64 [B, N]; None: not asked for."""
        return None

    def carry(self, state: LayerState, rows: Tensor, after: LayerState, stay: Tensor) -> LayerState:
        """``after`` with what full length needs of the rows in front of a drop, [B, N, C], and behind it, [B, K, C]."""
        return after

    def where(self, point: DropPoint) -> str:
        """The keys of a drop point, for messages."""
        return f"the keys of {self.path} layer {point.layer}"

    def rows(self, forward: F, point: DropPoint, state: LayerState, seen: Seen) -> dict[str, Tensor]:
        """Give what a drop point shows of each candidate, by what its method needs, float32 [B, N]."""
        return {name: state.of_candidates(row.unsqueeze(-1)).squeeze(-1) for name, row in seen.rows.items()}

    # -- a drop point -------------------------------------------------------------------------------------------------

    def pass_entries(self, forward: F, state: LayerState, features: Tensor) -> tuple[LayerState, Tensor]:
        """The drop points in front of the first layer.

        Args:
            forward: begins.
            state: nothing was chosen yet.
            features: hidden states behind the prefix that enter the first layer, those of ``state``, [Q, S, C].

        Returns:
            The state behind them, and its features, [Q, K, C].
        """
        for point in self.entries:
            decision = self.decide(forward, point, state, features.detach(), Seen(features.detach()))
            state, features = self.apply(decision, features, 0)
        if forward.facts is not None:  # of no use behind, and large
            forward.facts = replace(forward.facts, pixels=None, text=None, tower=None)
        return state, features

    def decide(self, forward: F, point: DropPoint, state: LayerState, features: Tensor, seen: Seen) -> Decision:
        """Let the method decide which candidates stay.

        Args:
            forward: the forward.
            point: the drop point.
            state: in front of it.
            features: residual stream behind the prefix, [Q, S, C].
            seen: what shows there.
        """
        if point.step == 0 and point.method is not None:
            state = replace(state, stage_total=state.candidates.lengths)
            for total in sorted({n for n in state.stage_total if n}):
                point.method.validate(total, point.steps)
        keys, features = state.of_candidates(seen.keys), state.of_candidates(features.detach())
        if point.step == 0 and point.method is not None and reads_are_free(keys.device):
            refuse_non_finite(keys, partial(self.where, point))
        rows = self.rows(forward, point, state, seen) if point.needs else {}
        counted = state.counted
        assert forward.facts is not None
        facts = forward.facts.at(counted.index)
        shown = Candidates(keys, features, counted, point.step, point.steps, rows.pop("last_query", None), facts, rows)
        with self.scoring:
            selection = self._asked(point, shown)
        after, tokens = state, None
        if selection is not None:
            after, tokens = state.after(selection, self.stand_in(keys, selection))
        if point.method is not None:
            forward.drops[point.slot, point.placement, point.layer, point.group] = state, after
        return Decision(point, state, after, selection, tokens)

    def _asked(self, point: DropPoint, candidates: Candidates) -> Selection | None:
        """The method's decision, told to observers; samples without candidates have nothing to decide."""
        tokens = candidates.tokens
        if point.shown:
            for _, tell in self.observers.candidates:
                tell(point.slot, point.layer, candidates)
        if point.method is None:
            return None
        if all(tokens.lengths):
            selection = point.method.select(candidates)
        else:
            some = [sample for sample, n in enumerate(tokens.lengths) if n]
            selection = select_some(point.method, candidates, some) if some else None
        if self.observers.selected or self.observers.decided:
            stays = selection
            if stays is None:
                slots = torch.arange(tokens.slots, device=tokens.index.device).expand_as(tokens.index)
                stays = Selection(slots, tokens.lengths, tokens.valid)
            for _, tell in self.observers.selected:
                tell(point.slot, point.layer, stays)
            for _, tell in self.observers.decided:
                tell(point.slot, point.layer, candidates, stays)
        return selection

    def apply(self, decision: Decision, y: Tensor, prefix: int) -> tuple[LayerState, Tensor]:
        """Carry a decision out on tokens.

        Args:
            decision: the decision.
            y: in front of the drop point, [Q, prefix + S, C].
            prefix: protected tokens in ``y``.

        Returns:
            The state behind it, and [Q, prefix + K, C].
        """
        state, after, selection, stays = decision.before, decision.after, decision.selection, decision.tokens
        if selection is None or stays is None:
            return after, y
        method, slots = decision.point.method, stays.slots
        old = y
        if selection.adds is not None:
            rows = state.of_candidates(y[:, prefix:])
            return after, after.put(gather_tokens(y, slots, prefix), added(rows, selection))
        if selection.owner is None or (method is not None and not method.merges):
            y = gather_tokens(y, slots, prefix)
            return self.carry(state, old[:, prefix:], after, y[:, prefix:]), y
        assert method is not None
        tokens, sizes = state.candidates, state.sizes
        if sizes is None:
            like = torch.ones_like(tokens.index) if tokens.valid is None else tokens.valid
            sizes = like.to(torch.float32)
        if not method.averages:
            y, sizes = gather_tokens(y, slots, prefix), merged_sizes(sizes, selection)
        elif state.places is None:
            y, sizes = merge_tokens(y, sizes, selection, prefix)
        else:
            rows, sizes = merge_tokens(state.of_candidates(y), sizes, selection, 0)
            y = after.put(gather_tokens(y, slots, prefix), rows)
        after = self.carry(state, old[:, prefix:], after, y[:, prefix:])
        return replace(after, sizes=sizes, beta=method.size_bias()), y
