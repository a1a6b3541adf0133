"""Numbers and plans of records in words, for every renderer."""

from collections.abc import Mapping, Sequence
from typing import Any

# agreement of zeros and ones, of which the mean says all, and what it is about
YES_OR_NO = {
    "same_answer": "the answer",
    "same_top1": "the top class",
    "same_first_token": "the first word of the answer",
}
SLOTS = ("vision", "connector", "language")
_METHOD, _SHOWN = "method", ("layers", "placement", "output")
_PLAIN = {"output": "survivors"}  # values that say nothing new


def number(value: float | None, digits: int = 3) -> str:
    """For people: at most ``digits`` digits behind the point for small numbers, none for large ones; "-" for None."""
    if value is None:
        return "-"
    value = float(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits if abs(value) < 10 else max(1, digits - 1)}f}"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """ "0.42 [0.40, 0.45]"."""
    if low is None or high is None:
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def names(values: Sequence[str], most: int = 6) -> str:
    """A few of them, and how many there are."""
    different = list(dict.fromkeys(map(str, values)))
    shown = ", ".join(different[:most]) + (", ..." if len(different) > most else "")
    return f"{len(values)} ({shown})" if values else "0"


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan's dict in full, e.g. "vision: saint (threshold 0.75, neighbors 5), layers first_half"."""
    slots = [_stage_text(slot, stage) for slot in SLOTS for stage in _stages(plan, slot)]
    return "; ".join(slots) or "nothing is dropped"


def plan_line(plan: Mapping[str, Any]) -> str:
    """A plan's dict in one short line: a slot of several stages says its methods and where they are, without settings."""
    slots = []
    for slot in SLOTS:
        stages = _stages(plan, slot)
        slots += [_stage_text(slot, stages[0])] if len(stages) == 1 else []
        slots += [stages_line(slot, stages)] if len(stages) > 1 else []
    return "; ".join(slots) or "nothing is dropped"


def stages_line(slot: str, stages: Sequence[Mapping[str, Any]]) -> str:
    """Several stages of a slot in one line, e.g. "vision: match at the input and layers 0, 2, 3"."""
    places: dict[str, list[str]] = {}
    for stage in stages:
        layers = stage.get("layers")
        listed = list(map(str, layers)) if isinstance(layers, (list, tuple)) else [str(layers or "its own")]
        where = ["the input"] if stage.get("placement") == "input" else listed
        places.setdefault(str(stage[_METHOD][_METHOD]), []).extend(where)
    said = []
    for name, found in places.items():
        layers = ", ".join(place for place in found if place != "the input")
        parts = [*(["the input"] if "the input" in found else []), *([f"layers {layers}"] if layers else [])]
        said.append(f"{name} at {' and '.join(parts)}")
    return f"{slot}: {'; '.join(said)}"


def _stage_text(slot: str, stage: Mapping[str, Any]) -> str:
    method = dict(stage[_METHOD])
    name = method.pop(_METHOD)
    settings = ", ".join(f"{key} {value:g}" if _is_number(value) else f"{key} {value}" for key, value in method.items())
    more = [f"{key} {stage[key]}" for key in _SHOWN if stage.get(key) not in (None, _PLAIN.get(key))]
    return f"{slot}: {name} ({settings})" + "".join(f", {text}" for text in more)


def plan_method(plan: Mapping[str, Any]) -> str:
    """Names of the methods of a plan, e.g. "saint + fastv"."""
    found = []
    for slot in SLOTS:
        found += [str(stage["method"][_METHOD]) for stage in _stages(plan, slot)]
    return " + ".join(dict.fromkeys(found)) or "none"


def _stages(plan: Mapping[str, Any], slot: str) -> list[Any]:
    """The stages of a slot, which may be written as one or as a list."""
    entry = plan.get(slot, [])
    return entry if isinstance(entry, list) else [entry]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
