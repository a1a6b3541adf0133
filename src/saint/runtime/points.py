"""Where tokens may go, and how a method is asked there.

Letters: B samples, N candidates, D head dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..tokens import Candidates, Selection


class Pruner(Protocol):
    """What the mechanism asks of a method."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def merges(self) -> bool: ...

    @property
    def averages(self) -> bool: ...

    @property
    def fixed(self) -> int | float | None: ...

    @property
    def keeps_everything(self) -> bool: ...

    def select(self, candidates: Candidates) -> Selection | None: ...

    def validate(self, total: int, steps: int) -> None: ...

    def size_bias(self) -> float: ...


@dataclass(frozen=True)
class DropPoint:
    """A place at which tokens may go.

    Attributes:
        slot: "vision", "connector" or "language".
        layer: 0-based.
        placement: "input": in front of the layer, "mid": between its attention and its MLP, "post": behind it.
        method: what decides; None where candidates are only shown to observers.
        step: this is drop point ``step`` (0-based) of ``steps`` of its stage in the plan.
        steps: drop points of that stage.
        needs: what is computed on demand for the method and the observers of the candidates.
        shown: observers see the candidates.
        group: which stage of its slot it belongs to.
    """

    slot: str
    layer: int
    placement: str
    method: Pruner | None
    step: int = 0
    steps: int = 1
    needs: frozenset[str] = frozenset()
    shown: bool = False
    group: int = 0


def select_some(method: Pruner, candidates: Candidates, some: list[int]) -> Selection | None:
    """The decision for the samples that have candidates."""
    tokens = candidates.tokens
    pick = torch.tensor(some, device=tokens.index.device)
    part = replace(
        tokens,
        index=tokens.index[pick],
        lengths=tuple(tokens.lengths[i] for i in some),
        total=tuple(tokens.total[i] for i in some),
        valid=None if tokens.valid is None else tokens.valid[pick],
    )
    attention = None if candidates.attention is None else candidates.attention[pick]
    chosen = method.select(
        replace(
            candidates,
            keys=candidates.keys[pick],
            features=candidates.features[pick],
            tokens=part,
            attention=attention,
            facts=candidates.facts.of_samples(some),
            rows={name: row[pick] for name, row in candidates.rows.items()},
        )
    )
    if chosen is None:
        return None
    keep = torch.zeros_like(tokens.index, dtype=torch.bool)
    keep[pick] = chosen.mask(tokens.slots)
    lengths = [0] * len(tokens.lengths)
    for sample, n in zip(some, chosen.lengths, strict=True):
        lengths[sample] = n
    stays = Selection.from_mask(keep, tuple(lengths))

    def of_all(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        full = value.new_zeros(len(lengths), *value.shape[1:])
        full[pick] = value
        return full

    return replace(stays, owner=of_all(chosen.owner), adds=of_all(chosen.adds), gone=of_all(chosen.gone))


def refuse_non_finite(keys: Tensor, where: Callable[[], str]) -> None:
    """Raise ``ValueError`` where keys [B, N, D] of a sample are NaN or Inf; ``where`` says of which layer."""
    if math.isfinite(keys.sum()):  # one operation; a sum that overflows is looked at again
        return
    bad = ~torch.isfinite(keys).flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{where()} are NaN or Inf for sample(s) {bad.nonzero().flatten().tolist()}: check the pixels for NaN or Inf, and "
            "fp16 overflow"
        )
