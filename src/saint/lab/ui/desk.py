"""One model at a time, one request at a time: loads, prunes, times."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plans import Plan
from ...session import pruned
from ..demo import MODELS, photos
from ..kinds import DEMO, Subject, kind_of
from ..sources.items import Item
from ..view.reasons import Reasons
from . import pages
from .asking import Asked

_ANSWER = 64  # new tokens at most


class Offer(NamedTuple):
    """A model that the page may ask for."""

    spec: str
    kind: type[Subject]
    pretrained: bool

    @property
    def asked(self) -> bool:
        """Whether it is asked a question."""
        return "--prompt" not in self.kind.refuses


def offered(given: Sequence[str], pretrained: bool = True) -> dict[str, Offer]:
    """The demo models and those of the command line, by what the user types for them.

    Raises:
        DownloadError: what kind a model of the hub is cannot be read.
    """
    found = {spec: Offer(spec, kind_of(spec), True) for spec in (*(f"demo:{name}" for name in MODELS), DEMO)}
    for spec in given:
        found.setdefault(spec, Offer(spec, kind_of(spec), pretrained))
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

    def run(self, asked: Asked) -> str:
        """The answer as HTML. Waits for the requests before it.

        Raises:
            ValueError: the plan or the picture does not fit the model.
            OSError: the model cannot be loaded.
        """
        with self._lock:
            subject = self._loaded(self.offers[asked.model])
            if self.offers[asked.model].asked and not asked.question:
                raise ValueError(f"{asked.model} answers questions: type one")
            return pages.page(self._shown(asked, subject))

    def _loaded(self, offer: Offer) -> Subject:
        if self._held is None or self._held[0] != offer.spec:
            self._held = self._photos = None  # freed before the next is loaded
            self._held = offer.spec, offer.kind.load(offer.spec, self.device, offer.pretrained)
        return self._held[1]

    def _shown(self, asked: Asked, subject: Subject) -> pages.Shown:
        plan = asked.plan or subject.plan or Plan()
        inputs = subject.inputs([Item.photo("", asked.image, asked.question)], [asked.image])
        base = subject.answer(inputs, _ANSWER)
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
        return pages.Shown(
            spec=asked.model,
            title=subject.title,
            question=asked.question if self.offers[asked.model].asked else "",
            plan=plan,
            facts={"name": "the picture as the model sees it", **facts},
            grid=subject.grid,
            base=base,
            short=short,
            bench=bench,
            classes=_classes(subject.model),
            known=self._known(subject, base.output),
        )

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
    """Whether the answer is logits, as far as timm and transformers say."""
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
