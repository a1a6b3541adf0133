"""Apply a plan to a model and take it off again.

A session owns every change: checks come first, an ``ExitStack`` holds the undo of each patch, and after it nothing is left on
the user's modules. Two models in one process are independent.
"""

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .assemble import assemble
from .errors import AlreadyAppliedError, UnsupportedModelError
from .methods.base import Method
from .models import ModelLike, module_of
from .patch import Before, Uncopyable, hide
from .planning import plan_for
from .plans import STAGES, Plan, Stage
from .presets import family
from .runtime.deciding import Decider
from .runtime.observe import Observers
from .runtime.state import Forward
from .summary import (
    Costs,
    Drops,
    StageStatus,
    Status,
    Summary,
    describe,
    encoder_left,
    encoder_work,
    prefill_left,
    tokens_per_layer,
)
from .tokens import LayerTrace
from .vision.encoder import PrunedEncoder
from .vision.inputs import EncoderForward
from .vlm.locate import find as find_family
from .vlm.part import refuse_part

if TYPE_CHECKING:  # imports transformers
    from .language.cache import KVMemory
    from .language.doorway import Handover


PlanLike = Plan | Stage | Method | str | os.PathLike[str]

# where a patched module keeps its session, in its `__dict__`: they are freed together
_SLOT = "_saint_session"
# models with an empty plan, which are not touched at all; these sessions hold no model
_UNTOUCHED: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()


class Glue(Protocol):
    """What a session installs: an encoder, or the model around a language model.

    Attributes:
        patched: holds all that is patched.
        marked: modules by which the session is found, besides the user's model.
        stacks: where tokens may leave, in the order in which they pass.
        alone: may be a part of a vision-language model that knows nothing of what leaves in it; None where that cannot be.
        handover: where a prompt ends is told to it; None of an encoder.
    """

    @property
    def handover(self) -> "Handover | None": ...

    @property
    def alone(self) -> nn.Module | None: ...

    @property
    def patched(self) -> nn.Module: ...

    @property
    def marked(self) -> tuple[nn.Module, ...]: ...

    @property
    def stacks(self) -> Sequence[Decider[Any]]: ...

    def install(self, stack: ExitStack) -> None: ...


@dataclass(frozen=True)
class _Over:
    """What a removed session still tells: of its last forward which tokens stayed. Holds no module and no activations."""

    forwards: dict[str, Forward]  # by slot
    costs: Costs


class Session(Uncopyable):
    """A plan applied to a model. Made by :func:`apply`; as a context manager it is removed at the end of the block.

    Example:
        >>> import timm, torch, saint
        >>> vit = timm.create_model("test_vit", pretrained=False).eval()
        >>> images = torch.randn(2, 3, 160, 160)
        >>> with saint.apply(vit, saint.Saint(threshold=0.75)) as session:
        ...     logits = vit(images)
        ...     with session.disabled():
        ...         unpruned = vit(images)
        ...     text = str(session.summary())
    """

    def __init__(self, model: nn.Module, plan: Plan, glue: Glue | None) -> None:
        self.plan, self._glue = plan, glue
        self._stacks = () if glue is None else glue.stacks
        self._model = type(model).__name__
        self._marks, self._patches = ExitStack(), ExitStack()
        self._disabled = 0  # blocks of disabled() that are open
        self._over: _Over | None = None  # once removed
        self._status = Status(plan, {slot: self._stages(slot, stages) for slot, stages in plan.slots.items()})
        # layers by slot: those in front of which the connector stage lies are of the language model
        self._depths = {"language" if s.slot == "connector" else s.slot: s.depth for s in self._stacks}
        self._full = next((s.outputs.full for s in self._stacks if isinstance(s, PrunedEncoder)), None)

    def __enter__(self) -> "Session":
        if self._over is not None:
            raise RuntimeError("this session has been removed; saint.apply(model, plan) makes a new one")
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._over is not None:
            return f"<Session: removed on {self._model}>"
        return describe(self._model, "disabled" if self._disabled else "applied", self.status)

    @property
    def trace(self) -> list[LayerTrace]:
        """The drop points of the last forward, in order; empty before the first. Stays when the session has been removed.

        In a vision-language model: of the last prompt; steps of ``generate`` leave it as it is. Entries of the vision stage
        count per image (or tile, or frame of a video), and count groups of patches where the model joins patches before its
        language model receives them; those of the connector and language stages per sample, over all its visual tokens.
        """
        return [entry for slot in STAGES if (told := self._forward(slot)) is not None for entry in told.trace()]

    @property
    def kv_memory(self) -> "KVMemory | None":
        """Bytes of keys and values that the last prompt with images left in the cache, and what the unpruned model would
        hold; None for a plain encoder, before the first such prompt, and with ``use_cache=False``. Stays like the trace.
        """
        return getattr(self._forward("connector"), "memory", None)

    def _forward(self, slot: str) -> Forward | None:
        """The last forward of the encoder, in front of the language model ("connector") or of the language stage."""
        if self._over is not None:
            return self._over.forwards.get(slot)
        return next((stack.forward for stack in self._stacks if stack.slot == slot), None)

    @property
    def _costs(self) -> Costs:
        """Return what the FLOPs of the last forward follow from."""
        if self._over is not None:
            return self._over.costs
        encoder = next((encoder_work(stack) for stack in self._stacks if isinstance(stack, PrunedEncoder)), None)
        door = next((stack for stack in self._stacks if stack.slot == "connector"), None)
        return Costs(encoder, getattr(door, "work", None), getattr(self._forward("connector"), "counts", None))

    @property
    def status(self) -> Status:
        """Return what is applied, per stage; of a session that has been removed, what was."""
        return self._status

    def _stages(self, slot: str, stages: tuple[Stage, ...]) -> tuple[StageStatus, ...]:
        stack = next(stack for stack in self._stacks if stack.slot == slot)
        if slot == "connector":  # in front of the language model, and has always said "post"
            return tuple(StageStatus(stage.method, [], "post", stack.path) for stage in stages)
        points = [p for p in (*stack.entries, *stack.points.values()) if p.method is not None]
        own = [[p for p in points if p.group == group] for group in range(len(stages))]
        return tuple(
            StageStatus(stage.method, [p.layer for p in mine], mine[0].placement, stack.path)
            for stage, mine in zip(stages, own, strict=True)
        )

    def summary(self) -> Summary:
        """Sum up what the last forward dropped, and what that left of its tokens, FLOPs and cache.

        Raises:
            RuntimeError: no forward with candidates has run.
        """
        trace = self.trace
        if not trace:
            raise RuntimeError(
                "summary() needs the drop points of a forward with candidates (images, or a prompt), and there are none "
                "yet: run the model first"
                if self.plan.slots
                else "summary() has nothing to tell: the plan is empty"
            )
        memory, costs = self.kv_memory, self._costs
        layers = {stage: tokens_per_layer(trace, stage, depth) for stage, depth in self._depths.items()}
        return Summary(
            model=self._model,
            drops=tuple(Drops.of(entry) for entry in trace),
            layers={stage: counts for stage, counts in layers.items() if counts},
            flops_left=None if costs.encoder is None else encoder_left(costs.encoder, trace),
            prefill_left=None
            if costs.decoder is None or costs.prompt is None
            else prefill_left(costs.decoder, costs.prompt, trace),
            kv_kept=None if memory is None else memory.kept,
            kv_unpruned=None if memory is None else memory.unpruned,
        )

    def expand(self, features: Tensor, layer: int | None = None) -> Tensor:
        """A shortened map of the last forward at full length: each dropped token shows the survivor that stands for it.

        Args:
            features: [B, P + K, C] or [B, K, C], e.g. ``last_hidden_state`` or one of ``hidden_states``.
            layer: the map in front of this layer (``hidden_states[layer]``); None means behind the last.

        Returns:
            [B, P + N, C] or [B, N, C]. The survivor is the nearest on the patch grid, or the most similar one with
            ``output="similar"``.

        Raises:
            RuntimeError: no forward has run; or the session has been removed, and ``output="carried"`` needs rows of the forward.
            ValueError: ``features`` is not a map of that layer.
        """
        forward, full = self._forward("vision"), self._full
        if full is None or not isinstance(forward, EncoderForward) or not forward.states:
            raise RuntimeError("expand() needs the tokens of a forward: run the model first")
        depth, prefix = self._depths["vision"], full.prefix
        layer = depth if layer is None else layer
        if layer not in forward.states:
            raise ValueError(f"layer must be in 0..{depth}, got {layer}")
        slots = forward.states[layer].tokens.slots
        if features.ndim == 3 and features.shape[1] == prefix + slots:
            return full.expand(forward, features, layer)
        if features.ndim == 3 and features.shape[1] == slots:
            head = features.new_zeros(features.shape[0], prefix, features.shape[2])
            return full.expand(forward, torch.cat([head, features], 1), layer)[:, prefix:]  # [B, N, C]
        raise ValueError(
            f"features of shape {tuple(features.shape)} are not a map in front of layer {layer}, which has "
            f"{prefix} protected and {slots} other tokens"
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model runs unpruned, exactly as if nothing were applied; behind it pruned again.

        The patches are taken off and put on again, for all threads; the session stays the model's (``saint.status``, and
        ``saint.remove`` inside the block removes it for good). The trace, and caches of ``generate``, are kept: a cache filled
        under the plan is refused inside the block and goes on behind it. Blocks may be nested.

        Raises:
            RuntimeError: the session has been removed.
        """
        if self._over is not None:
            raise RuntimeError("this session has been removed, so the model runs unpruned already")
        if not self._disabled:
            with ExitStack() as held:
                for stack in self._stacks:
                    held.enter_context(stack.forwards.held())
                self._patches.close()
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1
            if not self._disabled and self._over is None:
                try:
                    self._put_on()
                except BaseException:
                    self.remove()  # nothing half patched
                    raise

    @contextmanager
    def prompt(self, length: int) -> Iterator[None]:
        """Inside the block, what stands behind the first ``length`` positions of a sequence is an answer.

        Methods may look at the text of a prompt, and those of a language model without images choose among it. Where prompt and
        answer run in one forward (teacher forcing, the likelihood of an answer), this says where the prompt ends, so that they
        decide as they do when the answer is generated. Padding is in front. On the calling thread alone.

        Args:
            length: positions of the prompt, with padding and what is cached, >= 1.

        Raises:
            ValueError: an encoder, which has no prompts, or a wrong length.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be an integer of at least 1, got {length!r}")
        if self._glue is None:  # an empty plan, or one that has been removed
            yield
            return
        if self._glue.handover is None:
            raise ValueError(f"{self._model} has no prompts: it is an encoder")
        with self._glue.handover.prompting(length):
            yield

    def remove(self) -> None:
        """Undo everything; what the last forward dropped can still be read. A second call does nothing."""
        try:
            if self._over is None:  # read before the patches go, which forget their forwards
                costs = self._costs if self.trace else Costs()  # without a forward there is nothing to sum up
                self._over = _Over({stack.slot: stack.forward.told() for stack in self._stacks}, costs)
        finally:
            self._take_off()

    def _take_off(self) -> None:
        self._patches.close()
        self._marks.close()
        for stack in self._stacks:
            stack.reset()  # those of a session that was disabled
        for module in [m for m, session in _UNTOUCHED.items() if session is self]:
            del _UNTOUCHED[module]
        self._glue, self._stacks = None, ()

    def _install(self, model: nn.Module) -> None:
        with ExitStack() as stack:  # undone again if anything below fails
            if self._glue is None:
                _UNTOUCHED[model] = self
            else:
                for module in (*self._glue.marked, model):
                    self._mark(stack, module)
            self._put_on()
            self._marks = stack.pop_all()

    def _put_on(self) -> None:
        if self._glue is None:
            return
        before = Before(self._glue.patched)
        with ExitStack() as stack:
            self._glue.install(stack)
            if self._glue.alone is not None and self.plan.slots:
                full_length = any(stage.output != "survivors" for stage in self.plan.vision)
                refuse_part(stack, self._glue.alone, full_length)
            before.hide(stack)
            self._patches = stack.pop_all()

    def _mark(self, stack: ExitStack, module: nn.Module) -> None:
        if _SLOT not in vars(module):
            vars(module)[_SLOT] = self
            stack.callback(vars(module).pop, _SLOT)
            hide(stack, module, {_SLOT: self})


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


def apply(
    model: ModelLike, plan: PlanLike | None = None, *, keep: float | None = None, observers: Sequence[Any] = ()
) -> Session:
    """Prune ``model`` in place, so that a share of its work is left or according to ``plan``.

    Args:
        model: a model of the support table (``saint list``), one that contains exactly one, or an object that is no module and
            keeps one in ``.model`` (a pipeline of transformers, say). Of a language model without images (Llama, Mistral, Qwen
            and Gemma of transformers) the ``language`` stage drops tokens of a prompt: all but its first and last are candidates.
        plan: a plan; a bare method means ``Plan(vision=method)``; a string names a recipe, or is looked up like
            :meth:`Plan.load` does. None: that of :func:`saint.plan_for`.
        keep: without a plan, the share of the FLOPs that is left, in (0, 1]; None: 0.5.
        observers: objects with some of the methods of :class:`saint.Observer`, which are told of candidates, selections and
            times. An empty plan observes and drops nothing.

    Returns:
        The session; ``session.remove()`` gives the model back exactly as it was.

    Raises:
        AlreadyAppliedError: the model carries a session.
        UnsupportedModelError: no supported encoder, or it cannot do what the plan asks. The model is untouched.
        ParityError: the blocks are not what the support table says. The model is untouched.
        ValueError: a bad plan, or both a plan and ``keep``.
        TypeError: neither model nor plan.

    Example:
        >>> import timm, torch, saint
        >>> vit = timm.create_model("test_vit", pretrained=False).eval()
        >>> with saint.apply(vit, keep=0.5) as session:
        ...     logits = vit(torch.randn(1, 3, 160, 160))
    """
    model = module_of(model)
    if plan is not None and keep is not None:
        raise ValueError(f"give a plan, or keep={keep!r} for one that leaves this share of the work, not both")
    asked, plan = plan, plan_for(model, 0.5 if keep is None else keep) if plan is None else as_plan(plan)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "the model is compiled: apply the plan to the original model, then torch.compile it"
        )
    carried = _carrier(model)
    if carried is not None:
        raise AlreadyAppliedError(
            f"a plan is already applied to this {type(carried[0]).__name__}; call saint.remove(model) first"
        )
    session = Session(model, plan, assemble(model, plan, Observers(observers)))
    session._install(model)
    if plan.tuned is not None and (other := _not_tuned_on(model, session, plan.tuned)):
        warnings.warn(f"the plan was tuned on another model ({other}); saint.tune finds one for this", stacklevel=2)
    wanted = family(asked)
    if wanted is not None and (found := find_family(model)) is not None and found[2].title != wanted:
        warnings.warn(
            f"the recipe {asked!r} is made for {wanted}, and this is {found[2].title}: its layers and numbers of tokens mean "
            "something else here; saint.plan_for(model, keep=...) makes a plan for this model",
            stacklevel=2,
        )
    return session


def _not_tuned_on(model: nn.Module, session: Session, tuned: Mapping[str, Any]) -> str:
    """Say how ``model`` differs from the one that a plan was tuned on; "" where it does not, as far as the record tells."""
    if (name := tuned.get("class", type(model).__name__)) != type(model).__name__:
        return f"{name}, and this is a {type(model).__name__}"
    depth = tuned.get("depth")
    for slot, layers in depth.items() if isinstance(depth, Mapping) else ():
        if (own := session._depths.get(slot, layers)) != layers:
            return f"{layers} {slot} layers, and this one has {own}"
    return ""


def remove(model: ModelLike) -> None:
    """Take off whatever is applied to ``model`` or inside it.

    Raises:
        ValueError: nothing is applied.
        TypeError: no model.
    """
    module = module_of(model)
    session = _session(module)
    if session is None:
        raise ValueError(f"no plan is applied to this {type(module).__name__}")
    session.remove()


def status(model: ModelLike) -> Status | None:
    """Say what is applied to ``model`` or inside it; None when clean."""
    session = _session(module_of(model))
    return None if session is None else session.status


def _carrier(model: nn.Module) -> tuple[nn.Module, Session] | None:
    """The outermost module in ``model`` that carries a session, and that; None when all are clean."""
    for module in model.modules():
        session = vars(module).get(_SLOT) or _UNTOUCHED.get(module)
        if session is not None:
            return module, session
    return None


def _session(model: nn.Module) -> Session | None:
    carried = _carrier(model)
    return None if carried is None else carried[1]


@contextmanager
def pruned(
    model: ModelLike, plan: PlanLike | None = None, *, keep: float | None = None, observers: Sequence[Any] = ()
) -> Iterator[Session]:
    """:func:`apply` for the length of a ``with`` block; undone also after an exception."""
    session = apply(model, plan, keep=keep, observers=observers)
    try:
        yield session
    finally:
        session.remove()
