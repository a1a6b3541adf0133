"""FLOPs by shape: what layers take for a number of tokens, read off their weights, and what a plan with fixed budgets leaves.

Letters: N candidates, n of them left, P tokens that never leave, W weights of linear layers, A channels of attention.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .methods.base import Method, scheduled_keep
from .plans import Stage
from .runtime.blocks import Block
from .upstream.names import ATTENTION, EXPERTS_USED
from .upstream.specs import part

NOBODY: Mapping[int, Method] = MappingProxyType({})


class Layer(NamedTuple):
    """What the FLOPs of a layer follow from: 2 W n of its linear layers, and 4 A n^2 for QK^T and AV.

    Attributes:
        attention: W in front of the place between attention and MLP.
        rest: W behind it.
        width: A.
        window: tokens that attend to each other; None: all do.
        keys: W of what computes the keys once more, where a method is to see them.
        dim: channels of a head.
    """

    attention: float
    rest: float
    width: int
    window: int | None = None
    keys: int = 0
    dim: int = 0

    def flops(self, inside: Any, behind: Any) -> Any:
        """FLOPs when so many tokens (numbers or tensors of them) enter the attention and the rest."""
        seen = inside if self.window is None else _least(inside, self.window)
        return 2 * self.attention * inside + 4 * self.width * inside * seen + 2 * self.rest * behind


def _least(tokens: Any, most: int) -> Any:
    return tokens.clamp(max=most) if isinstance(tokens, Tensor) else min(tokens, most)


@dataclass(frozen=True)
class Stack:
    """Layers that tokens of one slot run through.

    Attributes:
        layers: of each what its FLOPs follow from.
        others: P.
        group: tokens that a candidate consists of.
        fixed: FLOPs of what runs in front of the layers, whatever leaves.
        channels: C of the tokens, which a method in front of the layers compares.
        pool: W of what reads every token behind the layers.
    """

    layers: tuple[Layer, ...]
    others: int = 0
    group: int = 1
    fixed: float = 0.0
    channels: int = 0
    pool: float = 0.0

    def flops(self, entering: Sequence[Any], mid: Collection[int] = (), choosing: Mapping[int, Method] = NOBODY) -> Any:
        """FLOPs when so many candidates enter each layer, and behind the last: depth + 1 numbers, or tensors [B].

        Args:
            entering: the numbers.
            mid: layers whose tokens leave between attention and MLP.
            choosing: methods that see the keys of a layer.
        """
        counts = [n * self.group + self.others for n in entering]
        total = self.fixed + 2 * self.pool * counts[-1]
        for index, layer in enumerate(self.layers):
            total = total + layer.flops(counts[index], counts[index + 1 if index in mid else index])
            if index in choosing:
                total = total + 2 * layer.keys * counts[index]
                total = total + choosing[index].flops(entering[index], entering[index + 1], layer.dim)
        return total


def read_layer(module: nn.Module, attention: Sequence[nn.Module], window: int | None = None) -> tuple[Layer, bool]:
    """Read what a layer's FLOPs follow from, and whether its weights say it all.

    Args:
        module: the layer.
        attention: of its parts, those in front of the place between attention and MLP; none: the layer itself.
        window: see :class:`Layer`.
    """
    parts = list(attention) or [module]
    counted = _weights(module)
    own = {key for one in parts for key in _weights(one)}
    mine = sum(n for key, n in counted.items() if key in own)
    widths = [_width(one) for one in parts]
    exact = (
        all(p.ndim < 2 or p.numel() == p.shape[-1] or id(p) in counted for p in module.parameters())
        and None not in widths
    )
    return Layer(mine, sum(counted.values()) - mine, sum(w or 0 for w in widths), window), exact


def read_block(block: Block, window: int | None = None) -> tuple[Layer, bool]:
    """:func:`read_layer` of a block of an encoder."""
    spec, module = block.spec, block.module
    named = [part(unit, spec.attn) for unit in block.units[0]] if spec.attn else []
    # an attention that is a method of its block calls the module that is told of padding
    attention = [one if isinstance(one, nn.Module) else part(module, spec.padding or "") for one in named]
    known = [one for one in attention if isinstance(one, nn.Module)]
    layer, exact = read_layer(module, known, window)
    if (
        not known
    ):  # nothing leaves in its middle, so only the width is wanted: of the narrowest layer, for what shows the keys
        inner = part(module, block.key_source.rpartition(".")[0]) if block.key_source else None
        layer = layer._replace(width=_narrowest(inner if isinstance(inner, nn.Module) else module))
    table = bias_table(block)
    if table is not None:
        layer = layer._replace(attention=layer.attention - sum(_weights(table).values()))
    if block.recomputes:  # of queries, keys and values the keys, their mean over heads
        shown = part(block.units[0][0], block.key_source)
        layer = layer._replace(keys=0 if shown is None else shown.numel() // (3 * block.heads))
    heads: Any = block.heads or next((one.num_heads for one in known if hasattr(one, "num_heads")), 1)
    layer = layer._replace(dim=layer.width // len(block.units[0]) // heads)
    return layer, exact and bool(known) and len(known) == len(attention) and not spec.bias


def read_pool(module: nn.Module) -> float:
    """W that an attention pool has for every token: those of keys and values, in one piece."""
    linear = sum(
        one.weight.numel()
        for one in module.modules()
        if isinstance(one, nn.Linear) and one.out_features == 2 * one.in_features
    )
    stacked = sum(
        one.in_proj_weight.numel() * 2 / 3
        for one in module.modules()
        if isinstance(one, nn.MultiheadAttention) and one.in_proj_weight is not None
    )
    return linear + stacked


def bias_table(block: Block) -> nn.Module | None:
    """The module of a block that makes a bias over pairs of places, of all places whatever is left; None where it has none."""
    found = next((part(block.module, table) for method, table in block.spec.bias if method == block.bias), None)
    return found if isinstance(found, nn.Module) else None


def read_decoder(layers: Sequence[nn.Module], config: Any) -> tuple[tuple[Layer, ...], bool]:
    """:func:`read_layer` of the layers of a language model; of experts, those that a token visits are counted."""
    found = [read_layer(layer, [one for one in [ATTENTION.get(layer)] if one is not None]) for layer in layers]
    used = EXPERTS_USED.get(config)
    if used is not None:
        found = [(_with_experts(layer, one, used), exact) for layer, (one, exact) in zip(layers, found, strict=True)]
    return tuple(layer for layer, _ in found), all(exact for _, exact in found)


def _with_experts(module: nn.Module, layer: Layer, used: int) -> Layer:
    stacked = sum(p.numel() * used / p.shape[0] for p in module.parameters() if p.ndim == 3)
    return layer._replace(rest=layer.rest + stacked)


def _weights(module: nn.Module) -> dict[int, int]:
    """Weights of the linear layers in a module, by identity."""
    found = {}
    for one in module.modules():
        if isinstance(one, nn.Linear):
            found[id(one.weight)] = one.in_features * one.out_features  # quantised weights are packed
        elif isinstance(stacked := getattr(one, "in_proj_weight", None), Tensor):
            found[id(stacked)] = stacked.numel()
    return found


def _narrowest(module: nn.Module) -> int:
    """Channels in front of the narrowest linear layer: the hidden layer of an MLP is wider than an attention."""
    return min((one.in_features for one in module.modules() if isinstance(one, nn.Linear)), default=0)


def _width(attention: nn.Module) -> int | None:
    """Heads times head dim: what the output projection, the last linear layer, takes."""
    linear = [module for module in attention.modules() if isinstance(module, nn.Linear)]
    return linear[-1].in_features if linear else None


def entering(
    stages: Sequence[Stage], layers: Sequence[Sequence[int]], total: int, depth: int, seam: bool = False
) -> tuple[list[int], frozenset[int]]:
    """Candidates that enter each layer and those behind the last, under fixed budgets, and the layers that drop in their middle.

    Args:
        stages: of a slot.
        layers: of each stage; of one in front of the layers anything.
        total: candidates.
        depth: layers.
        seam: what a placement of None means: between attention and MLP.

    Raises:
        ValueError: a budget that is no number, or cannot be had of the tokens that reach it.
    """
    now, behind, mid = total, {}, set()
    for stage, chosen in zip(stages, layers, strict=True):
        came = now
        stage.method.validate(came, len(chosen))
        for step, layer in enumerate(chosen):
            now = _left(stage.method, came, now, step, len(chosen))
            behind[-1 if stage.placement == "input" else layer] = now
            if stage.placement == "mid" or (stage.placement is None and seam):
                mid.add(layer)
    now = behind.get(-1, total)
    counts = [now]
    for layer in range(depth):
        now = behind.get(layer, now)
        counts.append(now)
    return counts, frozenset(mid)


def _left(method: Method, came: int, now: int, step: int, steps: int) -> int:
    merged = getattr(method, "r", None)
    if merged is not None:
        return now - min(merged, now // 2)
    if method.fixed is None:
        raise ValueError(
            f"{type(method).__name__} lets pictures decide how many tokens stay, so their shape does not tell"
        )
    return scheduled_keep(method.final(came), came, step, steps)
