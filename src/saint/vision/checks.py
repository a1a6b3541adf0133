"""What is checked of an encoder before anything is touched.

Letters: P prefix tokens, N tokens behind them, C channels, D head dim.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..runtime.blocks import Block
from ..runtime.points import DropPoint
from ..upstream.names import IMPLEMENTATION, TIMM_ROTARY
from ..upstream.specs import BlockSpec, EncoderSpec, part

# attention implementations of transformers that take a dense mask; the others run samples of equal length together
_DENSE_MASK = {"sdpa", "eager"}


def placed(spec: EncoderSpec, modules: Sequence[nn.Module], points: Sequence[DropPoint]) -> list[DropPoint]:
    """The drop points, with the placement that the plan leaves to the model."""
    known = (_block_spec(spec, modules[p.layer]) for p in points if not p.placement and p.method is not None)
    placement = "mid" if all(found is not None and found.seam for found in known) else "post"
    return [point if point.placement else replace(point, placement=placement) for point in points]


def read_blocks(
    encoder: nn.Module, spec: EncoderSpec, modules: Sequence[nn.Module], first: int
) -> "list[Block | None]":
    """The blocks of an encoder through their specs; None for a class that the spec does not know.

    Args:
        encoder: owns the blocks.
        spec: what is known of its class.
        modules: the blocks.
        first: the first block that must be known.

    Raises:
        UnsupportedModelError: an unknown block from ``first`` on.
        ParityError: a block lacks what its spec names.
    """
    blocks: list[Block | None] = []
    for index, module in enumerate(modules):
        known = _block_spec(spec, module)
        blocks.append(None if known is None else Block(module, known, f"{spec.blocks}.{index}"))
    unknown = [index for index, block in enumerate(blocks) if block is None and index >= first]
    if unknown:
        kind = type(modules[unknown[0]]).__name__
        raise UnsupportedModelError(f"{spec.blocks}.{unknown[0]} is a {kind}; known: {', '.join(spec.block_specs)}")
    return blocks


def check_seams(blocks: Sequence[Block | None], points: dict[int, DropPoint]) -> None:
    """Refuse ``placement="mid"`` at a block that has no place between attention and MLP; ``points`` by layer."""
    for index, point in points.items():
        block = blocks[index]
        if point.placement == "mid" and block is not None and not block.spec.seam:
            raise UnsupportedModelError(
                f"{block.name} is a {type(block.module).__name__}, between whose attention and MLP there is no place to "
                'drop tokens: use placement="post", or leave placement out'
            )


def takes_dense_mask(encoder: nn.Module, block: Block) -> bool:
    """Tell whether the attention of a block can be given a dense mask as the encoder is set now."""
    implementation = IMPLEMENTATION.get(getattr(encoder, "config", None))
    return block.mask is not None and (implementation is None or implementation in _DENSE_MASK)


def takes_weights(block: Block, masks: bool) -> bool:
    """Tell whether weights of merged tokens reach the attention of a block, which takes a dense mask or not (``masks``)."""
    return block.spec.padding is not None or masks


def check_bias(block: Block | None, masks: bool, beta: float) -> None:
    """Refuse weights of merged tokens where no argument of the attention takes them.

    Args:
        block: a layer whose tokens may have been merged.
        masks: its attention takes a dense mask.
        beta: of the method, see :class:`saint.runtime.state.LayerState`.
    """
    if block is not None and not takes_weights(block, masks):
        raise UnsupportedModelError(
            f"{block.name} ({type(block.module).__name__}) takes no dense attention mask, through which "
            f"beta={beta:g} weighs merged tokens: set beta=0, or load the model with SDPA or eager attention"
        )


def check_attention(encoder: nn.Module) -> None:
    """Refuse an encoder whose attention is to be looked at and does not go through torch's own functions."""
    implementation = IMPLEMENTATION.get(getattr(encoder, "config", None))
    if implementation not in (None, "sdpa"):
        raise UnsupportedModelError(
            f"a method looks at the attention of {type(encoder).__name__}, which is not seen with "
            f'attn_implementation="{implementation}": load the model with attn_implementation="sdpa"'
        )


def check_output(encoder: nn.Module, spec: EncoderSpec, output: str) -> None:
    """Refuse ``output="nearest"`` of an encoder that shows no patch grid."""
    if output == "nearest" and spec.patch is None:
        raise UnsupportedModelError(
            f'{type(encoder).__name__} shows no patch grid: output="nearest" is not possible, use "similar"'
        )


def prove(blocks: Sequence[Block | None], points: dict[int, DropPoint], prefix: int) -> None:
    """Prove every block that will be split, see :meth:`saint.runtime.blocks.Block.prove`.

    Args:
        blocks: of the encoder.
        points: drop points by layer.
        prefix: P.
    """
    for index, point in points.items():
        if point.placement != "mid":
            continue
        block = blocks[index]
        assert block is not None
        prove_block(block, prefix)


def prove_block(block: Block, prefix: int) -> None:
    """Prove a block that has a place between attention and MLP, see :meth:`saint.runtime.blocks.Block.prove`."""
    assert block.spec.attn is not None
    unit = block.units[0][0]
    attn = part(unit, block.spec.attn)
    norm = part(unit, block.spec.norm1 or block.spec.norm2 or "norm1")
    width = norm.weight.shape[-1]
    # timm 1.0.20 keeps no head_dim
    dim = getattr(attn, "head_dim", None) or width // getattr(attn, "num_heads", width)
    block.prove(width, prefix, partial(_probe_table, dim, prefix))


def _block_spec(spec: EncoderSpec, module: nn.Module) -> BlockSpec | None:
    return next((spec.block_specs[c.__name__] for c in type(module).__mro__ if c.__name__ in spec.block_specs), None)


def _probe_table(dim: int, prefix: int, name: str, like: Tensor) -> Any:
    """A positional table for an input ``like`` [..., P + N, C]: [N, 2 D] in one tensor, or two of [N, D]."""
    count = like.shape[-2] - prefix
    values = torch.randn(count, 2 * dim, generator=torch.Generator().manual_seed(1)).to(like)
    return values if name in TIMM_ROTARY.spellings else (values[:, :dim], values[:, dim:])


def check_softer(encoder: nn.Module, spec: EncoderSpec, blocks: "Sequence[Block | None]", logn: float) -> None:
    """Refuse ``logn`` where the keys of attention cannot be scaled.

    Args:
        encoder: owns the blocks.
        spec: what is known of its class.
        blocks: from the first one that tokens may be missing from.
        logn: see :class:`saint.Stage`.

    Raises:
        UnsupportedModelError: attention over the pictures of a packed sequence, or whose keys no module shows.
    """
    why = "it lays all pictures in one sequence" if spec.packed else ""
    if not why and any(block is None or not block.key_source or block.recomputes for block in blocks):
        why = "no module of its attention shows the keys"
    if why:
        raise UnsupportedModelError(
            f"logn={logn:g} scales keys, which {type(encoder).__name__} cannot: {why}; leave logn out"
        )
