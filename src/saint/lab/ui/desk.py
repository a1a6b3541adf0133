"""One model at a time, one request at a time: loads, prunes, times."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plans import Plan
from ...presets import recipe
from ...session import pruned
from ..bench import bench_encoder, bench_generation
from ..bench.agreement import agreement, answer
from ..bench.generation import timed_answer
from ..demo import MODELS, photos
from ..loading import load_model
from ..loading.modes import usual_plan
from ..loading.vlm import DEMO, LoadedVLM, is_vlm, load_vlm
from ..view.facts import layer_facts, steps_of
from ..view.reasons import Reasons
from ..view.tiles import tiles, visual_tokens
from . import pages
from .asking import Asked

_ANSWER = 64  # new tokens at most


class Offer(NamedTuple):
    """A model that the page may ask for."""

    spec: str
    answers: bool  # a vision-language model
    pretrained: bool


def offered(given: Sequence[str], pretrained: bool = True) -> dict[str, Offer]:
    """The demo models and those of the command line, by what the user types for them.

    Raises:
        DownloadError: what kind a model of the hub is cannot be read.
    """
    found = {f"demo:{name}": Offer(f"demo:{name}", False, True) for name in MODELS}
    found[DEMO] = Offer(DEMO, True, True)
    for spec in given:
        found.setdefault(spec, Offer(spec, is_vlm(spec), pretrained))
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
        self._held: tuple[str, Any] | None = None
        self._photos: dict[str, Tensor] | None = None  # embeddings of the held model

    def run(self, asked: Asked) -> str:
        """The answer as HTML. Waits for the requests before it.

        Raises:
            ValueError: the plan or the picture does not fit the model.
            OSError: the model cannot be loaded.
        """
        with self._lock:
            offer = self.offers[asked.model]
            loaded = self._loaded(offer)
            return self._answer(asked, loaded) if offer.answers else self._encode(asked, loaded)

    def _loaded(self, offer: Offer) -> Any:
        if self._held is None or self._held[0] != offer.spec:
            self._held = self._photos = None  # freed before the next is loaded
            load = load_vlm if offer.answers else load_model
            self._held = offer.spec, load(offer.spec, self.device, offer.pretrained)
        return self._held[1]

    def _encode(self, asked: Asked, loaded: Any) -> str:
        plan = asked.plan or loaded.plan
        inputs = loaded.inputs([asked.image])
        with torch.inference_mode():
            base = loaded.model(**inputs)
            with pruned(loaded.model, plan, observers=[reasons := Reasons(plan)]) as session:
                short = loaded.model(**inputs)
                trace = session.trace
        same = agreement(base, short)
        bench = bench_encoder(loaded.model, plan, inputs, self.repeats, 1, extras=False)
        seen = None if loaded.source.batch is not None else loaded.picture(asked.image)
        return pages.encoder_page(
            spec=loaded.spec,
            title=loaded.title,
            plan=plan,
            picture=seen,
            grid=None if seen is None else loaded.grid,
            steps=[layer_facts(step, 0, why[0]) for step, why in zip(trace, reasons.take(), strict=True)],
            agreement=same,
            outputs=(base, short),
            classes=_classes(loaded.model),
            known=self._known(loaded, base),
            bench=bench,
        )

    def _known(self, loaded: Any, output: Any) -> dict[str, Tensor]:
        """Unpruned embeddings [C] of the photographs that are there anyway, where the model gives embeddings."""
        _, value = answer(output)
        if value.ndim != 2 or loaded.source.batch is not None or _classifies(loaded.model):
            return {}
        if self._photos is None:
            with torch.inference_mode():
                made = {
                    name: answer(loaded.model(**loaded.inputs([image])))[1][0].float().cpu() for name, image in photos()
                }
            self._photos = made
        return self._photos

    def _answer(self, asked: Asked, loaded: LoadedVLM) -> str:
        if not asked.question:
            raise ValueError(f"{asked.model} answers questions: type one")
        plan = asked.plan or _own_plan(asked.model, loaded)
        inputs = loaded.inputs([asked.question], [asked.image])
        answers = [timed_answer(loaded.model, inputs, _ANSWER, loaded.device)]
        with pruned(loaded.model, plan, observers=[reasons := Reasons(plan)]) as session, torch.no_grad():
            loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
            trace, total = session.trace, visual_tokens(loaded.model, inputs)
            why = reasons.take()  # of this one: more forwards follow
            answers.append(timed_answer(loaded.model, inputs, _ANSWER, loaded.device))
        seen = tiles(loaded.model, loaded.processor, inputs)
        bench = bench_generation(loaded.model, {"pruned": plan}, inputs, 1, self.repeats, 1)
        return pages.answer_page(
            spec=asked.model,
            question=asked.question,
            plan=plan,
            tiles=seen,
            total=total,
            steps=steps_of(trace, why),
            answers=[loaded.decode(answer.tokens) for answer in answers],
            bench=bench,
        )


def _own_plan(spec: str, loaded: LoadedVLM) -> Plan:
    if spec == DEMO:
        return recipe("small-llava/hybrid")
    return usual_plan(loaded.model)


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
