"""`saint.freeze`: numbers of tokens in place of decisions per image."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .methods.base import Method, step_possible
from .plans import Plan, Stage
from .samples import Sample, read_samples
from .session import PlanLike, as_plan, pruned


def freeze(plan: PlanLike, model: nn.Module, images: Any) -> Plan:
    """The plan with one number for all images where its methods, or a guard, let every image have its own.

    Each drop point of such a method becomes a stage that keeps a fixed share of the tokens in front of it: the mean number left
    there over ``images``, by the mean number that came. For images of one size that is one number of tokens per layer, so shapes
    are static: the plan compiles without a graph break and can be exported. Which tokens go is still decided per image. Stages
    with a fixed budget stay as they are.

    Args:
        plan: what :func:`saint.apply` takes.
        model: it is applied to, in eval mode, without a plan; an encoder or a vision-language model.
        images: to count on; as for :func:`saint.tune`, one or more.

    Returns:
        The plan, without what :attr:`saint.Plan.tuned` says of the other.

    Raises:
        ValueError: no images, nothing leaves on them, or a method of which it is not known how many tokens it keeps.
        TypeError: neither plan nor images.
        AlreadyAppliedError: the model carries a plan.
        UnsupportedModelError: the plan cannot be applied to the model.

    Example:
        >>> import timm, torch, saint
        >>> vit = timm.create_model("test_vit").eval()
        >>> plan = saint.freeze(saint.Saint(threshold=0.5), vit, torch.randn(4, 3, 160, 160))
        >>> [type(stage.method.keep).__name__ for stage in plan.slots["vision"]][:1]
        ['float']
    """
    plan, samples = as_plan(plan), read_samples(images)
    if not samples:
        raise ValueError(
            "no images: a plan is frozen to the numbers of tokens that are left on images of yours, give one or more"
        )
    for slot, stages in plan.slots.items():
        for stage in stages:
            _check(slot, stage.method)
    if not any(_varies(stage) for stages in plan.slots.values() for stage in stages):
        return plan
    layers, counts = _counted(plan, model, samples)
    slots: dict[str, Any] = {}
    for slot, stages in plan.slots.items():
        frozen: list[Stage] = []
        for group, (stage, chosen) in enumerate(zip(stages, layers[slot], strict=True)):
            frozen += _frozen(slot, group, stage, chosen, counts) if _varies(stage) else [stage]
        if frozen:
            slots[slot] = frozen
    if not slots:
        raise ValueError(
            f"on the {len(samples)} image(s) no token leaves, so nothing is left to freeze: give a lower threshold, or others"
        )
    return Plan(**slots)


def _varies(stage: Stage) -> bool:
    """Tell whether images keep their own numbers of tokens."""
    return stage.method.votes or stage.guard > 0


def _check(slot: str, method: Method) -> None:
    if not {"keep", "r"} & inspect.signature(type(method)).parameters.keys():
        raise ValueError(
            f"{type(method).__name__} of the {slot} stage has no setting that says how many tokens it keeps (keep or r), "
            "so it cannot be frozen"
        )


# where: stage, number of the plan's stage in it, layer
_Counts = dict[tuple[str, int, int], list[tuple[int, int]]]


def _counted(plan: Plan, model: nn.Module, samples: Sequence[Sample]) -> tuple[dict[str, list[list[int]]], _Counts]:
    """Layers of each stage by slot, and of each drop point the tokens in front of it and behind it, per image."""
    counts: _Counts = {}
    with pruned(model, plan) as session, torch.inference_mode():
        layers = {slot: [stage.layers for stage in stages] for slot, stages in session.status.stages.items()}
        for sample in samples:
            model(*sample.args, **sample.kwargs)
            for entry in session.trace:
                pairs = zip(entry.tokens_in.tolist(), entry.tokens_out.tolist(), strict=True)
                counts.setdefault((entry.stage, entry.group, entry.layer), []).extend(pair for pair in pairs if pair[0])
    return layers, counts


def _frozen(slot: str, group: int, stage: Stage, layers: Sequence[int], counts: _Counts) -> list[Stage]:
    """A stage per drop point at which tokens leave on average."""
    entry = stage.placement == "input" or slot == "connector"
    out: list[Stage] = []
    came = 0
    for layer in layers or [0]:
        seen = counts.get((slot, group, layer), [])
        if not seen:
            raise ValueError(
                f"no visual token came to layer {layer} of the {slot} stage on these images: give prompts with images"
            )
        came = came or round(sum(n for n, _ in seen) / len(seen))
        left = round(sum(n for _, n in seen) / len(seen))
        while left < came and not step_possible(stage.method, came, left):
            left += 1  # a mean rounded down, where at most half can go
        if left >= came:
            continue
        at = None if entry else [layer]
        out.append(dataclasses.replace(stage, method=stage.method.keeping(left / came), layers=at, guard=0.0))
        came = left
    return out
