"""What is known of an encoder class: one row, plain facts. The tables are in timm.py, transformers.py, open_clip.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .blocks import Anatomy


@dataclass(frozen=True)
class EncoderRow:
    """One supported encoder class.

    Attributes:
        title: how people call it.
        library: distribution the class comes from.
        encoder: qualified name of the class that owns the blocks.
        blocks: dotted path to the ModuleList of blocks.
        anatomies: block class name -> anatomy. A block class that is missing supports ``placement="post"`` only.
        prefix: protected tokens in front (CLS, distillation, registers), from the instance.
        patch: dotted path to the convolution whose output shows the patch grid, or None.
        final: dotted path to the norm behind the last block, or None when it comes behind the pool or not at all.
        pools: paths of modules that read the whole sequence behind the last block (attention pools).
        pool_with_prefix: whether an average pool also averages the prefix.
        dense_calls: methods whose maps must be full length (they reshape to the grid).
        packed: samples lie one behind the other in one sequence without batch axis, told by the argument ``grid_thw``.
        order: of a packed encoder: method that reorders groups of tokens and is given their order, or None.
        refuse: reason why this instance cannot be pruned, or None.
    """

    title: str
    library: str
    encoder: str
    blocks: str
    anatomies: dict[str, Anatomy]
    prefix: Callable[[Any], int]
    patch: str | None
    final: str | None = None
    pools: tuple[str, ...] = ()
    pool_with_prefix: Callable[[Any], bool] = lambda _: False
    dense_calls: tuple[str, ...] = ()
    packed: bool = False
    order: str | None = None
    refuse: Callable[[Any], str | None] = field(default=lambda _: None)
