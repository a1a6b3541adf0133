"""Numbers and plans of records in words, for every renderer."""

from collections.abc import Mapping, Sequence
from typing import Any

_METHOD, _SHOWN = "method", ("layers", "placement", "output")
_PLAIN = {"output": "survivors"}  # values that say nothing new
_BUDGET = "budget"
_AIMS = ("keep", _BUDGET, "r", "threshold")  # settings that say how much goes, the first that a method has
_LINE = 120  # letters of a plan in full


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
    """A plan's dict in a short line, e.g. "vision: saint (threshold 0.75, neighbors 5), first-half layers".

    Of a plan with more settings than fit, methods and numbers of stages, e.g. "vision: match in 9 stages, keep 0.86 to 0.4".
    """
    slots = {slot: stages for slot in ("vision", "connector", "language") if (stages := _stages(plan, slot))}
    whole = "; ".join(f"{slot}: {_stage_text(stage)}" for slot, stages in slots.items() for stage in stages)
    if len(whole) <= _LINE:
        return whole or "nothing is dropped"
    return "; ".join(f"{slot}: {_brief(stages)}" for slot, stages in slots.items())


def _stage_text(stage: Mapping[str, Any]) -> str:
    method = dict(stage["method"])
    name = method.pop(_METHOD)
    settings = ", ".join(_setting(key, value) for key, value in method.items())
    more = [f"{key} {stage[key]}" for key in _SHOWN if stage.get(key) not in (None, _PLAIN.get(key))]
    return ", ".join([f"{name} ({settings})" if settings else name, *more])


def _setting(key: str, value: Any) -> str:
    if not _is_number(value):
        return f"{key} {value}"
    return f"{'keep' if key == _BUDGET else key} {value:g}"  # a budget that is a number is what stays


def _brief(stages: Sequence[Mapping[str, Any]]) -> str:
    """Methods of a slot, how many stages, and what the first and the last of them aim at."""
    methods = [stage["method"] for stage in stages]
    text = " and ".join(dict.fromkeys(str(method[_METHOD]) for method in methods))
    text += f" in {len(stages)} stages" if len(stages) > 1 else ""
    for key in _AIMS:
        values = [method[key] for method in methods if _is_number(method.get(key))]
        if values:
            ends = f"{values[0]:.3g}" if values[0] == values[-1] else f"{values[0]:.3g} to {values[-1]:.3g}"
            return f"{text}, {'keep' if key == _BUDGET else key} {ends}"
    return text


def plan_method(plan: Mapping[str, Any]) -> str:
    """Names of the methods of a plan, e.g. "saint + fastv"."""
    found = []
    for slot in ("vision", "connector", "language"):
        found += [str(stage["method"][_METHOD]) for stage in _stages(plan, slot)]
    return " + ".join(dict.fromkeys(found)) or "none"


def _stages(plan: Mapping[str, Any], slot: str) -> list[Any]:
    """The stages of a slot, which may be written as one or as a list."""
    entry = plan.get(slot, [])
    return entry if isinstance(entry, list) else [entry]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
