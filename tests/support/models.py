"""The tiny random encoders that the specs bring, by ``library/name``, with a plan and inputs for each."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from timm.models import vision_transformer
from torch import nn

import saint
from saint import testing
from saint.flops import count_flops
from saint.plans import Plan
from saint.testing.examples import enliven
from saint.upstream.registry import ENCODERS

# classes that the oldest supported release lacks
_LACKING = set() if hasattr(vision_transformer, "DiffParallelScalingBlock") else {"vit-diff", "vit-diff-parallel"}

_ALL: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
    f"{spec.library}/{name}": ("forward" in spec.dense_calls, make)
    for spec in ENCODERS
    for name, make in spec.tiny.items()
    if name not in _LACKING
}
BUILDERS: dict[str, Callable[[], nn.Module]] = {name: make for name, (maps, make) in _ALL.items() if not maps}
NAMES = list(BUILDERS)


def build(name: str) -> nn.Module:
    """The model called ``name``, in eval mode, with weights lively enough that layers matter."""
    torch.manual_seed(0)
    return enliven(BUILDERS[name]().eval())


def backbones() -> dict[str, nn.Module]:
    """Encoders whose forward returns feature maps laid on the grid, of every spec of such a class: "beit", ..."""
    return {name.rpartition("/")[2].removesuffix("-backbone"): make() for name, (maps, make) in _ALL.items() if maps}


def snapshot(model):
    """What a session could leave behind in a model."""
    return {
        name: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@functools.cache
def prepared(name: str) -> tuple[torch.nn.Module, Plan, dict[str, torch.Tensor]]:
    model = build(name)
    inputs = testing.example_inputs(model)
    return model, testing.example_plan(model, inputs), inputs


def restage(plan: Plan, **changes: object) -> Plan:
    return Plan(vision=[dataclasses.replace(stage, **changes) for stage in plan.vision])


def share_of(model: nn.Module, plan: Plan, image: torch.Tensor) -> float:
    """FLOPs left of one image, counted without the library's own tables."""

    def run() -> None:
        with torch.no_grad():
            model(image[None])

    whole = count_flops(run)[1].total
    with saint.pruned(model, plan):
        return count_flops(run)[1].total / whole


class _Folded(nn.Module):
    """A convolution of patches that is no module of torch's: what it looks at is not known from outside."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


def without_pixels() -> nn.Module:
    """An encoder that does not show the pixels of its tokens."""
    model = build("timm/vit-augreg")
    model.patch_embed.proj = _Folded(model.patch_embed.proj)
    return model
