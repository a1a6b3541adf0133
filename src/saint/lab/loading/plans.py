"""Plans as users give them: as text, and changed by options."""

import dataclasses

from ...plans import Plan


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
        stage = dataclasses.replace(stage, layers=layers)
    return dataclasses.replace(plan, vision=(stage,))
