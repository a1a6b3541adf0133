"""Plans as users give them: as text, and changed by options."""

import dataclasses
from typing import Any

from ...plans import Plan

_DEEPEST = 10_000  # a range beyond it is a slip, and would fill the memory before the model can say so


def read_plan(text: str) -> Plan:
    """The plan that ``text`` is, names or holds: :meth:`saint.Plan.load` of text."""
    return Plan.load(text)


def changed_plan(plan: Plan, threshold: float | None, layers: str | None) -> Plan:
    """``plan`` with another threshold or other drop points in its vision stage; None leaves them.

    Raises:
        ValueError: there is not one vision stage, or its method has no threshold.
    """
    if threshold is None and layers is None:
        return plan
    stages = plan.vision
    if len(stages) != 1:
        held = f"this plan has {len(stages) or 'none'}"
        raise ValueError(
            f"--threshold and --layers change the one vision stage of a plan, and {held}: write it into the plan (--plan)"
        )
    stage = stages[0]
    if threshold is not None:
        if "threshold" not in {field.name for field in dataclasses.fields(stage.method)}:
            raise ValueError(f"--threshold does not fit the method {stage.method.name}, which has none")
        stage = dataclasses.replace(stage, method=dataclasses.replace(stage.method, **{"threshold": threshold}))
    if layers is not None:
        stage = dataclasses.replace(stage, layers=parse_layers(layers))
    return dataclasses.replace(plan, vision=(stage,))


def parse_layers(text: str) -> Any:
    """ "first_half", or numbers and ranges ("0-5", both ends included; "0,2,4")."""
    if text == "first_half":
        return text
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if dash and int(last) >= _DEEPEST:
                raise ValueError(f"no model has {_DEEPEST} layers")
            chosen += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError as error:
        raise ValueError(f'layers are "first_half", "0-5" or "0,2,4" (0-based), got {text!r}') from error
    return chosen
