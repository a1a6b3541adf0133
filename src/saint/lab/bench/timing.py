"""Interleaved timing."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of ``n`` values."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[-1], len(values))


class Line(NamedTuple):
    """One variant in a table of times.

    Attributes:
        name: for people.
        time: that counts: of a forward, or to the first token.
        flops: of the same.
        kv_bytes: that the prompt left in the cache; None without one.
    """

    name: str
    time: Spread
    flops: float
    kv_bytes: int | None = None


def load_average() -> float | None:
    """Processes that ran or waited for a core over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


_BUSY = 0.5  # load per core from which others' work is likely in the times
_WIDE = 0.25  # (p80 - p20) / median of a quiet machine stays well below


def disturbances(load: float | None, spreads: Mapping[str, Spread]) -> list[str]:
    """Say why these times may not mean much, in sentences; empty on a quiet machine.

    Args:
        load: :func:`load_average` before the timing.
        spreads: times by name.
    """
    found = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if load is not None and load > _BUSY * cores:
        found.append(
            f"this machine was busy before the timing (load average {load:.1f} on {cores} core(s)): repeat it when it is not"
        )
    wide = {name: s for name, s in spreads.items() if s.n > 2 and s.p80 - s.p20 > _WIDE * s.median}
    if wide:
        worst = max(wide, key=lambda name: (wide[name].p80 - wide[name].p20) / wide[name].median)
        s = wide[worst]
        found.append(
            f"times differ much from round to round ({worst}: {s.p20:.1f} to {s.p80:.1f} ms around {s.median:.1f}): "
            "something else ran, or more --repeats are needed"
        )
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleave(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warmup: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time several functions in turn, so that whatever else the machine does meets all of them alike.

    Args:
        runs: what to time, by name. A round runs each once, every second round in reverse order.
        device: synchronised around each run.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        tick: called after each round.

    Returns:
        Milliseconds, by name, one per round: entry i of each list belongs to the same round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to the variant that runs meanwhile
    try:
        for lap in range(-warmup, repeats):
            for name in list(runs) if lap % 2 == 0 else reversed(list(runs)):
                synchronize(device)
                start = time.perf_counter()
                runs[name]()
                synchronize(device)
                if lap >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
            tick()
    finally:
        if collecting:
            gc.enable()
    return times


def check_rounds(repeats: int, warmup: int) -> None:
    """Refuse numbers of rounds that time nothing.

    Raises:
        ValueError: too few.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return a quotient per round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def conditions(
    model: nn.Module, inputs: Mapping[str, Any], device: torch.device, repeats: int, warmup: int, load: float | None,
    interleaved: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return what any times of ``model`` depend on, as plain data for a record.

    Args:
        model: that was timed.
        inputs: that it was given.
        device: where it ran.
        repeats: timed rounds.
        warmup: rounds before them.
        load: :func:`load_average` before the timing.
        interleaved: what ran in turn, by name.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {
        "model_class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "inputs": {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)},
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "warmup": warmup,
        "load_average": load,
        "interleaved": list(interleaved),
    }
