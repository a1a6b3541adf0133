"""The vision stage, inside vLLM's own tower: saint's runtime patches it. Its budgets follow from the number of patches alone."""

import dataclasses
from typing import Any

import torch
from torch import nn

from ...methods.base import HUGE, survivors
from ...plans import Plan, Stage
from ...session import Session, apply
from ...upstream import register
from . import names


def checked(plan: Plan) -> tuple[Stage, ...]:
    """The vision stages of ``plan``.

    Raises:
        ValueError: vLLM cannot follow one; the message says why.
    """
    stages = plan.vision
    for stage in stages:
        name = type(stage.method).__name__
        why = None
        if stage.guard or stage.method.votes:
            why = (
                "each picture would keep its own number of tokens, and vLLM reserves the places of a picture before its encoder "
                "runs: give a number or a fraction as keep, or freeze the plan (saint.freeze)"
            )
        elif stage.method.needs:
            why = f"it needs {', '.join(sorted(stage.method.needs))}, which the tower does not show: use another, e.g. saint"
        elif stage.method.merges:
            why = "it joins tokens, whose weights vLLM's attention does not take: use a method that drops them, e.g. saint"
        elif stage.output != "survivors":
            why = (
                f'output="{stage.output}" is of full length, and no place in a prompt would be saved: leave output out'
            )
        elif survivors(stage.method, HUGE) is None:
            why = "it does not say how many tokens it keeps: use a method with keep, e.g. saint"
        if why is not None:
            raise ValueError(f"vLLM cannot follow {name} in the vision stage of a plan: {why}")
    return stages


def resolved(stages: tuple[Stage, ...], config: Any) -> Plan:
    """A plan with the layers of each stage written out, as of the whole tower, of which vLLM loads what is read only.

    Args:
        stages: of the vision slot.
        config: of the model.

    Raises:
        ValueError: layers that are not there, or behind which nothing is read.
    """
    depth, read = names.tower_layers(config)
    layers = Plan(list(stages)).resolve_layers("vision", depth, read)
    if (last := max(chosen[-1] for chosen in layers)) >= read:
        raise ValueError(
            f"layer {last} of the vision stage lies behind the features that the model reads: name layers < {read}"
        )
    pairs = zip(stages, layers, strict=True)
    return Plan([one if one.placement == "input" else dataclasses.replace(one, layers=chosen) for one, chosen in pairs])


def left(plan: Plan, patches: int) -> int:
    """Tokens that the stages of a resolved plan leave of a picture.

    Raises:
        ValueError: there are not as many to keep, or so few that a drop point cannot.
    """
    for stage in plan.vision:
        stage.method.validate(patches, len(stage.layers or (0,)))
        kept = survivors(stage.method, patches)
        patches = patches if kept is None else kept
    return patches


@torch.inference_mode(False)
def prune(model: nn.Module, architecture: str, stages: tuple[Stage, ...]) -> Session:
    """Apply the vision stages to the tower of a model whose weights are loaded."""
    spec = names.tower_spec(architecture)
    register(spec)
    return apply(model.get_submodule(names.TOWERS[architecture][0]), resolved(stages, model.config))
