"""Plans for people."""

from typing import TYPE_CHECKING

from .report.words import plan_text

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..plans import Plan

_ALWAYS = ("threshold",)  # shown also where it is the usual one


def describe(plan: "Plan") -> str:
    """A plan in a short line, without settings that are the usual ones; see :func:`saint.lab.report.words.plan_text`."""
    return plan_text(
        {
            slot: [{**stage.to_dict(), "method": _told(stage.method)} for stage in stages]
            for slot, stages in plan.slots.items()
        }
    )


def _told(method: "Method") -> dict[str, object]:
    usual = type(method)
    settings = method.to_dict()
    return {
        key: value
        for key, value in settings.items()
        if key == "method" or key in _ALWAYS or value != getattr(usual, key, None)
    }
