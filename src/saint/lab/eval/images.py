"""Image classification, retrieval-like and label-free scores of an encoder, base and pruned."""

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...plans import Plan
from ..kinds.features import Features, classifier
from ..sources.items import Item
from ..sources.samples import Samples
from . import scores as score_
from .paired import Entry, evaluate
from .report import BySample, Report, digest

AGREEMENT = ("cosine", "same_top1", "kept", "flops")
NEIGHBORS = 5
Of = Literal["classifier", "text", "features"]


@dataclass(frozen=True)
class Score:
    """A score of images against their labels.

    Attributes:
        of: what it looks at: outputs of a classifier, nearness to class names, or features of all samples together.
        hits: from outputs [B, classes] or features [N, C], and labels, 0 or 1 of each sample; or of those that ``among`` says.
        among: which of all samples are scored; None: every one.
    """

    of: Of
    hits: Callable[[Tensor, Tensor], Tensor]
    among: Callable[[Tensor], Tensor] | None = None


# a new one is a line here
SCORES = {
    "top1": Score("classifier", partial(score_.in_top, k=1)),
    "top5": Score("classifier", partial(score_.in_top, k=5)),
    "zeroshot": Score("text", partial(score_.in_top, k=1)),
    "knn": Score("features", partial(score_.knn, k=NEIGHBORS)),
    "linear": Score("features", lambda x, labels: score_.linear_probe(x, labels, score_.split(labels)), score_.split),
}


def evaluate_images(
    model: nn.Module,
    samples: Samples,
    plans: Mapping[str, Plan],
    *,
    inputs: Callable[[Sequence[Image.Image]], Mapping[str, Any]],
    scores: Sequence[str] | None = None,
    text: Tensor | None = None,
    batch: int = 32,
    facts: Mapping[str, Any] = MappingProxyType({}),
    journal: str | os.PathLike[str] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Report:
    """Run every image through the model, unpruned and under each plan, and compare.

    The user's model is not touched: the variants are copies that share its weights.

    Args:
        model: a supported encoder, in eval mode, without a plan.
        samples: see :func:`saint.lab.sources.samples.find_samples`.
        plans: what to compare, by name.
        inputs: makes the keyword arguments of the forward from B images, e.g. ``Encoder.pixels``.
        scores: of :data:`SCORES`; None means ``zeroshot`` with ``text``, else ``top1`` and ``top5`` with a classifier that
            has as many outputs as there are classes, else ``knn``; none without labels.
        text: unit embeddings [classes, C] of class names by the text tower that belongs to the model.
        batch: images per forward.
        facts: further conditions, e.g. the model's name and the picture size: go into the record and the journal's key.
        journal: file that keeps results, so that a killed run continues; see :class:`saint.lab.eval.Journal`.
        tick: called with the number of images dealt with since the last call.

    Returns:
        ``top1``, ``top5``: of the classifier. ``zeroshot``: nearest class name. ``knn``: leave-one-out, 5 neighbours,
        cosine, among features of the same model. ``linear``: logistic regression on every second image of each class,
        scored on the others. Agreement: ``cosine`` of the features, ``same_top1`` and ``kept`` (share of patch tokens behind
        the last drop point), ``flops`` (share of the FLOPs left in the blocks, of a batch in the mean). Features are what goes
        into the classifier, or the model's answer where there is none.

    Raises:
        ValueError: no plan, a score that is not there or does not fit model and data, or nothing could be evaluated.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.
    """
    classes = _class_count(samples)
    outputs = _outputs(model)
    chosen = _choose(scores, samples, classes, outputs, text)
    for among in (SCORES[name].among for name in chosen):
        if among is not None:  # impossible splits show before the work
            among(torch.tensor([sample.label for sample in samples.items]))
    conditions = {
        "scores": list(chosen),
        "classes": classes,
        "outputs": outputs,
        "data": digest([samples.origin, *([sample.id, sample.label] for sample in samples.items)]),
        "text": None if text is None else digest(text.double().cpu().tolist()),
    }
    judge = _Pictures(inputs, text, chosen, {sample.id: sample.label for sample in samples.items})
    report = evaluate(
        model, samples.items, plans, judge, conditions=conditions, facts=facts, unusable=samples.unreadable, groups={},
        batch=batch, journal=journal, tick=tick,
    )  # fmt: skip
    report.conditions["neighbors"] = NEIGHBORS if "knn" in chosen else None
    return report


Looked = tuple[Tensor, Tensor | None]  # features [B, C] and logits [B, classes]


@dataclass(frozen=True)
class _Pictures:
    """Scores features and logits of images against their labels."""

    build: Callable[[Sequence[Image.Image]], Mapping[str, Any]]
    text: Tensor | None
    chosen: Sequence[str]
    labels: Mapping[str, int | None]

    kind: ClassVar[str] = "eval/images"
    scores: ClassVar[Sequence[str]] = tuple(SCORES)
    agreement: ClassVar[Sequence[str]] = AGREEMENT

    def of(self, *what: Of) -> dict[str, Score]:
        """Return the chosen scores that look at one of ``what``."""
        return {name: SCORES[name] for name in self.chosen if SCORES[name].of in what}

    def watch(self, model: nn.Module) -> Features:
        return Features(model)

    def inputs(self, items: Sequence[Item], images: Sequence[Image.Image]) -> Mapping[str, Any]:
        return self.build(images)

    def front(self, inputs: Mapping[str, Any], name: str) -> None:
        return None

    def look(self, watched: Features, inputs: Mapping[str, Any], name: str) -> Looked:
        features, logits = watched(inputs)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"the features of the {name} model are not finite")
        if logits is not None and not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the logits of the {name} model are not finite")
        if self.text is not None:
            logits = torch.nn.functional.normalize(features, dim=-1) @ self.text.float().cpu().T
        return features, logits

    def own(self, seen: Looked, items: Sequence[Item]) -> list[Entry]:
        features, logits = seen
        hits = {}
        if logits is not None and (direct := self.of("classifier", "text")):
            labels = torch.tensor([item.label for item in items])
            hits = {name: score.hits(logits, labels) for name, score in direct.items()}
        entries: list[Entry] = [{name: float(hit[i]) for name, hit in hits.items()} for i in range(len(items))]
        if self.of("features"):
            for entry, row in zip(entries, features, strict=True):
                entry["features"] = _packed(row)
        return entries

    def against(self, base: Looked, seen: Looked) -> list[Entry]:
        cosine = torch.nn.functional.cosine_similarity(base[0].double(), seen[0].double()).tolist()
        entries: list[Entry] = [{"cosine": value} for value in cosine]
        if base[1] is not None and seen[1] is not None:
            for entry, same in zip(entries, (base[1].argmax(1) == seen[1].argmax(1)).tolist(), strict=True):
                entry["same_top1"] = float(same)
        return entries

    def scored(self, entries: Sequence[Mapping[str, Any]], found: BySample) -> BySample:
        if not (wanted := self.of("features")):
            return found
        known = torch.tensor([self.labels[entry["id"]] for entry in entries])
        names = [entry["id"] for entry in entries]
        for variant in found:
            features = torch.stack([_unpacked(entry[variant]["features"]) for entry in entries])
            for name, score in wanted.items():
                which = names if score.among is None else list(compress(names, score.among(known)))
                found[variant][name] = dict(zip(which, score.hits(features, known).double().tolist(), strict=True))
        return found


def _class_count(samples: Samples) -> int | None:
    if not samples.labelled:
        return None
    highest = max(sample.label or 0 for sample in samples.items) + 1
    if samples.classes is None:
        return highest
    if highest > len(samples.classes):
        raise ValueError(f"the data has the label {highest - 1} and only {len(samples.classes)} class names")
    return len(samples.classes)


def _choose(
    wanted: Sequence[str] | None, samples: Samples, classes: int | None, outputs: int | None, text: Tensor | None
) -> tuple[str, ...]:
    """The scores to compute.

    Raises:
        ValueError: one that is wanted is impossible.
    """
    # labels of unnamed classes (shards) may miss the last ones; a folder's are numbered by what is there
    fits = classes is not None and (outputs == classes or (samples.classes is None and (outputs or 0) > classes))
    if wanted is None:
        if classes is None:
            return ()
        return ("zeroshot",) if text is not None else ("top1", "top5") if fits else ("knn",)
    unknown = sorted(set(wanted) - set(SCORES))
    if unknown:
        raise ValueError(f"no such score: {', '.join(unknown)}; there are {', '.join(SCORES)}")
    if wanted and classes is None:
        raise ValueError(f"{', '.join(wanted)} need(s) labels, and not every image has one")
    of = {SCORES[name].of for name in wanted}
    if "classifier" in of and text is not None:
        raise ValueError("top1 and top5 are of a classifier; with class names as text the score is zeroshot")
    if "classifier" in of and not fits:
        head = "no classifier" if outputs is None else f"a classifier with {outputs} outputs"
        raise ValueError(
            f"the model has {head} and the data {classes} classes, so top1 would compare unlike labels: "
            "name the model's classes in their order (--classes FILE), or score knn or linear"
        )
    if "text" in of and text is None:
        raise ValueError("zeroshot needs text embeddings of the class names")
    return tuple(name for name in SCORES if name in wanted)


def _outputs(model: nn.Module) -> int | None:
    head = classifier(model)
    return None if head is None else int(head.out_features)


def _packed(features: Tensor) -> str:
    return base64.b64encode(features.numpy().astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
