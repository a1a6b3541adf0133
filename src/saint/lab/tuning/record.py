"""What is written down about a tuned plan: what it reaches on images held back, with intervals, and what others reach there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import __version__
from ...methods.random import Random
from ...methods.saint import Saint
from ...methods.tome import ToMe
from ...plans import Plan
from ..analysis.bootstrap import interval, weights
from ..kinds import COSINE
from .costs import counts
from .layout import Drop, Layout, Space
from .search import Search

_RESAMPLES = 1000


def head_of(
    model: nn.Module,
    space: Space,
    target: Mapping[str, float],
    tuning: Sequence[int],
    held: Sequence[int],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a plan was tuned on, and for what."""
    return {
        "model": facts.get("model"),
        "class": type(model).__name__,
        "depth": {space.slot: space.depth},
        "tokens": space.tokens,
        "images": {"set": facts.get("set"), "tuned": len(tuning), "held_out": len(held)},
        "target": dict(target),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "saint": __version__,
        "torch": torch.__version__,
    }


def mean_within(values: Sequence[float] | np.ndarray, seed: int) -> dict[str, float | None]:
    """Return the mean over images, and the ends of its 95 % interval; None where there are too few for one."""
    found = interval(np.asarray(values, dtype=float), weights(len(values), _RESAMPLES, seed))
    low, high = (None if np.isnan(value) else float(value) for value in (found.low, found.high))
    return {"mean": float(found.mean), "low": low, "high": high}


def checked(found: Search, plan: Plan, layout: Layout, held: Sequence[int], seed: int) -> dict[str, Any]:
    """Return what a plan reaches on the images held back."""
    trials, meter = found.trials, found.meter
    trial = trials.run(plan, held)
    reached: dict[str, Any] = {"flops": mean_within(_flops(found, plan, layout, held), seed)}
    if found.table.unit == "time":
        share = meter.times([plan], 25)[0]
        reached["speed"] = 1 / share
    reached |= _lost(found, trial.losses, seed)
    first = [] if found.space.pixels is None else [{"place": "input", "method": "resize", "left": found.space.tokens}]
    layers = first + [
        {"place": drop.place - 1 if drop.place else "input", "method": drop.method.name, "left": drop.left}
        for drop in layout
    ]
    lever = " and ".join((["smaller pictures"] if first else []) + (["pruning"] if layout else []))
    return {
        "lever": lever,
        "logn": found.space.logn,
        "layers": layers,
        "reached": reached,
        "tuned_loss": trials.run(plan, found.which).loss,
    }


def _flops(found: Search, plan: Plan, layout: Layout, held: Sequence[int]) -> list[float]:
    """Share of the FLOPs of each image; fixed budgets take the same of all images of a shape, so one of them is counted."""
    fixed = plan == found.space.plan(layout)
    shares: dict[str, float] = {}
    keys = [str(found.trials.shapes(number)) if fixed else str(number) for number in held]
    for key, number in zip(keys, held, strict=True):
        if key not in shares:
            shares[key] = found.meter.flops(plan, found.trials.once(number))
    return [shares[key] for key in keys]


def _lost(found: Search, losses: np.ndarray, seed: int) -> dict[str, Any]:
    out = {"measure": found.trials.measure, "loss": mean_within(losses, seed)}
    return {**out, "agreement": mean_within(1 - losses, seed)} if found.trials.measure == COSINE else out


def against(found: Search, chosen: Search, layout: Layout, held: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Published SAINT, random choice and ToMe (every layer, beta 0) at the same work on the same images; also each lever alone.

    ``difference``: the loss of the plan less theirs.

    Args:
        found: the search over pictures as they are.
        chosen: the one that the plan is of.
        layout: of the plan.
        held: the images.
        seed: of the resamples.
    """
    work = chosen.measured(layout)
    own = found.trials.run(chosen.space.plan(layout), held).losses
    alone = {"smaller pictures alone": found.alone(work)}
    if chosen.space.pixels is not None:
        alone = {"pruning alone": found.pruning(work), **alone}
    out = []
    for name, tried in alone.items():
        if tried is not None and (tried.search.space.pixels, tried.layout) != (chosen.space.pixels, layout):
            out.append(_rival(name, tried.search, tried.layout, own, held, seed))
    space = replace(found.space, logn=0.0)
    found = replace(found, space=space)
    saint = next((m for kind in found.kinds for m in kind if isinstance(m, Saint)), Saint())
    rivals = {"published saint": found.published(saint), "random": found.published(Random())}
    if space.slot == "vision":
        rivals["tome"] = space.even(ToMe(keep=0.5, beta=0.0), range(1, space.depth + 1))
    for name, rival in rivals.items():
        fit = space.fitted(rival, found.table, work / found.factor)
        if fit is not None:
            out.append(_rival(name, found, found.settled(fit, work), own, held, seed))
    return out


def _rival(
    name: str, search: Search, layout: Layout, own: np.ndarray, held: Sequence[int], seed: int
) -> dict[str, Any]:
    losses = search.trials.run(search.space.plan(layout), held).losses
    lost = _lost(search, losses, seed)
    return {"name": name, "work": search.measured(layout), **lost, "difference": mean_within(own - losses, seed)}


def additivity(found: Search) -> list[dict[str, float]]:
    """Return what costs of single drop points say of layouts that were run, added up, and what they lost jointly."""
    out = []
    for tried in found.tried.values():
        for kind, costs in zip(found.kinds, found.costs, strict=True):
            places = [(drop, kind.index(drop.method)) for drop in tried.layout if drop.method in kind]
            if len(places) < len(tried.layout) or any((d.place, number) not in costs for d, number in places):
                continue
            came, before = 0.0, 0.0
            for drop, number in places:
                x = -np.log(drop.left / found.space.tokens)
                cost = costs[drop.place, number]
                before += float(max(0.0, cost.at(np.array(x)) - cost.at(np.array(came))))
                came = x
            out.append({"added_up": before, "joint": tried.trial.score})
    return out


def costs(found: Search, seed: int) -> list[dict[str, Any]]:
    """Return what leaving costs at one place alone, on the images that measured it: of each method and share a curve over places.

    Places are layers; -1 is in front of them.
    """
    out = []
    space = found.space
    for kind, fitted in zip(found.kinds, found.costs, strict=True):
        for number, method in enumerate(kind):
            places = sorted(place for place, which in fitted if which == number)
            for left in counts(method, space):
                losses = [found.trials.run(space.plan((Drop(p, method, left),)), found.costed).losses for p in places]
                values = [mean_within(loss, seed) for loss in losses]  # of trials that were run: nothing runs again
                curve = {end: [value[end] for value in values] for end in ("mean", "low", "high")}
                out.append({"method": method.to_dict(), "left": left, "share": 1 - left / space.tokens,
                            "places": [p - 1 for p in places], **curve})  # fmt: skip
    return out


def point(found: Search, share: float, head: Mapping[str, Any], held: Sequence[int], seed: int) -> dict[str, Any]:
    """One point of the curve."""
    try:
        best = found.best(share, moves=0)
        layout = best.search.settled(best.layout, share)
    except ValueError as error:
        return {"work": share, "missing": str(error)}
    plan = best.search.space.plan(layout)
    return {"work": share, **checked(best.search, plan, layout, held, seed), "plan": plan.to_dict()}
