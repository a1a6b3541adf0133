"""What a session says of itself: status, and the summary of a forward."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .methods.base import Method
from .plans import Plan
from .tokens import LayerTrace
from .vision.encoder import PrunedEncoder
from .work import Stack, read_block


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """What is applied at one stage."""

    method: Method
    layers: list[int]
    placement: str
    module: str  # dotted path of the patched encoder in the model, "" for the model itself


@dataclasses.dataclass(frozen=True)
class Status:
    """What is applied to a model.

    Attributes:
        plan: the plan.
        stages: by slot, a tuple of :class:`StageStatus`, one for each stage of the plan in it.
    """

    plan: Plan
    stages: dict[str, tuple["StageStatus", ...]]


@dataclasses.dataclass(frozen=True)
class Count:
    """Tokens per sample, over a batch."""

    mean: float
    least: int
    most: int

    @classmethod
    def of(cls, counts: Tensor) -> "Count":
        """counts int64 [B]."""
        return cls(counts.double().mean().item(), int(counts.min()), int(counts.max()))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ({self.least}..{self.most})" if self.least != self.most else "")


@dataclasses.dataclass(frozen=True)
class Drops:
    """One drop point of a forward: see :class:`saint.LayerTrace`."""

    stage: str
    layer: int
    placement: str
    tokens_in: Count
    tokens_out: Count

    @classmethod
    def of(cls, entry: LayerTrace) -> "Drops":
        return cls(entry.stage, entry.layer, entry.placement, Count.of(entry.tokens_in), Count.of(entry.tokens_out))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a forward dropped, and what that left. Printed, it is a few lines.

    Attributes:
        model: class of the model.
        drops: the drop points, in the order in which tokens pass them.
        layers: by stage ("vision", "language"), visual tokens per sample that enter each layer, means over the batch (protected
            and text tokens not counted; counted like the trace does). Without the language model where nothing drops in front
            of it or inside.
        flops_left: share left of the FLOPs (products of matrices) of the encoder's blocks, in 0..1, computed from the numbers
            of tokens: of what the samples' own tokens need, without the padding of a ragged batch and without scoring. None
            where it is not known: no encoder stage, packed encoders, and blocks whose matrices are not plain linear layers.
        prefill_left: the same of the layers of the language model for the last prompt, text and all; None without one.
        kv_kept: bytes of keys and values that the last prompt left in the cache; None without a cache.
        kv_unpruned: what the unpruned model would hold.
    """

    model: str
    drops: tuple[Drops, ...]
    layers: dict[str, tuple[float, ...]]
    flops_left: float | None
    prefill_left: float | None
    kv_kept: int | None
    kv_unpruned: int | None

    def __str__(self) -> str:
        lines = [f"{self.model}: candidates per sample, mean (least..most)"]
        names = [_place(d) for d in self.drops]
        width = max(map(len, names))
        lines += [
            f"  {name:<{width}}  {d.tokens_in} -> {d.tokens_out}" for name, d in zip(names, self.drops, strict=True)
        ]
        lines += [
            f"entering each {stage} layer: {' '.join(f'{n:.0f}' for n in counts)}"
            for stage, counts in self.layers.items()
        ]
        if self.flops_left is not None or self.prefill_left is None:
            left = "unknown" if self.flops_left is None else f"{self.flops_left:.2f}"
            lines.append(f"FLOPs left in the blocks of the encoder: {left}")
        if self.prefill_left is not None:
            lines.append(f"FLOPs left in the language model, of the prompt: {self.prefill_left:.2f}")
        if self.kv_kept is not None and self.kv_unpruned:
            share = self.kv_kept / self.kv_unpruned
            lines.append(f"KV cache: {self.kv_kept:,} of {self.kv_unpruned:,} bytes ({share:.2f})")
        return "\n".join(lines)


def _place(drops: Drops) -> str:
    if drops.stage == "connector":
        return drops.stage
    return f"{drops.stage} input" if drops.placement == "input" else f"{drops.stage} {drops.layer}"


def describe(model: str, state: str, status: Status) -> str:
    """A session in a few lines."""
    lines = [f"<Session: {state} on {model}" + ("" if status.stages else ", empty plan")]
    for name, stages in status.stages.items():
        for stage in stages:
            where = "" if name == "connector" else f" at {_layers(stage.layers)} ({stage.placement})"
            inside = f", in {stage.module}" if stage.module else ""
            lines.append(f"  {name}: {_method(stage.method)}{where}{inside}")
    return "\n".join(lines) + ">"


def _method(method: Method) -> str:
    """The method with the settings that are not its defaults."""
    told = [f for f in dataclasses.fields(method) if getattr(method, f.name) != f.default]
    return f"{type(method).__name__}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in told)})"


def _layers(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}..{layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


# -- tokens and FLOPs -------------------------------------------------------------------------------------------------


def _entering(entries: Sequence[LayerTrace], first: Tensor, depth: int) -> list[Tensor]:
    """Tokens that enter each layer and those behind the last, depth + 1 times int64 [B]; ``first`` before any was dropped."""
    after = {entry.layer: entry.tokens_out for entry in entries if entry.placement != "input"}
    front = [entry.tokens_out for entry in entries if entry.placement == "input"]
    counts = [front[-1] if front else first]
    for layer in range(depth):
        counts.append(after.get(layer, counts[-1]))
    return counts


def tokens_per_layer(trace: Sequence[LayerTrace], stage: str, depth: int) -> tuple[float, ...]:
    """Mean over the batch of the visual tokens that enter each layer; () where the trace does not tell."""
    entries = [entry for entry in trace if entry.stage == stage]
    connector = [entry.tokens_out for entry in trace if entry.stage == "connector" and stage == "language"]
    if not entries and not connector:
        return ()
    first = connector[0] if connector else entries[0].tokens_in
    return tuple(counts.double().mean().item() for counts in _entering(entries, first, depth)[:depth])


class Costs(NamedTuple):
    """What FLOPs of the last forward follow from.

    Attributes:
        encoder: its blocks; None where these do not say it all, or nothing leaves in it.
        decoder: the layers of the language model; likewise.
        prompt: visual tokens of each sample of the last prompt, of the unpruned model, and the others, int64 [B] each; None
            before one, and of packed rows.
    """

    encoder: Stack | None = None
    decoder: Stack | None = None
    prompt: tuple[Tensor, Tensor] | None = None


def encoder_work(encoder: PrunedEncoder) -> Stack | None:
    """The blocks of an encoder; None where their weights do not say what FLOPs they take."""
    found = [None if block is None else read_block(block) for block in encoder.blocks]
    layers = tuple(one[0] for one in found if one is not None)
    whole = not encoder.packed and len(layers) == len(found) and all(one is not None and one[1] for one in found)
    return Stack(layers, encoder.prefix, (encoder.merge_size or 1) ** 2) if whole else None


def encoder_left(stack: Stack, trace: Sequence[LayerTrace]) -> float | None:
    """See :attr:`Summary.flops_left`."""
    entries = [entry for entry in trace if entry.stage == "vision"]
    if not entries:
        return None
    mid = [entry.layer for entry in entries if entry.placement == "mid"]
    depth, first = len(stack.layers), entries[0].tokens_in
    left = stack.flops([c.double() for c in _entering(entries, first, depth)], mid)
    return float(left.sum() / stack.flops([first.double()] * (depth + 1)).sum())


def prefill_left(stack: Stack, prompt: tuple[Tensor, Tensor], trace: Sequence[LayerTrace]) -> float:
    """See :attr:`Summary.prefill_left`."""
    visual, others = (counts.double() for counts in prompt)
    entries = [entry for entry in trace if entry.stage == "language"]
    connector = [entry.tokens_out for entry in trace if entry.stage == "connector"]
    mid = [entry.layer for entry in entries if entry.placement == "mid"]
    depth = len(stack.layers)
    first = connector[-1] if connector else entries[0].tokens_in if entries else visual
    left = stack.flops([c.double() + others for c in _entering(entries, first, depth)], mid)
    return float(left.sum() / stack.flops([visual + others] * (depth + 1)).sum())
