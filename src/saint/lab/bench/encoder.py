"""Benchmark of a vision encoder: base and pruned, interleaved in one process, on the same weights."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AlreadyAppliedError
from ...methods.base import Method
from ...methods.saint import Saint
from ...plans import Plan, Stage
from ...session import apply, as_plan, status
from ...tokens import LayerTrace
from .cost import Cost, cost
from .timing import Spread, interleave, load_average


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """Candidates (patch tokens) around one drop point, mean over the batch."""

    layer: int
    tokens_in: float
    tokens_out: float
    slots: int  # tokens a sample costs: the longest survivor of the batch
    placement: str = "post"  # "input": in front of the layer


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
class EncoderBench:
    """Outcome of :func:`bench_encoder`. Times are ms per forward of the full batch.

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
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}


def bench_encoder(
    model: nn.Module,
    plan: Plan | Stage | Method | str,
    inputs: Mapping[str, Any],
    repeats: int = 20,
    warmup: int = 3,
    *,
    extras: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> EncoderBench:
    """Measure ``model`` with and without ``plan`` on the same inputs.

    The user's model is not touched: the variants are copies that share its weights, so all read the same memory.

    Args:
        model: a supported encoder, in eval mode, without a plan.
        plan: see :func:`saint.apply`.
        inputs: keyword arguments of ``model.forward``, on the model's device, made beforehand.
        repeats: timed rounds.
        warmup: rounds before them.
        extras: also measure overhead and the eager comparison.
        tick: called after each round (``repeats + warmup`` times), for a progress bar.

    Returns:
        The measurements with their conditions.

    Raises:
        ValueError: ``repeats`` < 1, or what :func:`saint.apply` and the forward raise.
        AlreadyAppliedError: the model carries a plan.

    Example:
        >>> import timm
        >>> vit = timm.create_model("test_vit").eval()
        >>> result = bench_encoder(vit, Saint(threshold=0.5), {"x": torch.randn(1, 3, 160, 160)}, repeats=2)
        >>> result.bound >= 1
        True
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")
    if status(model) is not None:
        raise AlreadyAppliedError("the model to measure carries a plan; call saint.remove(model) first")
    load = load_average()
    plan = as_plan(plan)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    device = parameter.device

    variants: dict[str, nn.Module] = {"base": model, "pruned": copy_sharing_weights(model)}
    session = apply(variants["pruned"], plan)
    sessions = [session]
    meter: _Meter | None = None
    if extras:
        variants["metered"] = copy_sharing_weights(model)
        meter = _Meter()
        sessions.append(apply(variants["metered"], plan, observers=[meter]))
        if (idle := _keep_all(plan)) is not None:
            variants["keep_all"] = copy_sharing_weights(model)
            sessions.append(apply(variants["keep_all"], idle))
        eager = copy_sharing_weights(model)
        if _force_eager(eager):
            variants["eager"] = eager
            sessions.append(apply(eager, plan))

    def forward(which: nn.Module) -> Callable[[], Any]:
        return lambda: which(**inputs)

    runs = {name: forward(variant) for name, variant in variants.items()}
    if meter is not None:
        runs["metered"] = meter.around(runs["metered"])
    try:
        with torch.inference_mode():
            times = interleave(runs, device, repeats, warmup, tick)
        costs: dict[str, Cost] = {
            name: cost(runs[name], device) for name in ("base", "pruned", "eager") if name in runs
        }
        trace = session.trace
    finally:
        for applied in sessions:
            applied.remove()

    bound = costs["base"].flops / costs["pruned"].flops
    speedup = Spread.of(_ratios(times["base"], times["pruned"]))
    overhead = None
    if meter is not None:
        scoring, gathering = meter.scoring[-repeats:], meter.gathering[-repeats:]
        both = [s + g for s, g in zip(scoring, gathering, strict=True)]
        idle_times = times.get("keep_all")
        overhead = Overhead(
            Spread.of(scoring),
            Spread.of(gathering),
            Spread.of(_ratios(both, times["base"])),
            Spread.of([r - 1 for r in _ratios(idle_times, times["base"])]) if idle_times else None,
        )
    shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
    return EncoderBench(
        plan=plan,
        layers=layer_tokens(trace),
        base=Spread.of(times["base"]),
        pruned=Spread.of(times["pruned"]),
        speedup=speedup,
        costs=costs,
        bound=bound,
        efficiency=speedup.median / bound,
        uncounted=sorted({*costs["base"].uncounted, *costs["pruned"].uncounted}),
        overhead=overhead,
        eager=Spread.of(times["eager"]) if "eager" in times else None,
        conditions={
            "model_class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "inputs": shapes,
            "batch": next(iter(shapes.values()))[0],
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "attention": _attention(model),
            "repeats": repeats,
            "warmup": warmup,
            "load_average": load,
            "interleaved": list(runs),
            "mode": "torch.inference_mode, data already on the device",
            "times_ms": {name: [round(t, 4) for t in values] for name, values in times.items()},
        },
    )


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


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A second model on the same weights: its own modules, hooks and config, but shared parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


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
