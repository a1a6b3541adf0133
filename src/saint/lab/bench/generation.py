"""Benchmark of generation by a vision-language model: base and every plan, interleaved in one process, on the same weights."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import AlreadyAppliedError
from ...plans import Plan
from ...session import Session, apply, status
from .cost import Cost, cost
from .encoder import copy_sharing_weights
from .timing import Spread, interleave, load_average, synchronize

BASE = "base"


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
class GenerationBench:
    """Outcome of :func:`bench_generation`.

    Attributes:
        plans: what was applied, by name.
        times: by name, "base" first.
        gains: by name of the plan.
        conditions: all else that the numbers depend on, and every single time.
    """

    plans: dict[str, Plan]
    times: dict[str, GenerationTimes]
    gains: dict[str, GenerationGain]
    conditions: dict[str, Any]

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
        tick: called after each round (``repeats + warmup`` times), for a progress bar.

    Returns:
        The measurements with their conditions.

    Raises:
        ValueError: a wrong number, no plan, a plan called "base", no ``generate``, no image in ``inputs``, or what
            :func:`saint.apply` raises.
        AlreadyAppliedError: the model carries a plan.
    """
    if new_tokens < 1 or repeats < 1 or warmup < 0:
        raise ValueError(
            f"new_tokens and repeats must be >= 1 and warmup >= 0, got {new_tokens}, {repeats} and {warmup}"
        )
    if not plans or BASE in plans:
        raise ValueError(f'give at least one plan, none of them called "{BASE}", got {list(plans)}')
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(): give the model with its language head")
    if "input_ids" not in inputs:
        raise ValueError(f"inputs need input_ids, as the model's processor makes them; got {list(inputs)}")
    if status(model) is not None:
        raise AlreadyAppliedError("the model to measure carries a plan; call saint.remove(model) first")
    load = load_average()
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    device = parameter.device
    clocks = {name: Clock(device) for name in (BASE, *plans)}
    stamps: dict[str, list[list[float]]] = {name: [] for name in clocks}
    variants: dict[str, Any] = {BASE: model}
    sessions: dict[str, Session] = {}

    def generation(name: str, length: int) -> Callable[[], None]:
        def run() -> None:
            clock = clocks[name]
            clock.start()
            variants[name].generate(
                **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False, num_beams=1, use_cache=True,
                stopping_criteria=[clock],
            )  # fmt: skip
            stamps[name].append([1e3 * stamp for stamp in clock.stamps])

        return run

    try:
        for name, plan in plans.items():
            variants[name] = copy_sharing_weights(model)
            sessions[name] = apply(variants[name], plan)
        costs = {name: cost(generation(name, 1), device) for name in variants}
        memories = {name: session.kv_memory for name, session in sessions.items()}
        for made in stamps.values():
            made.clear()
        interleave({name: generation(name, new_tokens) for name in variants}, device, repeats, warmup, tick)
    finally:
        for session in sessions.values():
            session.remove()
    empty = [name for name, memory in memories.items() if memory is None]
    if empty:
        raise ValueError(f"no images were pruned under {', '.join(empty)}: inputs need an image (or video) to measure")

    laps = {name: made[-repeats:] for name, made in stamps.items()}
    first = {name: [lap[0] for lap in made] for name, made in laps.items()}
    total = {name: [lap[-1] for lap in made] for name, made in laps.items()}
    step = {
        name: [(lap[-1] - lap[0]) / (new_tokens - 1) for lap in made] if new_tokens > 1 else []
        for name, made in laps.items()
    }
    memory = {name: found for name, found in memories.items() if found is not None}
    kept = {BASE: next(iter(memory.values())).unpruned, **{name: found.kept for name, found in memory.items()}}
    batch, prompt = inputs["input_ids"].shape
    times = {
        name: GenerationTimes(
            first=Spread.of(first[name]),
            per_token=Spread.of(step[name]) if step[name] else None,
            total=Spread.of(total[name]),
            tokens_per_second=Spread.of([1e3 * batch * new_tokens / t for t in total[name]]),
            prefill=costs[name],
            kv_bytes=kept[name],
        )
        for name in variants
    }
    gains = {}
    for name in plans:
        ratio = Spread.of(_ratios(first[BASE], first[name]))
        bound = costs[BASE].flops / costs[name].flops
        gains[name] = GenerationGain(
            first=ratio,
            total=Spread.of(_ratios(total[BASE], total[name])),
            decode=Spread.of(_ratios(step[name], step[BASE])) if step[name] else None,
            bound=bound,
            efficiency=ratio.median / bound,
            uncounted=sorted({*costs[BASE].uncounted, *costs[name].uncounted}),
            kv=kept[name] / kept[BASE],
        )
    config: Any = getattr(model, "config", None)
    return GenerationBench(
        plans=dict(plans),
        times=times,
        gains=gains,
        conditions={
            "model_class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "inputs": {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)},
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": new_tokens,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "attention": getattr(config, "_attn_implementation", None),
            "repeats": repeats,
            "warmup": warmup,
            "load_average": load,
            "interleaved": list(variants),
            "mode": "greedy generate of a fixed length, torch.no_grad, data already on the device; the step counts are "
            "stamped by a stopping criterion that synchronises",
            "steps_ms": {name: [[round(t, 4) for t in lap] for lap in made] for name, made in laps.items()},
        },
    )


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]
