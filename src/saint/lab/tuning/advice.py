"""`saint advise`: what to do first with a model and one's pictures, by trying each lever once at one share of the FLOPs."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import AlreadyAppliedError, SaintError
from ...flops import count_flops
from ...methods.duplicates import Duplicates
from ...methods.flat import Flat
from ...methods.resize import Resize
from ...planning import plan_for
from ...plans import Output, Plan, Stage
from ...samples import read_samples
from ...session import pruned, status
from ...vision.guard import FINE, detail
from ..kinds import COSINE, Subject
from .record import mean_within
from .trials import Trials

DUPLICATES, SMALLER, PRUNING, BOTH = "duplicates", "smaller pictures", "pruning", "smaller pictures and pruning"
SOFTER = f"{BOTH}, softer attention"
_LOGN = 0.5  # of softer attention
LEAST = 4  # pictures
_COUNTED = 6  # pictures whose FLOPs are counted where each keeps its own number of tokens
_OVER = 1.02  # times the target that a lever may leave to be compared: counts of tokens are whole
_NEAR = 0.01  # share of the target by which pruning may leave less: more steps would not find much
_TRIED = 10  # plans of pruning that are counted until one comes so near
_WORTH = 0.1  # share of the FLOPs that copies must save to be worth a word


@dataclass(frozen=True)
class Lever:
    """What one lever reached; or why the model has none.

    Attributes:
        name: of it.
        plan: what was run; None where it cannot be.
        flops: share of the FLOPs of the whole model that it leaves, mean over pictures.
        losses: of each picture.
        why: it cannot be.
    """

    name: str
    plan: Plan | None = None
    flops: float = 1.0
    losses: Sequence[float] = ()
    why: str = ""

    @property
    def loss(self) -> float:
        return fmean(self.losses)


def advise(
    subject: Subject,
    images: Any,
    target: float = 0.5,
    *,
    seed: int = 0,
    facts: Mapping[str, Any] = MappingProxyType({}),
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Try copies, smaller pictures, pruning, both at once, and these with softer attention on ``images``; say which to take.

    Args:
        subject: the model, unpruned.
        images: what :func:`saint.tune` takes, 4 or more.
        target: share of the FLOPs of the whole model that is to be left, in (0, 1).
        seed: of the intervals.
        facts: what else the record should hold, e.g. the model's name.
        tick: called with the number of pictures that have been through the model since the last call.

    Returns:
        The record: what the pictures are like, each lever, the one to take, and its plan.

    Raises:
        ValueError: a target out of range, too few pictures, or a model with no lever at all.
        AlreadyAppliedError: the model carries a plan.
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be the share of the FLOPs that is left, in (0, 1), got {target:g}")
    if status(subject.model) is not None:
        raise AlreadyAppliedError("the model carries a plan; call saint.remove(model) first")
    samples = read_samples(images)
    if len(samples) < LEAST:
        raise ValueError(f"at least {LEAST} pictures are needed to say something of others, got {len(samples)}")
    trials = Trials(subject, samples, facts=facts, tick=tick)
    work = _Work(trials)
    tried = [_tried(work, name, target) for name in _MAKERS]
    if all(lever.plan is None for lever in tried):
        raise ValueError(f"no lever fits {subject.title}: " + "; ".join(f"{one.name}: {one.why}" for one in tried))
    taken = _best(tried, target)
    return {
        **facts,
        "target": target,
        "measure": trials.measure,
        "pictures": {"count": len(samples), **_looks(work)},
        "levers": [_told(one, trials.measure, seed) for one in tried],
        "advice": taken.name,
        "reached": taken.flops <= target * _OVER,
        "copies": _copies(tried, taken),
        "plan": None if taken.plan is None else taken.plan.to_dict(),
    }


def made(subject: Subject, images: Any, target: float) -> dict[str, Plan]:
    """Make the plan of each lever that the model has, and run none of them.

    Args:
        subject: the model, unpruned.
        images: as for :func:`advise`.
        target: share of the FLOPs of the whole model that is to be left.
    """
    work = _Work(Trials(subject, read_samples(images), facts={}))
    plans = {}
    for name in _MAKERS:
        with suppress(SaintError, ValueError):
            plans[name] = work.plan(name, target)
    return plans


class _Work:
    """Shares of the FLOPs of the whole model that plans leave, each counted once.

    Args:
        trials: of the model and its pictures.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self._counted: dict[tuple[str, int], int] = {}
        self._made: dict[tuple[str, float], Plan] = {}

    def plan(self, name: str, target: float) -> Plan:
        """Make the plan of a lever that leaves ``target``."""
        if (name, target) not in self._made:
            self._made[name, target] = _MAKERS[name](self, target)
        return self._made[name, target]

    @cached_property
    def output(self) -> Output:
        """Return what the vision stage must hand on: a dense head wants full length."""
        usual = plan_for(self.trials.model, 0.7).vision
        return usual[0].output if usual else "survivors"

    def share(self, plan: Plan, number: int = 0) -> float:
        """Share that is left of a picture."""
        return self._count(plan, number) / self._count(None, number)

    def shares(self, plan: Plan) -> list[float]:
        """The same of some pictures where each keeps its own number of tokens; else of one."""
        own = any(stage.method.votes or stage.guard for stages in plan.slots.values() for stage in stages)
        return [self.share(plan, number) for number in range(min(_COUNTED, len(self.trials.samples)) if own else 1)]

    def _count(self, plan: Plan | None, number: int) -> int:
        key = json.dumps(None if plan is None else plan.to_dict()), number
        if key not in self._counted:
            model, run = self.trials.model, self.trials.once(number)
            with nullcontext() if plan is None else pruned(model, plan):
                self._counted[key] = count_flops(lambda: run(model))[1].total
        return self._counted[key]


# -- levers -------------------------------------------------------------------------------------------------------------


def _smaller(work: _Work, target: float) -> Plan:
    """The largest pictures that leave ``target``."""
    sizes = (Plan(vision=Stage(Resize((side / 100) ** 2), output=work.output)) for side in range(98, 0, -2))
    found = next((plan for plan in sizes if work.share(plan) <= target * _OVER), None)
    if found is None:
        raise ValueError(f"no smaller picture leaves {target:.3f} of the FLOPs")
    return found


def _pruning(work: _Work, target: float, pixels: int | float | None = None) -> Plan:
    """The plan made for the model that comes nearest to ``target``, behind smaller pictures where ``pixels`` says so.

    What a plan is made for may be a part of the model alone, or a picture of another size: what it leaves is counted.

    Raises:
        ValueError: there is none.
    """
    found: list[tuple[float, Plan]] = []
    keep, low, high = target, 0.0, 1.0
    for _ in range(_TRIED):
        try:
            plan = plan_for(work.trials.model, keep)
        except ValueError:  # so little cannot be left
            low = keep
        else:
            plan = plan if pixels is None else plan.resized(pixels)
            share = work.share(plan)
            found.append((share, plan))
            if target * (1 - _NEAR) <= share <= target * _OVER:
                break
            low, high = (keep, high) if share < target else (low, keep)
        keep = (low + high) / 2
    if not found:
        raise ValueError(f"no plan leaves {target:.3f} of the FLOPs")
    return min(found, key=lambda one: (one[0] > target * _OVER, abs(one[0] - target)))[1]


def _both(work: _Work, target: float) -> Plan:
    """Smaller pictures for one half of the way, pruning for the other."""
    return _pruning(work, target, work.plan(SMALLER, target**0.5).pixels)


def _softer(work: _Work, target: float) -> Plan:
    plan = work.plan(BOTH, target)
    return replace(plan, vision=tuple(replace(stage, logn=_LOGN) for stage in plan.vision))


_MAKERS: dict[str, Callable[[_Work, float], Plan]] = {
    DUPLICATES: lambda work, target: Plan(vision=Stage(Duplicates(), output=work.output)),
    SMALLER: _smaller,
    PRUNING: _pruning,
    BOTH: _both,
    SOFTER: _softer,
}


def _tried(work: _Work, name: str, target: float) -> Lever:
    try:
        plan = work.plan(name, target)
        shares = work.shares(plan)
        losses = work.trials.run(plan, range(len(work.trials.samples))).losses
    except (SaintError, ValueError) as error:
        return Lever(name, why=str(error))
    return Lever(name, plan, fmean(shares), [max(0.0, loss) for loss in losses.tolist()])  # of 1 less a cosine near 1


def _best(tried: Sequence[Lever], target: float) -> Lever:
    """The lever that loses the least of those that leave ``target``; of none such, the one that leaves least."""
    known = [one for one in tried if one.plan is not None]
    within = [one for one in known if one.flops <= target * _OVER]
    return min(within, key=lambda one: one.loss) if within else min(known, key=lambda one: one.flops)


def _copies(tried: Sequence[Lever], taken: Lever) -> bool:
    """Tell whether copies are worth dropping before anything else: they save something, and lose less than half as much."""
    copies = next(one for one in tried if one.name == DUPLICATES)
    return copies.plan is not None and copies.flops <= 1 - _WORTH and (copies is taken or copies.loss <= taken.loss / 2)


# -- what is told -------------------------------------------------------------------------------------------------------


def _told(lever: Lever, measure: str, seed: int) -> dict[str, Any]:
    if lever.plan is None:
        return {"name": lever.name, "plan": None, "why": lever.why}
    losses = np.array(lever.losses)
    told = {"name": lever.name, "plan": lever.plan.to_dict(), "flops": lever.flops, "loss": mean_within(losses, seed)}
    if measure == COSINE:
        told["agreement"] = mean_within(1 - losses, seed)
    return told


def _looks(work: _Work) -> dict[str, Any]:
    """Shares of the patches that are copies, and that lie in blocks of one colour; tokens of a picture; fine detail."""
    copies, flat = (_counted(work, method) for method in (Duplicates(), Flat()))
    pixels = [_pictures(sample.args, sample.kwargs) for sample in work.trials.samples]
    seen = [float(detail(one).mean()) for one in pixels if one is not None]
    return {
        "copies": None if copies is None else copies[1],
        "flat": None if flat is None else flat[1],
        "tokens": None if copies is None else copies[0],
        "detail": fmean(seen) if seen else None,
        "fine": fmean(seen) > FINE if seen else None,
    }


def _counted(work: _Work, method: Duplicates | Flat) -> tuple[float, float] | None:
    """Tokens of a picture in the encoder, and the share that leaves; None where the method cannot see them."""
    trials, came, left = work.trials, list[int](), list[int]()
    try:
        with pruned(trials.model, Plan(vision=Stage(method, output=work.output))) as session:
            for number in range(len(trials.samples)):
                trials.once(number)(trials.model)
                came += session.trace[0].tokens_in.tolist()
                left += session.trace[0].tokens_out.tolist()
    except (SaintError, ValueError):
        return None
    return fmean(came), 1 - sum(left) / sum(came)


def _pictures(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next(
        (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == 3), None
    )
