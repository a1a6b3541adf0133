"""Images, or prompts without any, streamed through the probe and the one-layer plans: one at a time, journalled, to be
continued when killed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...plans import Plan
from ...session import pruned
from ..eval.loop import Loop, Outcome, Processes
from ..eval.report import fingerprint
from ..kinds import Subject
from ..sources.items import Item
from .causal import Causal, Looks
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

    ``subject``: of which model.
    """

    outcome: Outcome
    settings: Settings
    causal: Causal | None
    subject: Subject
    center: dict[str, bool] = field(default_factory=dict)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The images that were measured, in order."""
        return list(self.outcome.entries.values())


def analyze(
    subject: Subject,
    items: Sequence[Item],
    *,
    settings: Settings = Settings(),
    facts: Mapping[str, Any] = MappingProxyType({}),
    journal: str | os.PathLike[str] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Analysis:
    """Measure every layer of a model on every image, or prompt.

    One image is in memory at a time, and the next one being read; of an image only numbers are kept.

    Args:
        subject: the model, in eval mode, without a plan; SAINT is measured with the settings of the plan that suits it.
        items: what it is to look at.
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
    model = subject.model
    causal = Causal.of(subject, settings.share, subject.plan, settings.seed, settings.choices)
    center = {slot: method.center for slot, method in causal.methods.items()}
    dropped = {items[place].id for place in spread(len(items), settings.causal)} if settings.causal else set()
    probe = Probe(settings.thresholds, settings.neighbors, center, subject.sees)

    def score(asked: Sequence[Item], images: Sequence[Any]) -> list[dict[str, Any]]:
        (item,) = asked
        given = subject.inputs(asked, images)

        def run() -> Tensor:
            with torch.inference_mode():
                return subject.compared(model(**given))

        probe.take()  # what a forward that failed has left
        looks = Looks()
        listens = item.id in dropped and "attention" in settings.choices
        with pruned(model, Plan(), observers=[probe, looks] if listens else [probe]):
            base = run()
        stages = probe.take()
        entry: dict[str, Any] = {"stages": stages}
        if item.id in dropped:
            depth = {stage: len(found["quantities"]["key_similarity"]) for stage, found in stages.items()}
            entry["causal"] = causal.losses(run, base, item.id, depth, looks.take())
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
        score,
        journal=journal,
        key=key,
        batch=1,
        processes=Processes(),
        tick=tick,
        mark=lambda item: {"picture": item.mark, "prompt": item.prompt, "causal": item.id in dropped},
    )
    outcome = loop.run(items)
    return Analysis(outcome, settings, causal if settings.causal else None, subject, center)
