"""What the output loses when a fixed share of the candidates leaves at exactly one layer.

Plans of one layer, applied by :func:`saint.apply`: tokens chosen at random and by SAINT; where asked for, also by attention,
or merged.

Letters: B samples, N candidates.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.base import FixedBudget, Method
from ...methods.fastv import FastV
from ...methods.random import Random
from ...methods.saint import Saint
from ...methods.tome import ToMe
from ...plans import Output, Plan, Stage
from ...runtime.attended import Attended
from ...runtime.received import class_attention
from ...session import pruned
from ...tokens import Candidates, Selection
from ..kinds import Subject

# "attention": what CLS (encoders) or the last prompt token (language models) attends to least; "tome": merged, with proportional
# attention, and "tome_plain" without
METHODS = ("random", "saint", "attention", "tome", "tome_plain")


class Looks:
    """Listens for what the first protected token of an encoder (CLS) attends to; an observer for :func:`saint.apply`."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}

    def attention(self, stage: str, layer: int, attended: Attended) -> None:
        """Keep the row of CLS, averaged over heads, float32 [B, N]."""
        prefix, slots = attended.prefix, attended.state.tokens.slots
        if stage != "vision" or not prefix or attended.key.shape[-2] != prefix + slots:
            return
        self._rows.setdefault(layer, []).append(class_attention(attended)[:, prefix:])

    def take(self) -> dict[int, Tensor]:
        """Return what was heard since the last call, by layer, [B, N]; of parallel attentions the mean."""
        found = {layer: torch.stack(calls).mean(0) for layer, calls in self._rows.items()}
        self._rows = {}
        return found


@dataclass(frozen=True)
class Given(FixedBudget):
    """Keeps the tokens with the highest of the scores it was given: one image, one layer. Not registered."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = ""
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})

    scores: tuple[tuple[float, ...], ...] = ()  # of each sample and candidate

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        tokens = candidates.tokens
        return Selection.from_scores(torch.tensor(self.scores, device=tokens.index.device), goal, tokens)


@dataclass(frozen=True)
class Causal:
    """The one-layer plans of a model.

    Attributes:
        subject: the model; a loss is measured as it says.
        share: of the candidates that leave; SAINT drops sources only, so at most half.
        layers: by stage, the layers at which tokens can leave.
        methods: by stage, SAINT with its settings for this model.
        output: of a vision stage, see :class:`saint.Stage`.
        seed: of the random choice, which differs from image to image.
        choices: of ``METHODS``, "saint" among them: each is a forward per layer.
    """

    subject: Subject
    share: float
    layers: dict[str, list[int]]
    methods: dict[str, Saint]
    output: Output = "survivors"
    seed: int = 0
    choices: tuple[str, ...] = ("random", "saint")

    def __post_init__(self) -> None:
        if "saint" not in self.choices or not set(self.choices) <= set(METHODS):
            raise ValueError(f"choices are of {', '.join(METHODS)}, saint among them, got {', '.join(self.choices)}")
        if not 0 < self.share <= 0.5:
            raise ValueError(
                f"share is a fraction of the candidates in (0, 0.5] (SAINT drops at most half), got {self.share}"
            )

    @staticmethod
    def of(
        subject: Subject, share: float, plan: Plan | None = None, seed: int = 0,
        choices: tuple[str, ...] = ("random", "saint"),
    ) -> "Causal":  # fmt: skip
        """The plans for a model.

        Args:
            subject: the model.
            share: see above.
            plan: one that suits it: its SAINT settings are used, and its output.
            seed: see above.
            choices: see above.
        """
        stages = {} if plan is None else plan.slots
        own = {slot: stage[0] for slot, stage in stages.items() if stage}
        layers = subject.layers()
        methods = {}
        for slot in layers:
            method = own[slot].method if slot in own else None
            methods[slot] = replace(method if isinstance(method, Saint) else usual_saint(slot), budget=1 - share)
        output = own["vision"].output if "vision" in own else "survivors"
        return Causal(subject, share, layers, methods, output, seed, choices)

    def plan(self, slot: str, layer: int, method: str, image: str, scores: Tensor | None = None) -> Plan:
        """Tokens leave at ``layer``, by ``method``; ``scores`` are what "attention" goes by in an encoder, [B, N]."""
        keep = 1 - self.share
        chosen: Method
        if method == "saint":
            chosen = self.methods[slot]
        elif method == "random":
            chosen = Random(keep=keep, seed=zlib.crc32(f"{self.seed} {image}".encode()))
        elif method != "attention":
            chosen = ToMe(keep=keep, beta=1.0 if method == "tome" else 0.0)
        elif slot == "language":
            chosen = FastV(keep=keep)
        else:
            assert scores is not None
            chosen = Given(keep, tuple(map(tuple, scores.tolist())))
        stage = Stage(chosen, layers=[layer], output=self.output) if slot == "vision" else Stage(chosen, layers=[layer])
        slots: dict[str, Any] = {slot: stage}
        return Plan(**slots)

    def losses(
        self,
        run: Callable[[], Tensor],
        base: Tensor,
        image: str,
        depth: Mapping[str, int],
        looks: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> dict[str, dict[str, list[float | None]]]:
        """Return what one image loses, by stage and method, a number per layer (None: no tokens can leave there).

        Args:
            run: the model's forward on the image, what is compared of it.
            base: what that gives of the unpruned model.
            image: name, for the random choice.
            depth: layers of each stage.
            looks: what CLS attends to, by layer, of :class:`Looks`; layers without it have no choice by attention.
        """
        out: dict[str, dict[str, list[float | None]]] = {}
        for slot, layers in self.layers.items():
            out[slot] = {method: [None] * depth[slot] for method in self.choices}
            for layer in layers:
                for method in self.choices:
                    scores = looks.get(layer)
                    if method == "attention" and slot == "vision" and scores is None:
                        continue
                    with pruned(self.subject.model, self.plan(slot, layer, method, image, scores)):
                        out[slot][method][layer] = self.loss(base, run())
        return out

    def loss(self, base: Tensor, found: Tensor) -> float:
        """Return what ``found`` lost against ``base``."""
        values = self.subject.losses(base, found)
        return max(0.0, sum(values) / len(values))


def usual_saint(slot: str) -> Saint:
    """SAINT with the published threshold of a stage, for models without settings of their own."""
    return Saint(threshold=0.75 if slot == "vision" else 0.83)
