"""Plans for people: in a line, and as Python."""

import dataclasses
from typing import TYPE_CHECKING, Any

import saint

from .report.words import stages_line

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..plans import Plan, Stage


def describe(plan: "Plan") -> str:
    """A plan in a line; a slot of several stages says its methods and where they are."""
    parts = []
    for name, stages in plan.slots.items():
        if len(stages) > 1:
            parts.append(stages_line(name, [stage.to_dict() for stage in stages]))
            continue
        (stage,) = stages
        settings = {k: v for k, v in stage.method.to_dict().items() if k != "method"}
        shown = ", ".join(
            f"{k}={_rounded(v)}" for k, v in settings.items() if v != getattr(type(stage.method), k, None)
        )
        lead = f"threshold={settings['threshold']}" if "threshold" in settings else ""
        text = ", ".join(part for part in (lead, shown.replace(lead, "").strip(", ")) if part)
        tail = "" if stage.output == "survivors" else f', output="{stage.output}"'
        parts.append(f"{name}: {stage.method.name}({text}){tail}")
    return "; ".join(parts) or "nothing"


def _rounded(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def as_python(plan: "Plan") -> str:
    """The expression that makes a plan, where ``saint`` is imported; a method of another package is spelled by its own name."""
    slots = []
    for name, stages in plan.slots.items():
        made = [_stage(stage) for stage in stages]
        slots.append(f"{name}={made[0]}" if len(made) == 1 else f"{name}=[{', '.join(made)}]")
    return f"saint.Plan({', '.join(slots)})"


def _stage(stage: "Stage") -> str:
    more = _given(stage, leave={"method"})
    made = _method(stage.method)
    return f"saint.Stage({made}, {', '.join(more)})" if more else made


def _method(method: "Method") -> str:
    name = type(method).__name__
    home = "saint" if name in dir(saint) else "saint.methods"
    return f"{home}.{name}({', '.join(_given(method))})"


def _given(made: Any, leave: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """Settings that differ from what they are where nobody gives them."""
    fields = [field for field in dataclasses.fields(made) if field.init and field.name not in leave]
    pairs = ((field, getattr(made, field.name)) for field in fields)
    return [f"{field.name}={_written(value)}" for field, value in pairs if value != field.default]


def _written(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
