"""A plan to try, from what was measured: where tokens are redundant and the output does not miss them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...methods.saint import Saint
from ...plans import Plan, Stage
from ..kinds import COSINE, KL
from .causal import Causal

LITTLE = {
    COSINE: 0.02,
    KL: 0.05,
}  # a mean loss up to which a layer counts as harmless; its upper bound may be twice that
REDUNDANT = 0.1  # share of sources that must vote to go
MOST = 4  # drop points: what goes adds up


def propose(parts: Sequence[Mapping[str, Any]], causal: Causal | None, center: Mapping[str, bool]) -> Plan | None:
    """The earliest layers at which SAINT finds something and the output does not miss it.

    Per part and measured threshold, the layers at which the mean causal loss of SAINT is at most ``LITTLE``, and at which sources
    vote to go, ``REDUNDANT`` of them at least and no more than were tried: the loss is known for ``share`` of the candidates,
    and half of them are sources. The last layer saves nothing and is left out. The threshold whose layers begin first wins, then
    the one with more layers, then the higher; of its layers the first ``MOST``. A suggestion, no optimum: evaluate it.

    Args:
        parts: of the record.
        causal: what was tried; None: no plan can be proposed.
        center: whether SAINT centres keys, by stage.

    Returns:
        None where no layer qualifies.
    """
    stages: dict[str, Any] = {}
    for part in parts:
        slot, measured, shares = part["stage"], part["causal"], part["droppable"]
        if causal is None or not measured:
            continue
        harmless = [layer for layer in _harmless(measured) if layer < part["layers"] - 1]
        found = []
        for threshold, row in zip(shares["thresholds"], shares["mean"], strict=True):
            layers = [layer for layer in harmless if REDUNDANT <= row[layer] <= 2 * causal.share]
            if layers:
                found.append((layers[0], -len(layers), -threshold, layers))
        if not found:
            continue
        *_, threshold, layers = min(found)
        method = Saint(threshold=-threshold, neighbors=shares["neighbors"], center=center.get(slot, False))
        stage = Stage(method, layers=layers[:MOST])
        stages[slot] = replace(stage, output=causal.output) if slot == "vision" else stage
    return Plan(**stages) if stages else None


def _harmless(measured: Mapping[str, Any]) -> list[int]:
    limit, saint = LITTLE[measured["measure"]], measured["methods"]["saint"]
    out = []
    for layer, (mean, high) in enumerate(zip(saint["mean"], saint["high"], strict=True)):
        if math.isfinite(mean) and mean <= limit and not high > 2 * limit:
            out.append(layer)
    return out
