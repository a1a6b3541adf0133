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
from torch import Tensor, nn

from ...language.locate import find as find_text
from ...methods.base import FixedBudget, Method
from ...methods.fastv import FastV
from ...methods.random import Random
from ...methods.saint import Saint
from ...methods.tome import ToMe
from ...plans import Output, Plan, Stage
from ...runtime.attended import Attended
from ...session import pruned
from ...tokens import Candidates, Selection
from ...upstream.names import LAYERS
from ...upstream.specs import FamilySpec, part
from ...vision.locate import locate, locate_tower
from ...vlm.locate import find
from ..bench.agreement import agreement
from .attention import rows

# "attention": what CLS (encoders) or the last prompt token (language models) attends to least; "tome": merged, with proportional
# attention, and "tome_plain" without
METHODS = ("random", "saint", "attention", "tome", "tome_plain")
COSINE, KL = "1 - cosine", "KL of the next token"


class Looks:
    """Listens for what the first protected token of an encoder (CLS) attends to; an observer for :func:`saint.apply`."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}

    def attention(self, stage: str, layer: int, attended: Attended) -> None:
        """Keep the row of CLS, averaged over heads, float32 [B, N]."""
        prefix, slots = attended.prefix, attended.state.tokens.slots
        if stage != "vision" or not prefix or attended.key.shape[-2] != prefix + slots:
            return
        found = []
        for sample in range(len(attended.query)):
            mask = attended.mask_of(sample)
            mask = mask if mask is None else mask[..., :1, :]
            query, key = attended.query[sample, :, :1], attended.key[sample]
            ((_, row),) = rows(query, key, scale=attended.scale, mask=mask)
            found.append(row[0, prefix:])
        self._rows.setdefault(layer, []).append(torch.stack(found))

    def take(self) -> dict[int, Tensor]:
        """What was heard since the last call, by layer, [B, N]; of parallel attentions the mean."""
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
        share: of the candidates that leave; SAINT drops sources only, so at most half.
        measure: of an encoder "1 - cosine" of its output (1 - correlation where that is a map); of a language model
            "KL of the next token", KL(unpruned || pruned) behind the last prompt token, nat.
        layers: by stage, the layers at which tokens can leave.
        methods: by stage, SAINT with its settings for this model.
        output: of a vision stage, see :class:`saint.Stage`.
        seed: of the random choice, which differs from image to image.
        choices: of ``METHODS``, "saint" among them: each is a forward per layer.
    """

    share: float
    measure: str
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
        model: nn.Module,
        share: float,
        plan: Plan | None = None,
        seed: int = 0,
        choices: tuple[str, ...] = ("random", "saint"),
    ) -> "Causal":
        """The plans for ``model``.

        Args:
            model: a supported encoder, a model that holds one, or a language model, with images or without.
            share: see above.
            plan: one that suits the model: its SAINT settings are used, and its output.
            seed: see above.
            choices: see above.
        """
        family = find(model)
        stages = {} if plan is None else plan.slots
        own = {slot: stage[0] for slot, stage in stages.items() if stage}
        layers = layers_of(model)
        methods = {}
        for slot in layers:
            method = own[slot].method if slot in own else None
            methods[slot] = replace(method if isinstance(method, Saint) else usual_saint(slot), budget=1 - share)
        output = own["vision"].output if "vision" in own and family is None else "survivors"
        return Causal(share, measure_of(model), layers, methods, output, seed, choices)

    def plan(self, slot: str, layer: int, method: str, image: str, scores: Tensor | None = None) -> Plan:
        """Tokens leave at ``layer``, by ``method``; ``scores`` are what "attention" goes by in an encoder, [B, N]."""
        keep = 1 - self.share
        chosen: Method
        if method == "saint":
            chosen = self.methods[slot]
        elif method == "random":
            chosen = Random(keep=keep, seed=zlib.crc32(f"{self.seed} {image}".encode()))
        elif method != "attention":
            chosen = ToMe(budget=keep, beta=1.0 if method == "tome" else 0.0)
        elif slot == "language":
            chosen = FastV(keep=keep)
        else:
            assert scores is not None
            chosen = Given(keep, tuple(map(tuple, scores.tolist())))
        stage = Stage(chosen, layers=[layer], output=self.output) if slot == "vision" else Stage(chosen, layers=[layer])
        return Plan(**{slot: stage})

    def losses(
        self,
        model: nn.Module,
        run: Callable[[], Any],
        base: Any,
        image: str,
        depth: Mapping[str, int],
        looks: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> dict[str, dict[str, list[float | None]]]:
        """What one image loses, by stage and method, a number per layer (None: no tokens can leave there).

        Args:
            model: unpruned.
            run: its forward on the image.
            base: what that gives.
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
                    with pruned(model, self.plan(slot, layer, method, image, scores)):
                        out[slot][method][layer] = self.loss(base, run())
        return out

    def loss(self, base: Any, found: Any) -> float:
        """What ``found`` lost against ``base``."""
        values = sample_losses(self.measure, base, found)
        return max(0.0, sum(values) / len(values))


def usual_saint(slot: str) -> Saint:
    """SAINT with the published threshold of a stage, for models without settings of their own."""
    return Saint(threshold=0.75 if slot == "vision" else 0.83)


def layers_of(model: nn.Module) -> dict[str, list[int]]:
    """By stage, the layers of ``model`` at which tokens can leave.

    Raises:
        UnsupportedModelError: neither a supported encoder nor a language model.
    """
    family = find(model)
    if family is not None:
        return _family_layers(*family[1:])
    text = find_text(model)
    if text is not None:
        return {"language": list(range(len(list(LAYERS.get(text[1]).children()))))}
    _, encoder, spec = locate(model)
    return {"vision": list(range(len(part(encoder, spec.blocks))))}


def measure_of(model: nn.Module) -> str:
    """How a loss of ``model`` is measured: "1 - cosine" of an encoder, else "KL of the next token"; see :class:`Causal`."""
    return COSINE if find(model) is None and find_text(model) is None else KL


def sample_losses(measure: str, base: Any, found: Any) -> list[float]:
    """What the output ``found`` lost against ``base``, one number per sample (of a vision-language model: one sample)."""
    if measure == COSINE:
        return [1 - value for value in agreement(base, found).values]
    return [next_token_kl(base.logits, found.logits)]


def next_token_kl(base: Tensor, found: Tensor) -> float:
    """``sum_t p(t) (ln p(t) - ln q(t))`` of the distributions behind the last token; logits [1, S, vocabulary], nat."""
    p, q = (torch.log_softmax(logits[0, -1].double(), -1) for logits in (base, found))
    return max(0.0, float((p.exp() * (p - q)).sum()))


def _family_layers(model: nn.Module, spec: FamilySpec) -> dict[str, list[int]]:
    layers = {}
    if spec.no_vision is None:
        _, tower, tower_spec = locate_tower(model.get_submodule(spec.tower))
        depth = len(part(tower, tower_spec.blocks))
        used = spec.feature_layer(model, depth)  # None: features of several layers, which would hold different tokens
        if used is not None:
            layers["vision"] = list(range(min(depth, used)))
    decoder = model.get_submodule(spec.decoder)
    layers["language"] = list(range(len(list(LAYERS.get(decoder).children()))))
    return layers
