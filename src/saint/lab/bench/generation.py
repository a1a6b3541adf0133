"""Benchmark of generation by a vision-language model: base and every plan, interleaved in one process, on the same weights."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...language.cache import KVMemory, memory
from ...plans import Plan
from ...tokens import LayerTrace
from ...upstream.names import CACHE
from ...vlm.prompts import visual_places
from ..variants import BASE, check_plans, variants
from .cost import Cost, cost
from .timing import Line, Spread, check_rounds, conditions, interleave, load_average, ratios, synchronize


@dataclasses.dataclass(frozen=True)
class GenerationTimes:
    """One variant. Times are of the full batch.

    Attributes:
        first: ms from the call of ``generate`` to the first new token (prefill, image encoder included).
        per_token: ms per further step; None when only one token is generated.
        total: ms for all new tokens.
        tokens_per_second: new tokens of all samples / total.
        prefill: what a ``generate`` of one token needs, counted.
        kv_bytes: keys and values that the prompt left in the cache.
    """

    first: Spread
    per_token: Spread | None
    total: Spread
    tokens_per_second: Spread
    prefill: Cost
    kv_bytes: int


@dataclasses.dataclass(frozen=True)
class GenerationGain:
    """One plan against the unpruned model, ratios of the same round.

    Attributes:
        first: time to first token, base / pruned.
        total: end to end, base / pruned.
        decode: time per further token, pruned / base: above 1 means that decoding got slower.
        bound: prefill FLOPs, base / pruned: the speed-up of the first token if time were proportional to FLOPs.
        efficiency: first / bound; 1 means that time followed the FLOPs.
        uncounted: operators that the bound, and so the efficiency, leaves out.
        kv: bytes of keys and values, pruned / base.
    """

    first: Spread
    total: Spread
    decode: Spread | None
    bound: float
    efficiency: float
    uncounted: list[str]
    kv: float


@dataclasses.dataclass(frozen=True)
class StageTokens:
    """Visual tokens around a stage of a plan, mean over the batch."""

    stage: str
    tokens_in: float
    tokens_out: float


@dataclasses.dataclass(frozen=True)
class GenerationBench:
    """Outcome of :func:`bench_generation`.

    Attributes:
        plans: what was applied, by name.
        times: by name, "base" first.
        gains: by name of the plan.
        tokens: by name of the plan: what its stages keep of the prompt's images.
        conditions: all else that the numbers depend on, and every single time.
    """

    plans: dict[str, Plan]
    times: dict[str, GenerationTimes]
    gains: dict[str, GenerationGain]
    tokens: dict[str, list[StageTokens]]
    conditions: dict[str, Any]

    kind: ClassVar[str] = "bench/generation"  # of its record
    heads: ClassVar[tuple[str, ...]] = ("first token, ms: median [p20, p80]", "prefill GFLOPs", "KV MiB")
    caption: ClassVar[str] = "First token of one question"

    @property
    def gain(self) -> Spread:
        """Speed-up of the first token under the only plan."""
        (gain,) = self.gains.values()
        return gain.first

    @property
    def flops_bound(self) -> float:
        """The same if time were proportional to FLOPs."""
        (gain,) = self.gains.values()
        return gain.bound

    @property
    def kept(self) -> float | None:
        """Share of the visual tokens that the only plan keeps behind its last stage."""
        (stages,) = self.tokens.values()
        return stages[-1].tokens_out / stages[0].tokens_in if stages else None

    @property
    def flops_left(self) -> float:
        """Share of the FLOPs of the prefill that is left."""
        return 1 / self.flops_bound

    def timed_of(self, count: int) -> list[int]:
        """Return which of ``count`` pictures were timed: the first ones, repeated up to the batch."""
        return [i % count for i in range(self.conditions["batch"])]

    @property
    def lines(self) -> list[Line]:
        """Of a table of times: unpruned, then the plans."""
        return [
            Line("unpruned" if name == BASE else name, times.first, times.prefill.flops, times.kv_bytes)
            for name, times in self.times.items()
        ]

    @property
    def spreads(self) -> dict[str, Spread]:
        """Times to the first token by name, for :func:`saint.lab.bench.timing.disturbances`."""
        return {"unpruned" if name == BASE else name: times.first for name, times in self.times.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {**dataclasses.asdict(self), "plans": {name: plan.to_dict() for name, plan in self.plans.items()}}


class Clock:
    """A stopping criterion that never stops and notes when each step ended; one `generate` gives first and further times."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []  # s since `start`
        self._start = 0.0

    def start(self) -> None:
        """Begin a generation."""
        synchronize(self.device)
        self.stamps = []
        self._start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        synchronize(self.device)
        self.stamps.append(time.perf_counter() - self._start)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TimedAnswer(NamedTuple):
    """A greedy answer to one prompt, and when its tokens came."""

    tokens: Tensor  # [new tokens]
    first_ms: float
    total_ms: float


def timed_answer(model: Any, inputs: Mapping[str, Any], length: int, device: torch.device) -> TimedAnswer:
    """Generate greedily once.

    Args:
        model: a vision-language model, with or without a plan.
        inputs: keyword arguments of ``generate``, of one prompt.
        length: tokens at most.
        device: of the model.
    """
    clock = Clock(device)
    clock.start()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1, stopping_criteria=[clock])
    new = ids[0, inputs["input_ids"].shape[1] :]
    return TimedAnswer(new, 1e3 * clock.stamps[0], 1e3 * clock.stamps[-1])


def bench_generation(
    model: nn.Module,
    plans: Mapping[str, Plan],
    inputs: Mapping[str, Any],
    new_tokens: int = 32,
    repeats: int = 10,
    warmup: int = 2,
    *,
    own: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tick: Callable[[], None] = lambda: None,
) -> GenerationBench:
    """Measure greedy generation with and without plans on the same prompt.

    The user's model is not touched: the variants are copies that share its weights. All generate exactly ``new_tokens``.

    Args:
        model: a supported vision-language model with ``generate``, in eval mode, without a plan.
        plans: what to compare, by name.
        inputs: what the processor returned, on the model's device, with images.
        new_tokens: generated per sample.
        repeats: timed rounds.
        warmup: rounds before them.
        own: what a plan is given in place of ``inputs``, by its name: the same prompts with smaller pictures.
        tick: called after each round (``repeats + warmup`` times), for a progress bar.

    Returns:
        The measurements with their conditions.

    Raises:
        ValueError: a wrong number, no plan, a plan called "base", no ``generate``, no image in ``inputs``, or what
            :func:`saint.apply` raises.
        AlreadyAppliedError: the model carries a plan.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be >= 1, got {new_tokens}")
    check_rounds(repeats, warmup)
    check_plans(plans)
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(): give the model with its language head")
    if "input_ids" not in inputs:
        raise ValueError(f"inputs need input_ids, as the model's processor makes them; got {list(inputs)}")
    load = load_average()
    device = next(p.device for p in model.parameters() if p.is_floating_point())
    given = {name: own.get(name, inputs) for name in (BASE, *plans)}
    stamps: dict[str, list[list[float]]] = {name: [] for name in given}

    def generation(name: str, twin: Any, length: int) -> Callable[[], None]:
        clock = Clock(device)

        def run() -> None:
            clock.start()
            twin.generate(
                **given[name], max_new_tokens=length, min_new_tokens=length, do_sample=False, num_beams=1, use_cache=True,
                stopping_criteria=[clock],
            )  # fmt: skip
            stamps[name].append([1e3 * stamp for stamp in clock.stamps])

        return run

    with variants(model, plans) as made:
        costs = {name: cost(generation(name, variant.model, 1), device) for name, variant in made.items()}
        tokens = {name: _tokens(v.session.trace) for name, v in made.items() if v.session is not None}
        memories = {name: v.session.kv_memory for name, v in made.items() if v.session is not None}
        whole = _held(made[BASE].model, inputs) if own else None
        for name in own:
            tokens[name] = [
                StageTokens("processor", *(_visual(model, given[one]) for one in (BASE, name))),
                *tokens[name],
            ]
            kept = _held(made[name].model, given[name]) if (found := memories[name]) is None else found.kept
            # beside what the unpruned model holds of whole pictures, and not of the smaller ones
            memories[name] = None if whole is None or kept is None else KVMemory(kept, whole)
        for taken in stamps.values():
            taken.clear()
        runs = {name: generation(name, variant.model, new_tokens) for name, variant in made.items()}
        interleave(runs, device, repeats, warmup, tick)
    empty = [name for name, found in memories.items() if found is None]
    if empty:
        raise ValueError(f"no images were pruned under {', '.join(empty)}: inputs need an image (or video) to measure")

    laps = {name: made[-repeats:] for name, made in stamps.items()}
    known = {name: found for name, found in memories.items() if found is not None}
    stored = {BASE: next(iter(known.values())).unpruned, **{name: found.kept for name, found in known.items()}}
    batch, prompt = inputs["input_ids"].shape
    times = {name: _times(laps[name], batch, costs[name], stored[name]) for name in laps}
    gains = {
        name: _gain(laps[BASE], laps[name], costs[BASE], costs[name], stored[name] / stored[BASE]) for name in plans
    }
    return GenerationBench(
        plans=dict(plans),
        times=times,
        gains=gains,
        tokens=tokens,
        conditions={
            **conditions(model, inputs, device, repeats, warmup, load, list(laps)),
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": new_tokens,
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "mode": "greedy generate of a fixed length, torch.no_grad, data already on the device; the step counts are "
            "stamped by a stopping criterion that synchronises",
            "steps_ms": {name: [[round(t, 4) for t in lap] for lap in made] for name, made in laps.items()},
        },
    )


def _visual(model: Any, inputs: Mapping[str, Any]) -> float:
    """Return the visual tokens of a prompt, mean over the batch."""
    return float(visual_places(model, inputs).sum(1).float().mean())


def _held(model: Any, inputs: Mapping[str, Any]) -> int | None:
    """Return the bytes of keys and values behind a prompt; None where the cache does not tell."""
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True)
    found = memory(CACHE.get(out), 0)
    return None if found is None else found.kept


def _tokens(trace: Sequence[LayerTrace]) -> list[StageTokens]:
    """Return what each stage was given and kept, in the order in which tokens pass them."""
    stages: dict[str, list[LayerTrace]] = {}
    for step in trace:
        stages.setdefault(step.stage, []).append(step)
    return [
        StageTokens(stage, steps[0].tokens_in.float().mean().item(), steps[-1].tokens_out.float().mean().item())
        for stage, steps in stages.items()
    ]


def _steps(laps: Sequence[Sequence[float]]) -> list[float]:
    """Return ms per token behind the first of each round; nothing where there is one token."""
    return [(lap[-1] - lap[0]) / (len(lap) - 1) for lap in laps if len(lap) > 1]


def _times(laps: Sequence[Sequence[float]], batch: int, prefill: Cost, kv_bytes: int) -> GenerationTimes:
    total, steps = [lap[-1] for lap in laps], _steps(laps)
    return GenerationTimes(
        first=Spread.of([lap[0] for lap in laps]),
        per_token=Spread.of(steps) if steps else None,
        total=Spread.of(total),
        tokens_per_second=Spread.of([1e3 * batch * len(lap) / t for lap, t in zip(laps, total, strict=True)]),
        prefill=prefill,
        kv_bytes=kv_bytes,
    )


def _gain(
    base: Sequence[Sequence[float]], laps: Sequence[Sequence[float]], unpruned: Cost, pruned: Cost, kv: float
) -> GenerationGain:
    first = Spread.of(ratios([lap[0] for lap in base], [lap[0] for lap in laps]))
    bound, steps = unpruned.flops / pruned.flops, _steps(laps)
    return GenerationGain(
        first=first,
        total=Spread.of(ratios([lap[-1] for lap in base], [lap[-1] for lap in laps])),
        decode=Spread.of(ratios(steps, _steps(base))) if steps else None,
        bound=bound,
        efficiency=first.median / bound,
        uncounted=sorted({*unpruned.uncounted, *pruned.uncounted}),
        kv=kv,
    )
