"""Benchmark of a forward: base and pruned, interleaved in one process, on the same weights."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ...flops import count_flops
from ...methods.base import Method
from ...methods.saint import Saint
from ...plans import Plan, Stage
from ...session import as_plan
from ...tokens import LayerTrace
from ..variants import BASE, copy_sharing_weights, variants
from .cost import Cost, cost
from .timing import Line, Spread, check_rounds, conditions, interleave, load_average, ratios


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """Candidates (patch tokens) around one drop point, mean over the batch."""

    layer: int
    tokens_in: float
    tokens_out: float
    slots: float  # tokens a sample costs: the longest survivor of the batch
    placement: str = "post"  # "input": in front of the layer


@dataclasses.dataclass(frozen=True)
class PictureCount:
    """What one picture alone has left; counted, not timed.

    Attributes:
        tokens: candidates in front of the first drop point.
        kept: of them, those behind the last one.
        base, pruned: FLOPs of the forward.
    """

    tokens: int
    kept: int
    base: int
    pruned: int

    @property
    def share(self) -> float:
        """FLOPs left."""
        return self.pruned / self.base


@dataclasses.dataclass(frozen=True)
class Range:
    """Mean, lowest and highest of ``n`` values."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Range":
        """Of at least one value."""
        return cls(math.fsum(values) / len(values), min(values), max(values), len(values))


@dataclasses.dataclass(frozen=True)
class OverPictures:
    """What a plan leaves of many pictures, each alone.

    Attributes:
        counts: an entry per picture, in the order given.
        kept: share of the tokens behind the last drop point.
        flops: share of the FLOPs of the forward.
        fixed: every picture keeps the same number of tokens.
        timed: the pictures that were timed, by their place in ``counts``.
    """

    counts: list[PictureCount]
    kept: Range
    flops: Range
    fixed: bool
    timed: list[int]

    @classmethod
    def of(cls, counts: Sequence[PictureCount], timed: Sequence[int]) -> "OverPictures":
        """Of at least one picture."""
        return cls(
            list(counts),
            Range.of([one.kept / one.tokens if one.tokens else 1.0 for one in counts]),
            Range.of([one.share for one in counts]),
            len({(one.tokens, one.kept, one.pruned) for one in counts}) == 1,
            list(timed),
        )


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What pruning itself costs.

    Attributes:
        scoring: ms per forward to take the keys' head means and to choose.
        gathering: ms per forward to gather tokens, tables and masks, to pad and to re-expand.
        share: (scoring + gathering) / the unpruned forward of the same round.
        keep_all: extra time of the same plan when it scores and drops nothing, as a fraction of the unpruned forward;
            None for methods that always drop.
    """

    scoring: Spread
    gathering: Spread
    share: Spread
    keep_all: Spread | None


@dataclasses.dataclass(frozen=True)
class ForwardBench:
    """Outcome of :func:`bench_forward`. Times are ms per forward of the full batch.

    Attributes:
        plan: that was applied.
        layers: tokens per drop point.
        base, pruned: time of a forward.
        speedup: base / pruned, of the same round.
        costs: FLOPs and memory by variant: "base", "pruned" and, where the model has such a switch, "eager".
        bound: FLOPs of base / pruned: the speed-up if time were proportional to FLOPs.
        efficiency: speed-up / bound; 1 means that time followed the FLOPs.
        uncounted: operators that the bound, and so the efficiency, leaves out.
        overhead: see :class:`Overhead`; None when not measured.
        eager: time of the same plan with the model's attention forced to eager; None when the model has no such switch.
        images_per_second: by variant, "base" and "pruned": of the medians of the times.
        pictures: what the plan leaves of many pictures; None where they were not counted.
        conditions: all else that the numbers depend on.
    """

    plan: Plan
    layers: list[LayerTokens]
    base: Spread
    pruned: Spread
    speedup: Spread
    costs: dict[str, Cost]
    bound: float
    efficiency: float
    uncounted: list[str]
    overhead: Overhead | None
    eager: Spread | None
    images_per_second: dict[str, float]
    pictures: OverPictures | None
    conditions: dict[str, Any]

    kind: ClassVar[str] = "bench/encoder"  # of its record
    heads: ClassVar[tuple[str, ...]] = ("ms: median [p20, p80]", "GFLOPs")
    caption: ClassVar[str] = "Forward of one picture"

    @property
    def gain(self) -> Spread:
        """Speed-up of the plan."""
        return self.speedup

    @property
    def flops_bound(self) -> float:
        """Speed-up if time were proportional to FLOPs."""
        return self.bound

    @property
    def kept(self) -> float | None:
        """Share of the tokens that is kept, mean over pictures; None where they were not counted."""
        return None if self.pictures is None else self.pictures.kept.mean

    @property
    def flops_left(self) -> float:
        """Share of the FLOPs that is left: of every picture alone where they were counted, else of the forward."""
        return 1 / self.bound if self.pictures is None else self.pictures.flops.mean

    def timed_of(self, count: int) -> list[int]:
        """Return which of ``count`` pictures were timed; where none were counted, the first, repeated up to the batch."""
        return [i % count for i in range(self.conditions["batch"])] if self.pictures is None else self.pictures.timed

    @property
    def lines(self) -> list[Line]:
        """Of a table of times: unpruned, then pruned."""
        return [
            Line(name, spread, self.costs[key].flops)
            for (name, spread), key in zip(self.spreads.items(), (BASE, "pruned"), strict=True)
        ]

    @property
    def spreads(self) -> dict[str, Spread]:
        """Times by name, for :func:`saint.lab.bench.timing.disturbances`."""
        return {"unpruned": self.base, "pruned": self.pruned}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}


def bench_forward(
    model: nn.Module,
    plan: Plan | Stage | Method | str,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    repeats: int = 20,
    warmup: int = 3,
    *,
    extras: bool = True,
    pictures: OverPictures | None = None,
    tick: Callable[[], None] = lambda: None,
) -> ForwardBench:
    """Measure ``model`` with and without ``plan`` on the same inputs.

    The user's model is not touched: the variants are copies that share its weights, so all read the same memory.

    Args:
        model: a supported encoder, in eval mode, without a plan.
        plan: see :func:`saint.apply`.
        inputs: keyword arguments of ``model.forward``, on the model's device, made beforehand; of several forwards a round runs
            each variant through all, and times, FLOPs and tokens are those of one forward in the mean.
        repeats: timed rounds.
        warmup: rounds before them.
        extras: also measure overhead and the eager comparison.
        pictures: see :func:`count_pictures`; kept in the result.
        tick: called after each round (``repeats + warmup`` times), for a progress bar.

    Returns:
        The measurements with their conditions.

    Raises:
        ValueError: ``repeats`` < 1, or what :func:`saint.apply` and the forward raise.
        AlreadyAppliedError: the model carries a plan.

    Example:
        >>> import timm
        >>> vit = timm.create_model("test_vit").eval()
        >>> result = bench_forward(vit, Saint(threshold=0.5), {"x": torch.randn(1, 3, 160, 160)}, repeats=2)
        >>> result.bound >= 1
        True
    """
    check_rounds(repeats, warmup)
    load = load_average()
    plan = as_plan(plan)
    forwards = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not forwards:
        raise ValueError("inputs are the arguments of one forward, or of several: got none")
    plans = {"pruned": plan}
    meter = _Meter()
    if extras:
        plans["metered"] = plan
        if (idle := _keep_all(plan)) is not None:
            plans["keep_all"] = idle
    eager = copy_sharing_weights(model)
    switched = {"eager": plan} if extras and _force_eager(eager) else {}
    with variants(model, plans, {"metered": [meter]}) as made, variants(eager, switched) as written_out:
        made |= {name: written_out[name] for name in switched}
        runs: dict[str, Callable[[], Any]] = {
            name: partial(_each, variant.model, forwards) for name, variant in made.items()
        }
        if "metered" in runs:
            runs["metered"] = meter.around(runs["metered"])
        device = next(p.device for p in model.parameters() if p.is_floating_point())
        with torch.inference_mode():
            rounds = interleave(runs, device, repeats, warmup, tick)
        times = {name: [lap / len(forwards) for lap in laps] for name, laps in rounds.items()}
        counted = {name: [cost(partial(made[name].model, **one), device) for one in forwards]
                   for name in (BASE, "pruned", "eager") if name in runs}  # fmt: skip
        costs = {name: Cost.mean(found) for name, found in counted.items()}
        session = made["pruned"].session
        assert session is not None, "of a plan"
        traces = []
        for one in forwards:
            with torch.inference_mode():
                made["pruned"].model(**one)
            traces.append(session.trace)

    bound = costs["base"].flops / costs["pruned"].flops
    speedup = Spread.of(ratios(times["base"], times["pruned"]))
    told = conditions(model, forwards[0], device, repeats, warmup, load, list(runs))
    batch = next(iter(told["inputs"].values()))[0]
    base, pruned = Spread.of(times["base"]), Spread.of(times["pruned"])
    return ForwardBench(
        plan=plan,
        layers=mean_tokens([layer_tokens(trace) for trace in traces]),
        base=base,
        pruned=pruned,
        speedup=speedup,
        costs=costs,
        bound=bound,
        efficiency=speedup.median / bound,
        uncounted=sorted({*costs["base"].uncounted, *costs["pruned"].uncounted}),
        overhead=_overhead(meter, times, repeats, len(forwards)) if extras else None,
        eager=Spread.of(times["eager"]) if "eager" in times else None,
        images_per_second={"base": 1e3 * batch / base.median, "pruned": 1e3 * batch / pruned.median},
        pictures=pictures,
        conditions={
            **told,
            "batch": batch,
            "forwards": len(forwards),
            "attention": _attention(model),
            "mode": "torch.inference_mode, data already on the device",
            "times_ms": {name: [round(t, 4) for t in values] for name, values in times.items()},
        },
    )


def _each(model: Callable[..., Any], forwards: Sequence[Mapping[str, Any]]) -> None:
    for one in forwards:
        model(**one)


def count_pictures(
    model: nn.Module,
    plan: Plan | Stage | Method | str,
    pictures: Iterable[Mapping[str, Any]],
    tick: Callable[[], None] = lambda: None,
) -> list[PictureCount]:
    """Count what ``plan`` leaves of each picture alone: tokens and FLOPs, a forward per picture.

    The user's model is not touched.

    Args:
        model: a supported encoder, in eval mode, without a plan.
        plan: see :func:`saint.apply`.
        pictures: keyword arguments of ``model.forward`` of one picture each.
        tick: called after each.

    Raises:
        ValueError: what :func:`saint.apply` and the forward raise.
        AlreadyAppliedError: the model carries a plan.
    """
    unpruned: dict[Any, int] = {}  # by shapes, which are all that its FLOPs depend on
    counts = []
    with variants(model, {"pruned": as_plan(plan)}) as made, torch.no_grad():
        session = made["pruned"].session
        assert session is not None, "of a plan"
        for inputs in pictures:
            shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items() if hasattr(value, "shape"))
            if shapes not in unpruned:
                unpruned[shapes] = count_flops(partial(made[BASE].model, **inputs))[1].total
            pruned = count_flops(partial(made["pruned"].model, **inputs))[1].total
            trace = session.trace
            ends = (int(trace[0].tokens_in.sum()), int(trace[-1].tokens_out.sum())) if trace else (0, 0)
            counts.append(PictureCount(*ends, unpruned[shapes], pruned))
            tick()
    return counts


_TIMED = 8  # pictures that are timed where each keeps its own number of tokens


def representative(counts: Sequence[PictureCount], most: int = _TIMED) -> list[int]:
    """Choose the pictures to time, by place: the first where all have the same work, else some spread evenly over it."""
    order = sorted(range(len(counts)), key=lambda i: counts[i].pruned)
    if counts[order[0]].pruned == counts[order[-1]].pruned:
        return [0]
    if len(order) <= most:
        return sorted(order)
    return sorted(
        order[(2 * i + 1) * len(order) // (2 * most)] for i in range(most)
    )  # the middle of each of ``most`` parts


def mean_tokens(forwards: Sequence[Sequence[LayerTokens]]) -> list[LayerTokens]:
    """Means over forwards of the same drop points."""
    return [
        dataclasses.replace(
            points[0],
            tokens_in=math.fsum(one.tokens_in for one in points) / len(points),
            tokens_out=math.fsum(one.tokens_out for one in points) / len(points),
            slots=math.fsum(one.slots for one in points) / len(points) if len(points) > 1 else points[0].slots,
        )
        for points in zip(*forwards, strict=True)
    ]


def layer_tokens(trace: list[LayerTrace]) -> list[LayerTokens]:
    """Means over the batch, one entry per drop point."""
    return [
        LayerTokens(
            t.layer,
            t.tokens_in.float().mean().item(),
            t.tokens_out.float().mean().item(),
            int(t.tokens_out.max()),
            t.placement,
        )
        for t in trace
    ]


def _keep_all(plan: Plan) -> Plan | None:
    """The same stages, scored in full, of which nothing goes: no source ever reaches so many neighbours."""
    scored = []
    for stage in plan.vision:
        if not isinstance(stage.method, Saint):
            return None
        method = dataclasses.replace(stage.method, threshold=1.0, neighbors=2**31, budget="sample")
        scored.append(dataclasses.replace(stage, method=method))
    return dataclasses.replace(plan, vision=tuple(scored)) if scored else None


def _force_eager(model: nn.Module) -> bool:
    """Make the model's own attention write out its matrices; False when it has no switch for it."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # type: ignore[operator]
        return True
    found = False
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and module is not model:
            module.set_attn_implementation("eager")  # type: ignore[operator]
            found = True
        elif hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
            found = True
    return found


def _attention(model: nn.Module) -> str:
    for module in model.modules():
        if (kind := getattr(getattr(module, "config", None), "_attn_implementation", None)) is not None:
            return str(kind)
        if (fused := getattr(module, "fused_attn", None)) is not None:
            return "sdpa" if fused else "eager"
        if isinstance(module, nn.MultiheadAttention):
            return "torch.nn.MultiheadAttention"
    return "unknown"


# -- what pruning itself costs ----------------------------------------------------------------------------------------


class _Meter:
    """Observes what pruning costs, forward by forward."""

    def __init__(self) -> None:
        self.scoring: list[float] = []  # ms, one entry per forward
        self.gathering: list[float] = []

    def pruning_time(self, stage: str, layer: int, scoring: float, gathering: float) -> None:
        self.scoring[-1] += 1e3 * scoring
        self.gathering[-1] += 1e3 * gathering

    def around(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """``run``, with an entry for each call."""

        def metered() -> Any:
            self.scoring.append(0.0)
            self.gathering.append(0.0)
            return run()

        return metered


def _overhead(meter: _Meter, times: Mapping[str, list[float]], repeats: int, forwards: int) -> Overhead:
    scoring, gathering = ([ms / forwards for ms in found[-repeats:]] for found in (meter.scoring, meter.gathering))
    both = [s + g for s, g in zip(scoring, gathering, strict=True)]
    idle = [r - 1 for r in ratios(times["keep_all"], times["base"])] if "keep_all" in times else []
    share = Spread.of(ratios(both, times["base"]))
    return Overhead(Spread.of(scoring), Spread.of(gathering), share, Spread.of(idle) if idle else None)
