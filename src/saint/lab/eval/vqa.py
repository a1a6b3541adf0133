"""Questions about images: answers of base and pruned models, scored and compared."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...errors import AlreadyAppliedError
from ...plans import Plan
from ...session import Session, apply, status
from ..bench.encoder import copy_sharing_weights
from ..images import mark, read_image
from ..loading.listing import printable
from ..loading.vlm import LoadedVLM
from . import scores
from .loop import Failure, Loop, Processes
from .report import BASE, Report, between, by_sample, check_plans, digest, fingerprint, kept, summaries

SCORES = ("exact", "anls", "choice")
AGREEMENT = ("same_answer", "same_first_token", "kl", "kept")

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        image: a file, or the image itself.
        question: what is asked.
        answers: right answers, any of which will do; empty: only agreement is measured.
        category: scores are also given within each.
        choices: options of a multiple-choice question; ``answers`` are then letters or texts of choices.
        id: unique; empty means its place in the list.
        where: file and line, for messages.
    """

    image: "str | Path | Image.Image"
    question: str
    answers: tuple[str, ...] = ()
    category: str = ""
    choices: tuple[str, ...] = ()
    id: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        if not self.question:
            raise ValueError("the question is empty")
        if len(self.choices) > len(scores.LETTERS) or len(self.choices) == 1:
            raise ValueError(
                f"a multiple-choice question has 2 to {len(scores.LETTERS)} choices, got {len(self.choices)}"
            )
        if self.choices and self.answers:
            scores.right_choices(self.answers, self.choices)


KEYS = {"image", "question", "answer", "category", "choices", "id"}  # of a line of questions


def read_questions(path: str | Path, images: str | Path) -> tuple[list[Question], list[Failure]]:
    """Questions of a JSON Lines file: ``{"image": "file", "question": "...", "answer": "..." or [...], ...}``.

    Args:
        path: the file. ``category``, ``choices`` and ``id`` may be there too; blank lines are passed over.
        images: folder that the image names start from.

    Returns:
        The questions, and the lines that are none with the reason.

    Raises:
        OSError: the file cannot be read, or there is no such folder.
        ValueError: not a single question in it.
    """
    path, images = Path(path), Path(images)
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder of images: {images}")
    good: list[Question] = []
    bad: list[Failure] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        where = f"{printable(path.name)}, line {number}"
        name = f"line {number}"
        try:
            fields = json.loads(raw)
            if not isinstance(fields, dict):
                raise ValueError(f"a line is an object like {{...}}, got {type(fields).__name__}")
            unknown = sorted(fields.keys() - KEYS)
            if unknown:
                raise ValueError(f"unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}")
            if "id" in fields:
                name = str(fields["id"])
            if name in seen:
                raise ValueError(f"the id {name!r} is taken by line {seen[name]}")
            image, asked = images / _text(fields, "image"), _text(fields, "question")
            answers, choices = _texts(fields, "answer"), _texts(fields, "choices")
            good.append(
                Question(
                    image,
                    asked,
                    answers,
                    str("" if fields.get("category") is None else fields["category"]),
                    choices,
                    name,
                    where,
                )
            )
            seen[name] = number
        except ValueError as error:
            prefix = "not JSON: " if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else ""
            bad.append(Failure(f"line {number}", where, f"{prefix}{error}"))
    if not good:
        reasons = "; ".join(f"{f.where}: {f.reason}" for f in bad[:3])
        raise ValueError(f"no question in {path}" + (f" ({reasons})" if reasons else ""))
    return good, bad


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f'the field "{name}" is missing')
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f'the field "{name}" must be a text, got {value!r}')
    return value


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in values):
        raise ValueError(f'the field "{name}" must be a text or a list of texts, got {value!r}')
    return tuple(str(v) for v in values)


def default_prompt(question: Question) -> str:
    """The question, its choices with letters, and LLaVA's request for a short answer."""
    return fill("{question}\n{choices}\n" + _LETTER if question.choices else "{question}\n" + _SHORT, question)


def fill(template: str, question: Question) -> str:
    """A template with ``{question}`` and ``{choices}`` (one per line, with letters; nothing without choices) filled in.

    Raises:
        ValueError: the template leaves the question out.
    """
    if "{question}" not in template:
        raise ValueError(f"a prompt needs {{question}} in it, got {template!r}")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(scores.LETTERS, question.choices, strict=False))
    return template.replace("{choices}", listed).replace("{question}", question.question)


def evaluate_vqa(
    model: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    plans: Mapping[str, Plan],
    *,
    prompt: Callable[[Question], str] = default_prompt,
    inputs: Callable[[Sequence[str], Sequence[Image.Image]], Mapping[str, Any]] | None = None,
    batch: int = 1,
    max_new_tokens: int = 16,
    facts: Mapping[str, Any] = MappingProxyType({}),
    unreadable: Sequence[Failure] = (),
    journal: str | os.PathLike[str] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Report:
    """Answer every question greedily, unpruned and under each plan, and compare.

    The user's model is not touched: the variants are copies that share its weights.

    Args:
        model: a supported vision-language model with ``generate``, in eval mode, without a plan.
        processor: the model's own; with ``inputs`` only its ``decode`` is used.
        questions: what to ask.
        plans: what to compare, by name.
        prompt: text of a question; the chat template goes around it.
        inputs: makes the keyword arguments of ``generate`` from prompts and images, one image each, ``input_ids`` [B, L]
            padded on the left; None means chat template and processor.
        batch: questions per forward.
        max_new_tokens: of an answer.
        facts: further conditions, e.g. the model's name: go into the record and the journal's key.
        unreadable: questions that were given and could not be read; counted among the given.
        journal: file that keeps results, so that a killed run continues; see :class:`saint.lab.eval.Journal`.
        tick: called with the number of questions dealt with since the last call.

    Returns:
        Scores ``exact`` and ``anls``, or ``choice`` for questions with choices; agreement ``same_answer`` (normalised
        texts), ``same_first_token``, ``kl`` (KL(base || pruned) in nats of the next-token distribution in front of the first
        answer token) and ``kept`` (share of visual tokens behind the last drop point).

    Raises:
        ValueError: no question, ids used twice, no plan, no ``generate``, or nothing could be evaluated.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.

    Example:
        >>> report = evaluate_vqa(model, processor, questions, {"half": plan})  # doctest: +SKIP
        >>> report.scores["half"]["exact"].difference  # doctest: +SKIP
        -0.01
    """
    check_plans(plans)
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(): give the model with its language head")
    if status(model) is not None:
        raise AlreadyAppliedError("the model to evaluate carries a plan; call saint.remove(model) first")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    asked = _with_ids(questions)
    build = inputs or LoadedVLM(model, processor, parameter.device).inputs
    prompts = {question.id: prompt(question) for question in asked}
    conditions = {
        **facts,
        "model_class": type(model).__name__,
        "weights": fingerprint(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "data": digest([_facts(question, prompts[question.id]) for question in asked]),
        "example_prompt": prompts[asked[0].id],
    }
    processes = Processes.here(parameter.device.type == "cpu")
    variants: dict[str, Any] = {BASE: model}
    sessions: dict[str, Session] = {}

    def score(batch: Sequence[Question], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        made = build([prompts[question.id] for question in batch], images)
        length = made["input_ids"].shape[1]
        entries: list[dict[str, Any]] = [{} for _ in batch]
        logits: dict[str, Any] = {}
        for variant, twin_ in variants.items():
            with torch.no_grad():
                out = twin_.generate(
                    **made, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            logits[variant] = out.logits[0].float()
            if not bool((logits[variant] < math.inf).all()):  # -inf says that a token cannot come; NaN says nothing
                raise ValueError(f"the logits of the {variant} model are not finite")
            left = kept(sessions[variant], len(batch)) if variant in sessions else None
            new = out.sequences[:, length:]
            for sample, (question, entry) in enumerate(zip(batch, entries, strict=True)):
                said = str(processor.decode(new[sample], skip_special_tokens=True)).strip()
                entry[variant] = {"answer": said, **_scored(said, question)}
                if left is not None:
                    entry[variant]["kept"] = left[sample]
        for plan in plans:
            divergence = scores.kl_divergence(logits[BASE], logits[plan]).tolist()
            same = (logits[BASE].argmax(-1) == logits[plan].argmax(-1)).tolist()
            for sample, entry in enumerate(entries):
                texts = [scores.normalise(entry[variant]["answer"]) for variant in (BASE, plan)]
                entry[plan] |= {
                    "same_answer": float(texts[0] == texts[1]),
                    "same_first_token": float(same[sample]),
                    "kl": divergence[sample] if math.isfinite(divergence[sample]) else None,
                }
        return entries

    try:
        for plan, what in plans.items():
            variants[plan] = copy_sharing_weights(model)
            sessions[plan] = apply(variants[plan], what)
        loop = Loop(
            lambda question: question.image if isinstance(question.image, Image.Image) else read_image(Path(question.image)),
            score,
            journal=journal,
            key={"kind": "eval/vqa", **conditions, "plans": {p: what.to_dict() for p, what in plans.items()}},
            batch=batch,
            processes=processes,
            tick=tick,
            mark=lambda question: {"picture": _mark(question)},
        )  # fmt: skip
        outcome = loop.run(asked)
    finally:
        for session in sessions.values():
            session.remove()

    by_id = {question.id: question for question in asked}
    entries = list(outcome.entries.values())
    by_variant = by_sample(entries, (BASE, *plans), SCORES)
    groups: dict[str, set[str]] = {}
    for entry in entries:
        groups.setdefault(by_id[entry["id"]].category, set()).add(entry["id"])
    named = len(groups) > 1 or "" not in groups
    return Report(
        given=len(asked) + len(unreadable),
        evaluated=len(entries),
        failures=[*unreadable, *outcome.failures],
        plans=dict(plans),
        scores={plan: between(by_variant, BASE, plan) for plan in plans},
        agreement={plan: summaries(entries, plan, AGREEMENT) for plan in plans},
        categories={
            group or "(none)": {plan: between(by_variant, BASE, plan, members) for plan in plans}
            for group, members in sorted(groups.items())
        }
        if named
        else {},
        conditions={
            **conditions,
            "batch": batch,
            "processes": processes.world,
            "threads": torch.get_num_threads(),
            "resumed": outcome.resumed,
            "with_answers": sum(bool(by_id[entry["id"]].answers) for entry in entries),
        },
        samples=by_variant,
    )


def _with_ids(questions: Sequence[Question]) -> list[Question]:
    """Every question with an id and a place.

    Raises:
        ValueError: none, or an id twice.
    """
    asked = []
    for place, q in enumerate(questions):
        name = q.id or str(place)
        asked.append(
            Question(q.image, q.question, q.answers, q.category, q.choices, name, q.where or f"question {name}")
        )
    if not asked:
        raise ValueError("there is no question to ask")
    names = [q.id for q in asked]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the question id {twice!r} is used twice")
    return asked


def _facts(question: Question, prompt: str) -> list[Any]:
    image = "" if isinstance(question.image, Image.Image) else Path(question.image).name
    return [question.id, image, prompt, question.answers, question.choices]


def _mark(question: Question) -> int:
    return mark(question.image if isinstance(question.image, Image.Image) else Path(question.image))


def _scored(said: str, question: Question) -> dict[str, float]:
    if not question.answers:
        return {}
    if question.choices:
        return {"choice": scores.choice(said, question.answers, question.choices)}
    return {"exact": scores.exact(said, question.answers), "anls": scores.anls(said, question.answers)}
