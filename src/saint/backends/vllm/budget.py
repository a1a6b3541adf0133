"""What is asked for: the plan of the engine, the budget of a request, and how both travel to the model.

vLLM reserves a picture's places in the prompt before its encoder runs, so the number that is kept must follow from sizes alone.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods import from_dict
from ...methods.base import FixedBudget, Method, final_keep
from ...methods.divprune import DivPrune
from ...plans import Plan, Stage
from . import tower

KEY = "saint"  # in mm_processor_kwargs of a request; part of the hash of its pictures, so caches tell budgets apart
VISION = "saint_vision"  # beside it, from the engine's plan: what its tower leaves, part of the hash as well
FIELD = "saint_selection"  # among the inputs of a picture: what to keep of it
VARIABLE = "SAINT_PLAN"  # the plan of the engine: a file, a recipe's name or JSON


def default() -> FixedBudget | None:
    """Read what the engine does behind the projector with pictures of requests that ask for nothing; None: nothing.

    Raises:
        ValueError: ``SAINT_PLAN`` is no plan that vLLM can follow.
    """
    return _engine()[0]


def vision() -> tuple[Stage, ...]:
    """Read what the engine does inside the tower.

    Raises:
        ValueError: ``SAINT_PLAN`` is no plan that vLLM can follow.
    """
    return _engine()[1]


def _engine() -> tuple[FixedBudget | None, tuple[Stage, ...]]:
    text = os.environ.get(VARIABLE, "")
    return _read(text) if text.strip() else (None, ())


@functools.lru_cache(maxsize=4)
def _read(text: str) -> tuple[FixedBudget | None, tuple[Stage, ...]]:
    try:
        plan = Plan.load(text)
        return of_plan(plan), tower.checked(plan)
    except (ValueError, OSError) as error:
        raise ValueError(f"{VARIABLE}={text!r:.200}: {error}") from error


def of_plan(plan: Plan) -> FixedBudget | None:
    """The method of the connector stage of ``plan``; None where it drops nothing there.

    Raises:
        ValueError: vLLM cannot follow it; the message says why.
    """
    if plan.language:
        raise ValueError(
            "vLLM cannot follow the language stage of a plan: in paged attention every layer of a request has the same "
            "places, so tokens cannot leave between layers; give a connector stage, e.g. "
            "saint.Plan(connector=saint.methods.DivPrune(keep=0.25))"
        )
    tower.checked(plan)
    return checked(plan.connector[0].method) if plan.connector else None


def checked(method: Method) -> FixedBudget | None:
    """``method``, where vLLM can run it; None where it keeps everything.

    Raises:
        ValueError: it cannot; the message says why.
    """
    name = type(method).__name__
    if "frames" in method.needs:
        raise ValueError(
            f"{name} needs frames, which pictures do not have; vLLM prunes videos by itself, with --video-pruning-rate: use a "
            "method for pictures, e.g. divprune"
        )
    if method.needs:
        raise ValueError(
            f"{name} needs {', '.join(sorted(method.needs))}, so what it keeps depends on the prompt; vLLM caches a picture's "
            "features and KV blocks by the picture alone, and another prompt would get them: use a method that looks at the "
            "picture only, e.g. divprune"
        )
    if not isinstance(method, FixedBudget):
        raise ValueError(
            f"{name} does not keep a fixed number of tokens; vLLM reserves the places of a picture before its encoder runs: use "
            "a method with a budget, e.g. divprune or saint_full_graph with keep"
        )
    Plan(connector=method)  # refuses what is not for the connector
    return None if isinstance(method.keep, float) and method.keep == 1.0 else method


def requested(value: Any, engine: FixedBudget | None) -> FixedBudget | None:
    """Read what a request asks for.

    Args:
        value: of :data:`KEY` in its ``mm_processor_kwargs``: settings of a method, with its name as "method". Without a name they
            change the engine's method, or those of DivPrune where the engine has none.
        engine: what :func:`default` says.

    Raises:
        ValueError: not such settings, or a method that vLLM cannot run.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f'mm_processor_kwargs[{KEY!r}] must be an object like {{"keep": 0.25}} or {{"method": "divprune", "keep": 144}}; '
            f'{{"keep": 1.0}} keeps everything; got {value!r:.80}'
        )
    settings = {"method": (engine or DivPrune()).name, **value}
    if engine is not None and settings["method"] == engine.name:
        settings = {**engine.to_dict(), **settings}
    try:
        return checked(from_dict(settings))
    except ValueError as error:
        raise ValueError(f"mm_processor_kwargs[{KEY!r}]: {error}") from error


def shares(keep: int | float, runs: Sequence[int]) -> list[int]:
    """Tokens kept of each run of a picture's places (tiles; most families have one run).

    Args:
        keep: a fraction of each run, or a number for the whole picture, which is split in proportion (largest remainders).
        runs: places in each run.

    Raises:
        ValueError: more to keep than there is, or less than one per run.
    """
    if isinstance(keep, float):
        return [final_keep(keep, run) for run in runs]
    total = sum(runs)
    final_keep(keep, total)
    if keep < len(runs):
        raise ValueError(
            f"keep={keep} tokens of a picture of {len(runs)} tiles: keep at least one of each, or a fraction"
        )
    whole = [max(1, keep * run // total) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: (-(keep * runs[i] % total), i))
    while (missing := keep - sum(whole)) != 0:  # tiles that got one more than their share give it back last
        for i in order if missing > 0 else reversed(order):
            if missing > 0 and whole[i] < runs[i]:
                whole[i], missing = whole[i] + 1, missing - 1
            elif missing < 0 and whole[i] > 1:
                whole[i], missing = whole[i] - 1, missing + 1
            if not missing:
                break
    return whole


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to keep of one picture: of each run of ``runs`` places as many as ``goals`` says, chosen by ``method``."""

    method: FixedBudget
    runs: tuple[int, ...]
    goals: tuple[int, ...]

    def packed(self) -> Tensor:
        """As a tensor, since fields of a picture are tensors: uint8 [bytes]."""
        data = {"method": self.method.to_dict(), "runs": self.runs, "goals": self.goals}
        return torch.frombuffer(bytearray(json.dumps(data, sort_keys=True).encode()), dtype=torch.uint8).clone()

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Choice":
        """The inverse of :meth:`packed`."""
        return _unpacked(bytes(packed.tolist()))


@functools.lru_cache(maxsize=256)
def _unpacked(data: bytes) -> Choice:
    read = json.loads(data)
    method = from_dict(read["method"])
    assert isinstance(method, FixedBudget)
    return Choice(method, tuple(read["runs"]), tuple(read["goals"]))
