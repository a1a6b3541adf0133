"""Does a second run say the same? Two records of `analyze.py` on other photographs, held against each other."""

import math
from typing import Any


def overlap(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """How often the 95 % intervals of two records of one model overlap.

    Every quantity, and the share of tokens that would be dropped at each threshold, at every layer. Two such intervals of equal
    width overlap in 99.4 % of the cases where nothing differs but the images (1 - 2 Phi(-2 * 1.96 / sqrt(2))).

    Raises:
        ValueError: the records are of two models or two kinds of weights, or have the same seed.
    """
    names = [(record["model"], record["weights"]) for record in (first, second)]
    if names[0] != names[1] or first["seed"] == second["seed"]:
        raise ValueError(f"two runs of one model with two seeds are compared, got {names[0]} and {names[1]}")
    parts = []
    for a, b in zip(first["parts"], second["parts"], strict=True):
        counts = {q["name"]: _count(q, _named(b, q["name"])) for q in a["quantities"]}
        rows = zip(*([part["droppable"][key] for part in (a, b) for key in ("low", "high")]), strict=True)
        shares = [_count({"low": r[0], "high": r[1]}, {"low": r[2], "high": r[3]}) for r in rows]
        counts["droppable"] = [sum(pair[0] for pair in shares), sum(pair[1] for pair in shares)]
        parts.append({"stage": a["stage"], "counts": counts, "stages": [p["stages"]["verdict"] for p in (a, b)]})
    return {
        "kind": "again",
        "model": first["model"],
        "weights": first["weights"],
        "images": [(record["images"] or record["prompts"])["count"] for record in (first, second)],
        "things": "photographs" if first["images"] else "passages",
        "seeds": [first["seed"], second["seed"]],
        "parts": parts,
        "environment": second["environment"],
    }


def _named(part: dict[str, Any], name: str) -> dict[str, Any]:
    return next(quantity for quantity in part["quantities"] if quantity["name"] == name)


def _count(a: dict[str, Any], b: dict[str, Any]) -> list[int]:
    """Layers at which the intervals overlap, and layers."""
    there = [v for v in zip(a["low"], a["high"], b["low"], b["high"], strict=True) if _numbers(v)]
    return [sum(low <= high2 and low2 <= high for low, high, low2, high2 in there), len(there)]


def _numbers(values: tuple[Any, ...]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
