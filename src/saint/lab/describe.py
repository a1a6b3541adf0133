"""Plans for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..plans import Plan


def describe(plan: "Plan") -> str:
    """A plan in a line."""
    parts = []
    for name, stage in ((name, stage) for name, stages in plan.slots.items() for stage in stages):
        settings = {k: v for k, v in stage.method.to_dict().items() if k != "method"}
        shown = ", ".join(f"{k}={v}" for k, v in settings.items() if v != getattr(type(stage.method), k, None))
        lead = f"threshold={settings['threshold']}" if "threshold" in settings else ""
        text = ", ".join(part for part in (lead, shown.replace(lead, "").strip(", ")) if part)
        tail = "" if stage.output == "survivors" else f', output="{stage.output}"'
        parts.append(f"{name}: {stage.method.name}({text}){tail}")
    return "; ".join(parts) or "nothing"
