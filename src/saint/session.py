"""Apply a plan to a model and take it off again.

A session owns every change: checks come first, one ``ExitStack`` holds the undo of each patch, and after it nothing is left on
the user's modules. Two models in one process are independent.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .assemble import assemble
from .errors import AlreadyAppliedError, UnsupportedModelError
from .methods.base import Method
from .plan import Plan, Stage
from .runtime.layer import DropPoint
from .runtime.observe import Observers
from .tokens import LayerTrace
from .vision.encoder import PrunedEncoder

if TYPE_CHECKING:  # these import transformers
    from .language.decoder import KVMemory
    from .vlm.model import PrunedVLM

PlanLike = Plan | Stage | Method | str | os.PathLike[str]

# where a patched module keeps its session, in its `__dict__`: they are freed together
_SLOT = "_saint_session"
# models with an empty plan, which are not touched at all; these sessions hold no model
_UNTOUCHED: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StageStatus:
    """What is applied at one stage."""

    method: Method
    layers: list[int]
    placement: str
    module: str  # dotted path of the patched encoder in the model, "" for the model itself


@dataclass(frozen=True)
class Status:
    """What is applied to a model."""

    plan: Plan
    stages: dict[str, StageStatus]


class Session:
    """A plan applied to a model. Made by :func:`apply`."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self._stack = ExitStack()
        self._encoder: PrunedEncoder | None = None
        self._vlm: PrunedVLM | None = None

    @property
    def trace(self) -> list[LayerTrace]:
        """The drop points of the last forward, in order; empty before the first.

        In a vision-language model: of the last prompt; steps of ``generate`` leave it as it is. Entries of the vision stage
        count per image (or tile, or frame of a video), and count groups of patches where the model joins patches before its
        language model receives them; those of the connector and language stages per sample, over all its visual tokens.
        """
        vision = self._encoder.trace() if self._encoder is not None else []
        return vision + (self._vlm.decoder.trace() if self._vlm is not None else [])

    @property
    def kv_memory(self) -> "KVMemory | None":
        """Bytes of keys and values that the last prompt with images left in the cache, and what the unpruned model would
        hold; None for a plain encoder, before the first such prompt, and with ``use_cache=False``.
        """
        return self._vlm.decoder.memory if self._vlm is not None else None

    @property
    def status(self) -> Status:
        """What is applied, per stage."""
        stages: dict[str, Any] = {}
        for stack in (self._encoder, None if self._vlm is None else self._vlm.decoder):
            if stack is None:
                continue
            points = [*stack.entries, *stack.points.values()]
            for slot, planned in self.plan.slots.items():
                here = [point for point in points if point.stage == slot]
                found = []
                for group, stage in enumerate(planned):
                    own = [point for point in here if point.group == group and point.method is not None]
                    layers = [] if slot == "connector" else [point.layer for point in own]
                    if own:
                        found.append(StageStatus(stage.method, layers, _placement(own[0]), stack.path))
                if found:
                    stages[slot] = found[0] if len(found) == 1 else tuple(found)
        return Status(self.plan, stages)

    def expand(self, features: Tensor, layer: int | None = None) -> Tensor:
        """A shortened map of the last forward at full length: each dropped token shows the survivor that stands for it.

        Args:
            features: [B, P + K, C] or [B, K, C], e.g. ``last_hidden_state`` or one of ``hidden_states``.
            layer: the map in front of this layer (``hidden_states[layer]``); None means behind the last.

        Returns:
            [B, P + N, C] or [B, N, C]. The survivor is the nearest on the patch grid, or the most similar one with
            ``output="similar"``.

        Raises:
            RuntimeError: no forward has run.
            ValueError: ``features`` is not a map of that layer.
        """
        stage = self._encoder
        states = {} if stage is None else stage.forward.states
        if stage is None or not states:
            raise RuntimeError("expand() needs the tokens of a forward: run the model first")
        layer = stage.depth if layer is None else layer
        if layer not in states:
            raise ValueError(f"layer must be in 0..{stage.depth}, got {layer}")
        slots = states[layer].tokens.slots
        if features.ndim == 3 and features.shape[1] == stage.prefix + slots:
            return stage.expand(features, layer)
        if features.ndim == 3 and features.shape[1] == slots:
            head = features.new_zeros(features.shape[0], stage.prefix, features.shape[2])
            return stage.expand(torch.cat([head, features], 1), layer)[:, stage.prefix :]
        raise ValueError(
            f"features of shape {tuple(features.shape)} are not a map in front of layer {layer}, which has "
            f"{stage.prefix} protected and {slots} other tokens"
        )

    def remove(self) -> None:
        """Undo everything. A second call does nothing."""
        self._stack.close()
        for module in [m for m, session in _UNTOUCHED.items() if session is self]:
            del _UNTOUCHED[module]
        self._encoder = self._vlm = None

    def _install(self, model: nn.Module) -> None:
        with ExitStack() as stack:  # undone again if anything below fails
            if self._vlm is not None:
                self._vlm.install(stack)
                self._mark(stack, self._vlm.model)
            elif self._encoder is not None:
                self._encoder.install(stack)
            if self._encoder is not None:
                self._mark(stack, self._encoder.encoder)
            if self._vlm is None and self._encoder is None:
                _UNTOUCHED[model] = self
            else:
                self._mark(stack, model)
            self._stack = stack.pop_all()

    def _mark(self, stack: ExitStack, module: nn.Module) -> None:
        if _SLOT not in vars(module):
            vars(module)[_SLOT] = self
            stack.callback(vars(module).pop, _SLOT)


def _placement(point: DropPoint) -> str:
    """Where tokens leave; the connector stage lies in front of the language model, and has always said "post"."""
    return "post" if point.stage == "connector" else point.placement


def as_plan(plan: PlanLike) -> Plan:
    """A plan from a plan, a method (vision, default layers), a vision stage, or what :meth:`Plan.load` finds."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (Method, Stage)):
        return Plan(vision=plan)
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(plan)
    raise TypeError(
        f"plan must be a saint.Plan, a method such as saint.Saint(), a recipe's name or a plan file, got {plan!r}"
    )


def apply(model: nn.Module, plan: PlanLike, *, observers: Sequence[Any] = ()) -> Session:
    """Prune ``model`` in place, according to ``plan``.

    Args:
        model: a model of the support table (``saint list``), or one that contains exactly one.
        plan: a plan; a bare method means ``Plan(vision=method)``; a string names a recipe, or is looked up like
            :meth:`Plan.load` does.
        observers: objects with some of the methods of :class:`saint.Observer`, which are told of candidates, selections and
            times. An empty plan observes and drops nothing.

    Returns:
        The session; ``session.remove()`` gives the model back exactly as it was.

    Raises:
        AlreadyAppliedError: the model carries a session.
        UnsupportedModelError: no supported encoder, or it cannot do what the plan asks. The model is untouched.
        ParityError: the blocks are not what the support table says. The model is untouched.
        ValueError, TypeError: a bad plan.

    Example:
        >>> import timm, torch, saint
        >>> vit = timm.create_model("test_vit", pretrained=False).eval()
        >>> with saint.pruned(vit, saint.Saint(threshold=0.75)) as session:
        ...     logits = vit(torch.randn(1, 3, 160, 160))
    """
    plan = as_plan(plan)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "the model is compiled: apply the plan to the original model, then torch.compile it"
        )
    carried = next((m for m in model.modules() if _carried(m) is not None), None)
    if carried is not None:
        raise AlreadyAppliedError(
            f"a plan is already applied to this {type(carried).__name__}; call saint.remove(model) first"
        )
    session = Session(model, plan)
    session._vlm, session._encoder = assemble(model, plan, Observers(observers))
    session._install(model)
    return session


def remove(model: nn.Module) -> None:
    """Take off whatever is applied to ``model`` or inside it.

    Raises:
        ValueError: nothing is applied.
    """
    session = _session(model)
    if session is None:
        raise ValueError(f"no plan is applied to this {type(model).__name__}")
    session.remove()


def status(model: nn.Module) -> Status | None:
    """What is applied to ``model`` or inside it; None when clean."""
    session = _session(model)
    return None if session is None else session.status


def _carried(module: nn.Module) -> Session | None:
    return vars(module).get(_SLOT) or _UNTOUCHED.get(module)


def _session(model: nn.Module) -> Session | None:
    return next((found for m in model.modules() if (found := _carried(m)) is not None), None)


@contextmanager
def pruned(model: nn.Module, plan: PlanLike, *, observers: Sequence[Any] = ()) -> Iterator[Session]:
    """:func:`apply` for the length of a ``with`` block; undone also after an exception."""
    session = apply(model, plan, observers=observers)
    try:
        yield session
    finally:
        session.remove()
