"""From what images gave to what is written: means with intervals, stages, and a plan to try."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..describe import as_python
from ..kinds import KL
from . import bootstrap
from .causal import Causal
from .geometry import cka
from .probe import QUANTITIES
from .propose import propose
from .run import Analysis
from .stages import find_stages

UNSEEN = (
    "it does not go through torch's scaled_dot_product_attention: load the model with its fused attention "
    '(attn_implementation="sdpa", timm fused_attn)'
)
# what stages are sought in: what tokens are like and what they do. Shares of attention and outliers are about single tokens, and
# the mean cosine of centred keys is near zero whatever they do
STAGED = (
    "key_similarity",
    "cls_entropy",
    "last_entropy",
    "token_entropy",
    "received_entropy",
    "effective_rank",
    "residual_update",
    "cka_adjacent",
)
_ENTROPIES = ("token_entropy", "cls_entropy", "last_entropy")


def make_record(analysis: Analysis) -> dict[str, Any]:
    """The results of a run as plain data: ``settings``, ``candidates`` (what tokens those are), ``parts``, ``plan``,
    ``plan_line``, ``skipped`` and counts.

    Args:
        analysis: of :func:`saint.lab.analysis.run.analyze`.
    """
    entries, settings = analysis.entries, analysis.settings
    weight = bootstrap.weights(len(entries), settings.bootstrap, settings.seed)
    found = list(dict.fromkeys(stage for entry in entries for stage in entry["stages"]))
    order = [stage for stage in ("vision", "language") if stage in found]
    parts = [_part(stage, analysis, weight) for stage in order]
    plan = propose(parts, analysis.causal, analysis.center)
    return {
        "seed": settings.seed,
        "settings": {
            **{name: value for name, value in asdict(settings).items() if name != "seed"},
            "saint": {} if analysis.causal is None else _settings(analysis.causal),
        },
        "candidates": analysis.subject.candidates,
        "parts": parts,
        "plan": None if plan is None else plan.to_dict(),
        "plan_line": None if plan is None else as_python(plan),
        "skipped": [[failure.where, failure.reason] for failure in analysis.outcome.failures],
        "resumed": analysis.outcome.resumed,
    }


def _settings(causal: Causal) -> dict[str, Any]:
    return {slot: method.to_dict() for slot, method in causal.methods.items()}


def _part(stage: str, analysis: Analysis, weight: np.ndarray) -> dict[str, Any]:
    entries = [entry["stages"].get(stage) for entry in analysis.entries]
    depth = max(len(e["quantities"]["key_similarity"]) for e in entries if e)
    values = {name: _array([e and e["quantities"].get(name) for e in entries], (depth,)) for name in QUANTITIES}
    values = {name: value for name, value in values.items() if np.isfinite(value).any()}
    hsic = _array([e and e["hsic"] for e in entries], (depth + 1, depth + 1))
    alike = _cka(hsic, weight)
    droppable = _array([e and e["droppable"] for e in entries], (len(analysis.settings.thresholds), depth))
    stages = find_stages(
        {name: values[name] for name in STAGED if name in values},
        weight,
        simulations=analysis.settings.simulations,
        seed=analysis.settings.seed,
    )
    shares = bootstrap.interval(droppable, weight)
    counts = np.array([e["tokens"] for e in entries if e], dtype=float).mean(0)
    quantities = [
        {"name": name, **_described(name, analysis.subject.candidates), **_lists(value, weight)}
        for name, value in values.items()
    ]
    for quantity in quantities:
        if quantity["name"] == "cka_adjacent":  # of means over images, as the matrix
            quantity |= alike["adjacent"]
    return {
        "stage": stage,
        "layers": depth,
        "tokens": {"candidates": counts[0], "protected": counts[1]},
        "quantities": quantities,
        "missing": [] if "token_entropy" in values else [["attention", UNSEEN]],
        "droppable": {
            "thresholds": list(analysis.settings.thresholds),
            "neighbors": analysis.settings.neighbors,
            "center": analysis.center.get(stage, False),
            "mean": shares.mean.tolist(),
            "low": shares.low.tolist(),
            "high": shares.high.tolist(),
        },
        "cka": {"mean": alike["matrix"]},
        "causal": _causal(stage, depth, analysis, weight),
        "stages": asdict(stages),
    }


def _described(name: str, tokens: str) -> dict[str, str]:
    return {"title": QUANTITIES[name].title.replace("visual tokens", tokens), "unit": QUANTITIES[name].unit}


def _lists(values: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    found = bootstrap.interval(values, weight)
    count = int(np.isfinite(values).any(tuple(range(1, values.ndim))).sum())
    return {"mean": found.mean.tolist(), "low": found.low.tolist(), "high": found.high.tolist(), "n": count}


def _array(rows: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of images, [n, *shape]; NaN where there is none."""
    out = np.full((len(rows), *shape), np.nan)
    for place, row in enumerate(rows):
        if row:
            out[place] = np.array(row, dtype=float).reshape(shape)  # None becomes NaN
    return out


def _cka(hsic: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """CKA of means over images of HSIC [n, L + 1, L + 1]: the outputs of all layers, and what each layer keeps of its input."""
    mean = cka(torch.from_numpy(bootstrap.resampled(hsic, np.full((1, len(hsic)), 1 / len(hsic)))))[0]
    adjacent = np.empty((len(weight), hsic.shape[1] - 1))
    for place, row in enumerate(weight):  # one resample at a time: R matrices of a deep model are large
        redrawn = torch.from_numpy(bootstrap.resampled(hsic, row[None]))
        adjacent[place] = cka(redrawn)[0].diagonal(1).numpy()
    low, high = bootstrap.bounds(adjacent, len(hsic))
    return {
        "matrix": mean[1:, 1:].tolist(),
        "adjacent": {"mean": mean.diagonal(1).tolist(), "low": low.tolist(), "high": high.tolist()},
    }


def _causal(stage: str, depth: int, analysis: Analysis, weight: np.ndarray) -> dict[str, Any] | None:
    causal = analysis.causal
    if causal is None or stage not in causal.layers:
        return None
    losses = {}
    for method in causal.choices:
        rows = [entry.get("causal", {}).get(stage, {}).get(method) for entry in analysis.entries]
        losses[method] = _array(rows, (depth,))
    return {
        "share": causal.share,
        "measure": causal.subject.measure,
        "unit": "nat" if causal.subject.measure == KL else "",
        "methods": {method: _lists(values, weight) for method, values in losses.items()},
        "more_than_saint": {
            method: _differences(values - losses["saint"], weight)
            for method, values in losses.items()
            if method != "saint" and np.isfinite(values).any()
        },
    }


def _differences(values: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Paired differences of losses [n, L]: per layer, and means over the first third of the layers, the others, and all."""
    early = math.ceil(values.shape[1] / 3)
    parts = {"early": values[:, :early], "late": values[:, early:], "all": values}
    means = {}
    for name, part in parts.items():
        there = np.isfinite(part).any(0)  # layers at which tokens can leave
        found = bootstrap.interval(part[:, there].mean(1), weight)
        means[name] = {"mean": float(found.mean), "low": float(found.low), "high": float(found.high)}
    return {**_lists(values, weight), **means, "layers_early": early}
