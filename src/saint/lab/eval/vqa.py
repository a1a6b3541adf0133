"""Questions about images: answers of base and pruned models, scored and compared."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ...plans import Plan
from .. import answers
from ..kinds import answering
from ..kinds.subject import shrunk_by
from ..sources.items import Failure, Item
from ..sources.questions import Question, default_prompt
from ..variants import BASE
from . import scores
from .paired import Entry, Front, evaluate
from .report import BySample, Report, digest

SCORES = ("exact", "anls", "choice")
AGREEMENT = (
    "same_answer", "same_first_token", "kl", "kept", "flops", "visual_tokens", "visual_tokens_unpruned",
)  # fmt: skip


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
        plans: what to compare, by name. Where the model cannot be shown the smaller pictures of a plan, the processor makes them,
            see :func:`saint.smaller_pictures`.
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
        answer token), ``kept`` (share of visual tokens behind the last drop point) and ``flops`` (share
        of the FLOPs left of the language model's layers, for the prompt); where the processor made pictures smaller also
        ``visual_tokens`` of those and ``visual_tokens_unpruned`` of the whole ones.

    Raises:
        ValueError: no question, ids used twice, no plan, no ``generate``, or nothing could be evaluated.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.

    Example:
        >>> report = evaluate_vqa(model, processor, questions, {"half": plan})  # doctest: +SKIP
        >>> report.scores["half"]["exact"].difference  # doctest: +SKIP
        -0.01
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(): give the model with its language head")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    asked = _with_ids(questions)
    items = [question.item(prompt(question)) for question in asked]
    subject = answering(model, processor)
    fitted = {name: (plan, subject) if inputs is not None else subject.fitted(plan) for name, plan in plans.items()}
    own = {name: one for name, (_, one) in fitted.items() if one is not subject}
    judge = _Answers(
        {BASE: inputs or subject.prompted, **{name: one.prompted for name, one in own.items()}},
        subject.decode, subject.cost, max_new_tokens, {question.id: question for question in asked},
    )  # fmt: skip
    conditions = {
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "data": digest([_facts(question, item.prompt) for question, item in zip(asked, items, strict=True)]),
        "example_prompt": items[0].prompt,
        **shrunk_by(own),
    }
    applied = {name: plan for name, (plan, _) in fitted.items()}
    report = evaluate(
        model, items, applied, judge, conditions=conditions, facts=facts, unusable=unreadable,
        groups={question.id: question.category for question in asked}, batch=batch, journal=journal, tick=tick,
    )  # fmt: skip
    failed = {failure.id for failure in report.failures}
    report.conditions["with_answers"] = sum(bool(q.answers) for q in asked if q.id not in failed)
    return replace(report, plans=dict(plans))


class Said(NamedTuple):
    """What a variant answered to B questions."""

    answers: list[str]
    logits: Tensor  # of the first new token, [B, vocabulary]


@dataclass(frozen=True)
class _Answers:
    """Scores answers against references."""

    builds: Mapping[
        str, Callable[[Sequence[str], Sequence[Image.Image]], Mapping[str, Any]]
    ]  # base's, and by plan others
    decode: Callable[[Tensor], str]
    cost: Callable[[Mapping[str, Any]], tuple[list[int], float | None]]  # visual tokens and work of prompts
    length: int
    questions: Mapping[str, Question]

    kind: ClassVar[str] = "eval/vqa"
    scores: ClassVar[Sequence[str]] = SCORES
    agreement: ClassVar[Sequence[str]] = AGREEMENT

    def watch(self, model: nn.Module) -> nn.Module:
        return model

    def inputs(self, items: Sequence[Item], images: Sequence[Image.Image]) -> Mapping[str, Mapping[str, Any]]:
        prompts = [item.prompt for item in items]
        return {name: build(prompts, images) for name, build in self.builds.items()}

    def front(self, inputs: Mapping[str, Mapping[str, Any]], name: str) -> Front | None:
        if name == BASE or name not in inputs:
            return None
        (tokens, work), (whole, all_work) = self.cost(inputs[name]), self.cost(inputs[BASE])
        return Front(tokens, whole, None if work is None or all_work is None else work / all_work)

    def look(self, watched: Any, inputs: Mapping[str, Mapping[str, Any]], name: str) -> Said:
        given = inputs.get(name, inputs[BASE])
        with torch.no_grad():
            out = watched.generate(
                **given, max_new_tokens=self.length, do_sample=False, num_beams=1, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        logits = out.logits[0].float()
        if not bool((logits < math.inf).all()):  # -inf says that a token cannot come; NaN says nothing
            raise ValueError(f"the logits of the {name} model are not finite")
        return Said([self.decode(new) for new in out.sequences[:, given["input_ids"].shape[1] :]], logits)

    def own(self, seen: Said, items: Sequence[Item]) -> list[Entry]:
        return [
            {"answer": said, **_scored(said, self.questions[item.id])}
            for said, item in zip(seen.answers, items, strict=True)
        ]

    def against(self, base: Said, seen: Said) -> list[Entry]:
        divergence = scores.kl_divergence(base.logits, seen.logits).tolist()
        same = (base.logits.argmax(-1) == seen.logits.argmax(-1)).tolist()
        return [
            {
                "same_answer": float(answers.normalise(one) == answers.normalise(other)),
                "same_first_token": float(first),
                "kl": apart if math.isfinite(apart) else None,
            }
            for one, other, first, apart in zip(base.answers, seen.answers, same, divergence, strict=True)
        ]

    def scored(self, entries: Sequence[Mapping[str, Any]], found: BySample) -> BySample:
        return found


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


def _scored(said: str, question: Question) -> dict[str, float]:
    if not question.answers:
        return {}
    if question.choices:
        return {"choice": answers.choice(said, question.answers, question.choices)}
    return {"exact": answers.exact(said, question.answers), "anls": answers.anls(said, question.answers)}
