"""Images, or prompts without any, streamed through the probe and the one-layer plans: one at a time, journalled, to be
continued when killed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...language.locate import find as find_text
from ...plans import Plan
from ...session import pruned
from ..eval.data import Sample
from ..eval.loop import Loop, Outcome, Processes
from ..eval.report import fingerprint
from ..eval.vqa import Question
from ..images import as_rgb, mark, read_image
from .causal import KL, Causal, Looks
from .geometry import spread
from .probe import COMPARED, Probe

THRESHOLDS = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        thresholds: cosines at which the share of sources that SAINT would drop is counted.
        neighbors: K of that count.
        share: of the candidates that leave in the causal column.
        bootstrap: resamples of the images.
        simulations: of each null of the stages.
        causal: images of the causal column, evenly spaced: a forward per layer, image and choice; 0: no such column.
        seed: of everything random.
        choices: of the causal column, see :class:`saint.lab.analysis.causal.Causal`.
    """

    thresholds: tuple[float, ...] = THRESHOLDS
    neighbors: int = 5
    share: float = 0.25
    bootstrap: int = 1000
    simulations: int = 499
    causal: int = 32
    seed: int = 0
    choices: tuple[str, ...] = ("random", "saint")


@dataclass(frozen=True)
class Analysis:
    """What a run measured: per image, by stage, what :meth:`Probe.take` gives and what it loses causally (``causal``).

    ``text``: of a language model without images, so per prompt.
    """

    outcome: Outcome
    settings: Settings
    causal: Causal | None
    center: dict[str, bool] = field(default_factory=dict)
    text: bool = False

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The images that were measured, in order."""
        return list(self.outcome.entries.values())


@dataclass(frozen=True)
class Asked:
    """An image, and what is asked about it, nothing of an encoder; or a prompt without an image."""

    id: str
    where: str
    load: Callable[[], Image.Image | None]
    prompt: str = ""
    mark: int = -1  # tells the image from another with its id; see :func:`saint.lab.images.mark`

    @staticmethod
    def of(sample: Sample, prompt: str = "") -> "Asked":
        """About a sample of :func:`saint.lab.eval.find_samples`."""
        return Asked(sample.id, sample.where, sample.load, prompt, sample.size)

    @staticmethod
    def question(question: Question, prompt: str) -> "Asked":
        """About the image of a question of :func:`saint.lab.eval.read_questions`."""
        image = question.image
        if isinstance(image, Image.Image):
            return Asked(question.id, question.where, lambda: as_rgb(image), prompt, mark(image))
        return Asked(question.id, question.where, lambda: read_image(Path(image)), prompt, mark(Path(image)))

    @staticmethod
    def text(id: str, where: str, prompt: str) -> "Asked":
        """A prompt of a language model without images."""
        return Asked(id, where, lambda: None, prompt)


def analyze(
    model: nn.Module,
    items: Sequence[Asked],
    inputs: Callable[[Asked, Any], Mapping[str, Any]],
    *,
    plan: Plan | None = None,
    settings: Settings = Settings(),
    facts: Mapping[str, Any] = MappingProxyType({}),
    journal: str | os.PathLike[str] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Analysis:
    """Measure every layer of ``model`` on every image.

    One image is in memory at a time, and the next one being read; of an image only numbers are kept.

    Args:
        model: an encoder of the support table, or a language model, with images or without; in eval mode, without a plan.
        items: the images, or prompts without any.
        inputs: makes the keyword arguments of ``model.forward`` from one of them and its image (None), a batch of one.
        plan: one that suits the model: SAINT is measured with its settings.
        settings: what is measured.
        facts: what else results depend on, e.g. the model's name: goes into the journal's key.
        journal: file that keeps the results, so that a killed run continues; see :class:`saint.lab.eval.Journal`.
        tick: called with the number of images dealt with since the last call.

    Raises:
        ValueError: bad settings, no image, or nothing could be measured.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.
    """
    if not items:
        raise ValueError("no image, or no prompt, to analyze")
    causal = Causal.of(model, settings.share, plan, settings.seed, settings.choices)
    center = {slot: method.center for slot, method in causal.methods.items()}
    dropped = {items[place].id for place in spread(len(items), settings.causal)} if settings.causal else set()
    text = find_text(model) is not None
    probe = Probe(settings.thresholds, settings.neighbors, center, text)

    def score(asked: Sequence[Asked], images: Sequence[Image.Image | None]) -> list[dict[str, Any]]:
        (item,), (image,) = asked, images
        given = dict(inputs(item, image))

        def run() -> Any:
            with torch.inference_mode():
                out = model(**given)
            # only the last token's distribution is compared; the cache belongs to a session that ends
            return SimpleNamespace(logits=out.logits[:, -1:].clone()) if causal.measure == KL else out

        probe.take()  # what a forward that failed has left
        looks = Looks()
        listens = item.id in dropped and "attention" in settings.choices
        with pruned(model, Plan(), observers=[probe, looks] if listens else [probe]):
            base = run()
        stages = probe.take()
        entry: dict[str, Any] = {"stages": stages}
        if item.id in dropped:
            depth = {stage: len(found["quantities"]["key_similarity"]) for stage, found in stages.items()}
            entry["causal"] = causal.losses(model, run, base, item.id, depth, looks.take())
        return [entry]

    measured = {name: value for name, value in asdict(settings).items() if name not in ("bootstrap", "simulations")}
    key = {
        "kind": "analyze",
        **facts,
        **measured,
        "weights": fingerprint(model),
        "compared": COMPARED,
        "saint": {slot: method.to_dict() for slot, method in causal.methods.items()},
    }
    loop = Loop(
        lambda item: item.load(),
        score,
        journal=journal,
        key=key,
        batch=1,
        processes=Processes(),
        tick=tick,
        mark=lambda item: {"picture": item.mark, "prompt": item.prompt, "causal": item.id in dropped},
    )
    outcome = loop.run(items)
    return Analysis(outcome, settings, causal if settings.causal else None, center, text)
