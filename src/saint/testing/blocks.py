"""Residual blocks of an encoder, as the contracts look at them: anatomy, first module, FLOPs per half."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..flops import count_flops
from ..runtime.blocks import units
from ..upstream.specs import BlockSpec, EncoderSpec, part
from .hiding import unfused
from .outputs import Inputs, run


def block_spec(block: nn.Module, spec: EncoderSpec) -> BlockSpec:
    """Anatomy that the encoder's spec has for this class of block, or for the nearest of its base classes."""
    return next(spec.block_specs[c.__name__] for c in type(block).__mro__ if c.__name__ in spec.block_specs)


def first_part(block: nn.Module, spec: EncoderSpec) -> nn.Module:
    """Module of a block that reads the residual stream first: the norm, or the attention where the norm comes behind it."""
    anatomy = block_spec(block, spec)
    return part(units(block, anatomy)[0][0], anatomy.norm1 or anatomy.attn or "norm1")


def block_flops(
    model: nn.Module, spec: EncoderSpec, blocks: list[nn.Module], inputs: Inputs
) -> tuple[dict[str, Tensor], list[tuple[int, float, float, float]], list[str]]:
    """Outputs; per block: tokens in, linear FLOPs of the attention half, of the MLP, and FLOPs quadratic in tokens; operators
    that were not counted."""
    names = {
        module: f"{type(model).__name__}.{path}" if path else type(model).__name__
        for path, module in model.named_modules()
    }
    tokens: list[int] = []

    def length(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens.append((args[0] if args else next(iter(kwargs.values()))).shape[1])

    with ExitStack() as stack:
        stack.enter_context(unfused())  # the fused kernel does not say which half costs what
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(length, with_kwargs=True).remove)
        output, counted = count_flops(lambda: run(model, inputs))
    by_module = counted.by_module
    out = []
    for index, block in enumerate(blocks):
        anatomy = block_spec(block, spec)  # of the model's own parts: scoring is matrix products too
        halves: list[list[dict[str, int]]] = [[by_module[names[block]]], []]  # without a seam all counts as one half
        if anatomy.seam:
            paths = (anatomy.padding or anatomy.attn, anatomy.mlp)
            halves = [
                [by_module[names[part(unit, path or "")]] for unit in parallel]
                for path, parallel in zip(paths, units(block, anatomy), strict=True)
            ]
        for _, table in anatomy.bias:  # computed for all pairs of tokens, dropped ones too
            if isinstance(holder := part(block, table), nn.Module):
                parts = [by_module[names[child]] for child in holder.children() if names[child] in by_module]
                halves[0] += [{op: -flops for op, flops in counts.items()} for counts in parts]
        attention = {op: sum(half.get(op, 0) for half in halves[0]) for op in {op for half in halves[0] for op in half}}
        mlp = sum(sum(half.values()) for half in halves[1])
        squared = sum(v for op, v in attention.items() if "attention" in op or "bmm" in op)  # bmm: unfused
        out.append((tokens[index], float(sum(attention.values()) - squared), float(mlp), float(squared)))
    return output, out, counted.uncounted
