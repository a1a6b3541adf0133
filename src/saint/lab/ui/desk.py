"""One model at a time, one request at a time: loads, prunes, times."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...planning import plan_for
from ...plans import Plan
from ...session import pruned
from ..demo import MODELS, photos
from ..kinds import DEMO, Inputs, Subject, kind_of
from ..report.html import Renderer
from ..sources.items import Item
from ..view.reasons import Reasons
from . import pages
from .asking import STAGES, Asked, Wanted

_ANSWER = 64  # new tokens at most


class Offer(NamedTuple):
    """A model that the page may ask for."""

    spec: str
    kind: type[Subject]
    pretrained: bool

    @property
    def asked(self) -> bool:
        """Tell whether it is asked a question."""
        return "--prompt" not in self.kind.refuses

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that a plan for it can have."""
        return STAGES if self.asked else STAGES[:1]


class Told(NamedTuple):
    """An answer: HTML, and the plan it is of, which the page may ask for again."""

    html: str
    name: str
    plan: dict[str, Any]


def offered(given: Sequence[str], pretrained: bool = True) -> dict[str, Offer]:
    """The models of the command line, then the demo models, by what the user types for them.

    Raises:
        ValueError: there is no such model.
        DownloadError: what kind a model of the hub is cannot be read.
    """
    demos = [*(f"demo:{name}" for name in MODELS), DEMO]
    found = {spec: Offer(spec, kind_of(spec), pretrained or spec in demos) for spec in dict.fromkeys([*given, *demos])}
    for spec in given:
        found[spec].kind.known(spec)
    return found


class Desk:
    """Holds the model that was asked for last.

    Args:
        offers: see :func:`offered`.
        device: of the model.
        repeats: timed pairs.
    """

    def __init__(self, offers: Mapping[str, Offer], device: str = "cpu", repeats: int = 5) -> None:
        self.offers, self.device, self.repeats = offers, device, repeats
        self._lock = threading.Lock()
        self._held: tuple[str, Subject] | None = None
        self._photos: dict[str, Tensor] | None = None  # embeddings of the held model

    def run(self, asked: Asked) -> Told:
        """The answer. Waits for the requests before it.

        Raises:
            ValueError: the plan or the picture does not fit the model.
            OSError: the model cannot be loaded.
        """
        with self._lock:
            subject = self._loaded(self.offers[asked.model])
            if self.offers[asked.model].asked and not asked.question:
                raise ValueError(f"{asked.model} answers questions: type one")
            shown = self._shown(asked, subject)
            html = Renderer("ui", pages.SIDE).alone(pages.page(shown))
            return Told(html, shown.runs[0].name, shown.runs[0].plan.to_dict())

    def _loaded(self, offer: Offer) -> Subject:
        if self._held is None or self._held[0] != offer.spec:
            self._held = self._photos = None  # freed before the next is loaded
            self._held = offer.spec, offer.kind.load(offer.spec, self.device, offer.pretrained)
        return self._held[1]

    def _shown(self, asked: Asked, subject: Subject) -> pages.Shown:
        inputs = subject.inputs([Item.photo("", asked.image, asked.question)], [asked.image])
        base = subject.answer(inputs, _ANSWER)
        wanted = [asked.wanted, *([] if asked.against is None else [asked.against])]
        return pages.Shown(
            spec=asked.model,
            title=subject.title,
            question=asked.question if self.offers[asked.model].asked else "",
            grid=subject.grid,
            base=base,
            runs=[self._ran(one, asked, subject, inputs) for one in wanted],
            classes=_classes(subject.model),
            known=self._known(subject, base.output),
        )

    def _ran(self, wanted: Wanted, asked: Asked, subject: Subject, inputs: Inputs) -> pages.Run:
        """Run one plan."""
        plan = wanted.plan or (
            subject.plan or Plan() if wanted.keep is None else plan_for(subject.model, wanted.keep, inputs)
        )
        with pruned(subject.model, plan, observers=[reasons := Reasons(plan)]) as session:
            with torch.inference_mode():
                subject.model(**inputs)
            trace, why = session.trace, reasons.take()  # of this one: more forwards follow
            short = subject.answer(inputs, _ANSWER)
        bench = subject.bench(
            {"pruned": plan}, [asked.image], prompt=asked.question or None, new_tokens=1, repeats=self.repeats, warmup=1,
            extras=False,
        )  # fmt: skip
        facts = subject.facts(asked.image, inputs, trace, why, pages.SIDE, 90_000)
        return pages.Run(wanted.name, plan, {"name": f"pruned, {wanted.name}", **facts}, short, bench, keep=wanted.keep)

    def _known(self, subject: Subject, output: Any) -> dict[str, Tensor]:
        """Unpruned embeddings [C] of the photographs that are there anyway, where the model gives embeddings."""
        if output is None or subject.grid is None or _classifies(subject.model):
            return {}
        if subject.compared(output).ndim != 2:
            return {}
        if self._photos is None:
            self._photos = {}
            for name, image in photos():
                given = subject.inputs([Item.photo(name, image)], [image])
                self._photos[name] = subject.compared(subject.answer(given, 1).output)[0].float().cpu()
        return self._photos


def _classifies(model: Any) -> bool:
    """Tell whether the answer is logits, as far as timm and transformers say."""
    return bool(getattr(model, "num_classes", 0)) or hasattr(model, "classifier")


def _classes(model: Any) -> Sequence[str] | None:
    """Names of a timm classifier's outputs, where timm knows them."""
    if not hasattr(model, "pretrained_cfg"):
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset or not getattr(model, "num_classes", 0):
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]
