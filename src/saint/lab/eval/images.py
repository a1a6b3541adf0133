"""Image classification, retrieval-like and label-free scores of an encoder, base and pruned."""

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import AlreadyAppliedError
from ...plans import Plan
from ...session import Session, apply, status
from ..bench.encoder import copy_sharing_weights
from ..bench.features import Features, classifier
from . import scores as score_
from .data import Sample, Samples
from .loop import Loop, Processes
from .report import BASE, Report, between, by_sample, check_plans, digest, fingerprint, kept, summaries

SCORES = ("top1", "top5", "zeroshot", "knn", "linear")
AGREEMENT = ("cosine", "same_top1", "kept")
NEIGHBORS = 5


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
        samples: see :func:`saint.lab.eval.find_samples`.
        plans: what to compare, by name.
        inputs: makes the keyword arguments of the forward from B images, e.g. ``Loaded.inputs``.
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
        the last drop point). Features are what goes into the classifier, or the model's answer where there is none.

    Raises:
        ValueError: no plan, a score that is not there or does not fit model and data, or nothing could be evaluated.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.
    """
    check_plans(plans)
    if status(model) is not None:
        raise AlreadyAppliedError("the model to evaluate carries a plan; call saint.remove(model) first")
    classes = _class_count(samples)
    outputs = _outputs(model)
    chosen = _choose(scores, samples, classes, outputs, text)
    with_features = bool({"knn", "linear"} & set(chosen))
    if "linear" in chosen:
        score_.split(torch.tensor([sample.label for sample in samples.items]))  # impossible splits show before the work
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    conditions = {
        **facts,
        "model_class": type(model).__name__,
        "weights": fingerprint(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "scores": list(chosen),
        "classes": classes,
        "outputs": outputs,
        "data": digest([samples.origin, *([sample.id, sample.label] for sample in samples.items)]),
        "text": None if text is None else digest(text.double().cpu().tolist()),
    }
    processes = Processes.here(parameter.device.type == "cpu")
    probes: dict[str, Features] = {}
    sessions: dict[str, Session] = {}

    def score(items: Sequence[Sample], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        made = inputs(images)
        entries: list[dict[str, Any]] = [{} for _ in items]
        seen: dict[str, tuple[Tensor, Tensor | None]] = {}
        for variant, probe in probes.items():
            features, logits = probe(made)
            if not bool(torch.isfinite(features).all()):
                raise ValueError(f"the features of the {variant} model are not finite")
            if logits is not None and not bool(torch.isfinite(logits).all()):
                raise ValueError(f"the logits of the {variant} model are not finite")
            if text is not None:
                logits = torch.nn.functional.normalize(features, dim=-1) @ text.float().cpu().T
            seen[variant] = features, logits
            left = kept(sessions[variant], len(items)) if variant in sessions else None
            hits = _hits(logits, items, chosen)
            for sample, entry in enumerate(entries):
                entry[variant] = {name: float(hit[sample]) for name, hit in hits.items()}
                if with_features:
                    entry[variant]["features"] = _packed(features[sample])
                if left is not None:
                    entry[variant]["kept"] = left[sample]
        base, base_logits = seen[BASE]
        for plan in plans:
            features, logits = seen[plan]
            cosine = torch.nn.functional.cosine_similarity(base.double(), features.double()).tolist()
            for sample, entry in enumerate(entries):
                entry[plan]["cosine"] = cosine[sample]
                if base_logits is not None and logits is not None:
                    entry[plan]["same_top1"] = float(base_logits[sample].argmax() == logits[sample].argmax())
        return entries

    try:
        probes[BASE] = Features(copy_sharing_weights(model))
        for plan, what in plans.items():
            copy = copy_sharing_weights(model)
            sessions[plan] = apply(copy, what)
            probes[plan] = Features(copy)
        loop = Loop(
            lambda sample: sample.load(),
            score,
            journal=journal,
            key={"kind": "eval/images", **conditions, "plans": {p: what.to_dict() for p, what in plans.items()}},
            batch=batch,
            processes=processes,
            tick=tick,
            mark=lambda sample: {"picture": sample.size},
        )  # fmt: skip
        outcome = loop.run(samples.items)
    finally:
        for session in sessions.values():
            session.remove()

    entries = list(outcome.entries.values())
    labels = {sample.id: sample.label for sample in samples.items}
    by_variant = by_sample(entries, (BASE, *plans), SCORES)
    if with_features:
        known = torch.tensor([labels[entry["id"]] for entry in entries])
        names = [entry["id"] for entry in entries]
        for variant in by_variant:
            features = torch.stack([_unpacked(entry[variant]["features"]) for entry in entries])
            by_variant[variant] |= _on_features(features, known, names, chosen)
    return Report(
        given=len(samples.items) + len(samples.unreadable),
        evaluated=len(entries),
        failures=[*samples.unreadable, *outcome.failures],
        plans=dict(plans),
        scores={plan: between(by_variant, BASE, plan) for plan in plans},
        agreement={plan: summaries(entries, plan, AGREEMENT) for plan in plans},
        categories={},
        conditions={
            **conditions,
            "batch": batch,
            "processes": processes.world,
            "threads": torch.get_num_threads(),
            "resumed": outcome.resumed,
            "neighbors": NEIGHBORS if "knn" in chosen else None,
        },
        samples=by_variant,
    )


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
    if {"top1", "top5"} & set(wanted) and text is not None:
        raise ValueError("top1 and top5 are of a classifier; with class names as text the score is zeroshot")
    if {"top1", "top5"} & set(wanted) and not fits:
        head = "no classifier" if outputs is None else f"a classifier with {outputs} outputs"
        raise ValueError(
            f"the model has {head} and the data {classes} classes, so top1 would compare unlike labels: "
            "name the model's classes in their order (--classes FILE), or score knn or linear"
        )
    if "zeroshot" in wanted and text is None:
        raise ValueError("zeroshot needs text embeddings of the class names")
    return tuple(name for name in SCORES if name in wanted)


def _outputs(model: nn.Module) -> int | None:
    head = classifier(model)
    return None if head is None else int(head.out_features)


def _hits(logits: Tensor | None, items: Sequence[Sample], chosen: Sequence[str]) -> dict[str, Tensor]:
    if logits is None or not {"top1", "top5", "zeroshot"} & set(chosen):
        return {}
    labels = torch.tensor([item.label for item in items])
    return {
        name: score_.in_top(logits, labels, 5 if name == "top5" else 1)
        for name in chosen
        if name in ("top1", "top5", "zeroshot")
    }


def _on_features(
    features: Tensor, labels: Tensor, names: Sequence[str], chosen: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores by sample id; of a linear probe, those of the half that tests it."""
    found = {}
    if "knn" in chosen:
        hits = score_.knn(features, labels, NEIGHBORS).double().tolist()
        found["knn"] = dict(zip(names, hits, strict=True))
    if "linear" in chosen:
        test = score_.split(labels)
        hits = score_.linear_probe(features, labels, test).double().tolist()
        found["linear"] = dict(zip((name for name, use in zip(names, test, strict=True) if use), hits, strict=True))
    return found


def _packed(features: Tensor) -> str:
    return base64.b64encode(features.numpy().astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
