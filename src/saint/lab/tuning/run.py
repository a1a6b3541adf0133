"""`saint.tune`: a plan for a model and its images, without labels."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from ... import methods
from ...errors import AlreadyAppliedError, SaintError, UnsupportedModelError
from ...methods.base import Method
from ...methods.match import Match
from ...methods.random import Random
from ...methods.resize import Resize
from ...methods.saint import Saint
from ...methods.tome import ToMe
from ...plans import Plan, Stage
from ...samples import read_samples
from ...session import pruned, status
from ..analysis.causal import usual_saint
from ..kinds import COSINE, Subject, around
from .costs import grid
from .layout import Layout, Space
from .record import additivity, against, checked, costs, head_of, point
from .search import COSTED, FEW, JOINT, METHODS, MOVES, SIZES, Search, gains
from .thresholds import calibrated
from .trials import Trials
from .work import Meter

DEFAULT_METHODS = ("saint", "tome", "match", "resize")
LEAST = 12  # images: fewer say nothing about others
FRONTIER = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # shares of the work of the curve's points
_ROUNDS = 6  # of the search for the least work that agrees well enough


@dataclass(frozen=True)
class Target:
    """What a plan is tuned for; one of the three.

    Attributes:
        flops: share of the encoder's FLOPs that is left, in (0, 1); of a vision-language model of its language model's, for the
            prompt.
        speed: how many times faster, > 1, as measured here at batch 1.
        agreement: mean agreement with the unpruned output, in (0, 1); encoders only.

    Raises:
        ValueError: none of them, several, or out of range.
    """

    flops: float | None = None
    speed: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            got = " and ".join(f"target_{name}={value:g}" for name, value in given.items()) or "none"
            raise ValueError(f"give one target: target_flops, target_speed or target_agreement; got {got}")
        for name in ("flops", "agreement"):
            if name in given and not 0 < given[name] < 1:
                raise ValueError(f"target_{name} must be a share in (0, 1), got {given[name]:g}")
        if "speed" in given and not 1 < given["speed"] < 100:
            raise ValueError(f"target_speed must be how many times faster, in (1, 100), got {given['speed']:g}")

    @property
    def work(self) -> float | None:
        """Share of the work that may be left, where the target says so."""
        return self.flops if self.flops is not None else None if self.speed is None else 1 / self.speed

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Tuning:
    """A tuned plan.

    Attributes:
        plan: with :attr:`saint.Plan.tuned`.
        record: plain data: what was tried, what was reached on images held back, with 95 % intervals, and published SAINT and
            random choice on the same images.
        resumed: how many trials were in the journal.
        frontier: of each point of the curve what ``plan.tuned`` says, with the plan.
    """

    plan: Plan
    record: dict[str, Any]
    resumed: int
    frontier: list[dict[str, Any]] = field(default_factory=list)


def tune(
    model: nn.Module,
    images: Any,
    *,
    target_flops: float | None = None,
    target_speed: float | None = None,
    target_agreement: float | None = None,
    methods: Sequence[str | Method] = DEFAULT_METHODS,
    plan: Plan | None = None,
    held_out: float = 1 / 3,
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Plan:
    """Find layers, methods and numbers of tokens for ``model`` on ``images``, without labels.

    What leaving costs is measured at one layer at a time; a knapsack over layers, counts and methods proposes layouts, which are
    checked by joint runs and moved as long as that helps; images that were held back say what was reached.

    Args:
        model: an encoder of the support table or a vision-language model, in eval mode, without a plan.
        images: 12 or more, best 100: a tensor [n, 3, H, W] as the model takes it, or a list of such tensors [3, H, W] or of
            keyword arguments of ``model.forward`` for one image each (of a vision-language model: with its prompt).
        target_flops: share of the encoder's FLOPs that is left, in (0, 1). Of a vision-language model, whose encoder is left as
            it is, of its language model's, for the prompt.
        target_speed: how many times faster, > 1, as measured on this machine at batch 1.
        target_agreement: mean cosine (of maps: correlation) with the unpruned output, in (0, 1); encoders only.
        methods: to choose from, by name or as they are, with any budget; by name "match" stands for all its fates. Methods that
            drop, merge or weigh (:class:`saint.methods.Match`) are not mixed with one another. With "resize" among them pictures
            may get smaller in front of any of them, or without.
        plan: one that suits the model: the settings of its SAINT and its output are used.
        held_out: share of the images that are held back, in (0, 0.9].
        journal: file that keeps the results, so that a killed run continues; see :class:`saint.lab.eval.Journal`.
        seed: of the split and the resamples.

    Returns:
        The plan; ``plan.tuned`` says what it was tuned on and what it reached, and ``plan.save`` writes that too.

    Raises:
        ValueError: not one target, one that cannot be reached, or too few images.
        AlreadyAppliedError: the model carries a plan.
        UnsupportedModelError: a model that cannot be pruned.
        JournalError: the journal belongs to another run.

    Example:
        >>> import timm, torch, saint
        >>> vit = timm.create_model("test_vit").eval()
        >>> plan = saint.tune(vit, torch.randn(12, 3, 160, 160), target_flops=0.7)
        >>> plan.tuned["target"]
        {'flops': 0.7}
    """
    target = Target(target_flops, target_speed, target_agreement)
    return search(
        around(model), images, target, chosen=methods, plan=plan, held_out=held_out, journal=journal, seed=seed
    ).plan


def forwards(count: int, held_out: float = 1 / 3, *, agreement: bool = False, frontier: bool = False) -> int:
    """About how many images :func:`search` sends through the model, for a progress bar."""
    tuning = count - round(count * held_out)
    few = min(FEW, tuning)
    searches = 1 + (_ROUNDS if agreement else 0) + (len(FRONTIER) if frontier else 0)
    looks = few * (9 * 2 + 2) + COSTED * METHODS * 2 * 9
    return looks + searches * (few * (24 + 2 * 6) * (1 + SIZES) + tuning * JOINT) + tuning * (3 + MOVES) + 3 * count


def search(
    subject: Subject,
    images: Any,
    target: Target,
    *,
    chosen: Sequence[str | Method] = DEFAULT_METHODS,
    plan: Plan | None = None,
    held_out: float = 1 / 3,
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
    frontier: bool = False,
    pixels: int | float | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    tick: Callable[[int], None] = lambda _: None,
) -> Tuning:
    """Do what :func:`tune` does, with all that was measured.

    Args:
        subject: the model; the rest as there, like ``images``, ``plan``, ``held_out``, ``journal``, ``seed`` and what is raised.
        images: see above.
        target: what for.
        chosen: methods.
        plan: see above.
        held_out: see above.
        journal: see above.
        seed: see above.
        frontier: also find plans for other shares of the work, the points of a curve.
        pixels: the one size of smaller pictures to try, see :class:`saint.Plan`; None: all.
        facts: what else results depend on, e.g. the model's name: goes into the journal's key and the record.
        tick: called with the number of images that have been through the model since the last call.
    """
    if status(subject.model) is not None:
        raise AlreadyAppliedError("the model to tune carries a plan; call saint.remove(model) first")
    samples = read_samples(images)
    tuning, held = split(len(samples), held_out, seed)
    if target.agreement is not None and subject.measure != COSINE:
        raise ValueError(
            f"target_agreement is a share, and of {subject.called} the divergence of the next token is measured, which is none; "
            "give target_flops or target_speed"
        )
    shrinking = [one == Resize.name or isinstance(one, Resize) for one in chosen]
    kinds = _kinds([one for one, is_size in zip(chosen, shrinking, strict=True) if not is_size], plan, subject.slot)
    trials = Trials(subject, samples, facts={**facts, "held_out": held_out, "seed": seed}, journal=journal, tick=tick)
    try:
        space = _space(trials, plan)
        meter = Meter(subject, trials.once(tuning[0]), space.slot, space.depth, space.tokens, space.output)
        table = meter.table("time" if target.speed is not None else "flops", grid(space.tokens))
        found = Search(trials, space, meter, table, tuning, kinds)
        shrinks = space.slot == "vision" and (any(shrinking) or pixels is not None)
        sizes = _sizes(trials, space, pixels) if shrinks else []
        found.look(found.calibrate(0.7 if target.work is None else target.work, shrinks=bool(sizes)))
        found.shrink(sizes)
        work, search, layout = _solved(found, target)
        search = search.softened(layout)
        chosen_plan, per_image = _each_its_own(search, layout, work)
        head = head_of(subject.model, space, target.to_dict(), tuning, held, facts)
        record = {**head, **checked(search, chosen_plan, layout, held, seed), "per_image": per_image}
        record["against"] = against(found, search, layout, held, seed)
        record["additivity"] = additivity(found)
        record["costs"] = costs(found, seed)
        points = [point(found, share, head, held, seed) for share in FRONTIER] if frontier else []
    finally:
        trials.close()
    kept = {name: value for name, value in record.items() if name not in ("against", "additivity", "costs")}
    return Tuning(chosen_plan.with_tuned(kept), record, trials.resumed, points)


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to tune on and of those held back, in random order.

    Raises:
        ValueError: too few, or a share out of range.
    """
    if not 0 < held_out <= 0.9:
        raise ValueError(f"held_out must be a share of the images in (0, 0.9], got {held_out}")
    back = max(1, round(count * held_out))
    if count < LEAST or count - back < LEAST // 3:
        raise ValueError(f"at least {LEAST} images are needed to tune on some and check on others, got {count}")
    order = np.random.default_rng(seed).permutation(count).tolist()
    return order[back:], order[:back]


def _kinds(chosen: Sequence[str | Method], plan: Plan | None, slot: str) -> list[list[Method]]:
    """The methods to choose from, those together that can go together."""
    stages = () if plan is None else plan.slots.get(slot, ())
    own = next((stage.method for stage in stages if isinstance(stage.method, Saint)), None)
    saint = usual_saint(slot) if own is None else own
    found: list[Method] = []
    for one in chosen:
        if isinstance(one, Method):
            found.append(one)
        elif one == "tome":
            found += [ToMe(keep=0.5, beta=beta) for beta in (1.0, 0.0)]
        elif one == "match":
            found += [*_centred(Match()), Match(fate="weigh"), *(Match(fate="merge", beta=beta) for beta in (1.0, 0.0))]
        else:
            found += _centred(saint if one == "saint" else methods.get(one)())
    found = [method.keeping(0.5) for method in found]
    groups: dict[tuple[bool, bool], list[Method]] = {}
    for method in found:
        groups.setdefault((method.merges, method.merges and method.averages), []).append(method)
    return list(groups.values())


def _centred(method: Method) -> list[Method]:
    """The method, and where it can centre keys also the other way."""
    if (center := getattr(method, "center", None)) is None:
        return [method]
    other: dict[str, Any] = {"center": not center}
    return [method, replace(method, **other)]


def _space(trials: Trials, plan: Plan | None) -> Space:
    subject, model, run = trials.subject, trials.model, trials.once(0)
    layers, slot = subject.layers(), subject.slot
    own: dict[str, Any] = {}
    stages = () if plan is None else plan.vision
    if slot == "vision" and stages:  # "similar" is never better where it was measured (docs/matching.md)
        own["output"] = "carried" if stages[0].output == "similar" else stages[0].output
    stage = Stage(Random(keep=0.5), layers=[0], **own)
    output = stage.output
    slots: dict[str, Any] = {slot: stage}
    with pruned(model, Plan(**slots)) as session:
        run(model)
        tokens = int(session.trace[0].tokens_in[0])
        mid = slot == "vision" and session.trace[0].placement == "mid"
    depth = (max(layers[slot]) + 1) if slot in layers else 0
    space = Space(slot, True, mid, depth, tokens, output)
    try:  # not every encoder has a place in front of its layers
        first = space.even(Random(), [0])
        with pruned(model, space.plan(first)):
            run(model)
    except (SaintError, ValueError):
        return Space(slot, False, mid, depth, tokens, output)
    return space


def _sizes(trials: Trials, space: Space, pixels: int | float | None) -> list[tuple[int | float, int]]:
    """Shares of the pixels that give every size of a square picture down to a third, and the tokens that pictures then have.

    None of an encoder whose pictures cannot be shrunk. ``pixels``: of this size alone.

    Raises:
        UnsupportedModelError: they cannot, and a size was asked for.
    """
    run, edge = trials.once(0), math.isqrt(space.tokens)
    found: dict[int, int | float] = {}
    shares = [(side / edge) ** 2 for side in range(edge - 1, edge // 3, -1)] if pixels is None else [pixels]
    for share in shares:
        try:
            with pruned(trials.model, replace(space, pixels=share).plan(())) as session:
                run(trials.model)
        except UnsupportedModelError:
            if pixels is None:
                return []
            raise
        found.setdefault(int(session.trace[0].tokens_out[0]), share)
    return [(share, tokens) for tokens, share in sorted(found.items(), reverse=True) if 4 <= tokens < space.tokens]


def _solved(found: Search, target: Target) -> tuple[float, Search, Layout]:
    """The share of work, the size of pictures, and the layout for it."""
    if target.work is not None:
        best = found.best(target.work)
        return target.work, best.search, best.search.settled(best.layout, target.work)
    assert target.agreement is not None
    low, high = 0.15, 1.0  # shares of work: too little, enough
    enough: tuple[Search, Layout] | None = None
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        try:
            tried = found.best(middle, moves=0)
            settled = tried.search.settled(tried.layout, middle)
        except ValueError:
            low = middle
            continue
        if 1 - tried.trial.loss >= target.agreement:
            high, enough = middle, (tried.search, settled)
        else:
            low = middle
    if enough is None:
        raise ValueError(
            f"target_agreement={target.agreement:g} cannot be reached: even {high:.2f} of the FLOPs lose more with these methods"
        )
    return high, *enough


def _each_its_own(found: Search, layout: Layout, work: float) -> tuple[Plan, bool]:
    """The plan of a layout; with thresholds, so that every image keeps its own number, where that loses less."""
    space, fixed = found.space, found.space.plan(layout)
    if found.table.unit != "flops":
        return fixed, False
    budget = float(space.work(layout, found.table))
    methods = calibrated(found.trials, space, layout, found.table, found.which, budget)
    if methods is None:
        return fixed, False
    each = space.plan(layout, methods)
    return (each, True) if gains(found.trials.run(each, found.which), found.run(layout).trial) else (fixed, False)
