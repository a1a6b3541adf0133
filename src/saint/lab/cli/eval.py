"""`saint eval images` and `saint eval vqa`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .common import doing, err, out, progress, resumable, save, show

if TYPE_CHECKING:
    from ...plans import Plan
    from ..eval import Report
    from ..kinds import Subject
    from ..loading.plans import Choice

eval = typer.Typer(
    help="Score MODEL with and without a plan on the same samples, compared in pairs.", no_args_is_help=True
)

Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", help=f"{options.PLAN_HELP}; give it again to compare several"),
]
JournalFile = Annotated[
    Path | None,
    typer.Option(
        "--journal", help="per-sample results; a killed run continues [default: beside --json, .journal.sqlite]"
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="at most so many samples, evenly spaced [default: all]")]


@eval.command("images")
@options.model_options(dtype="float32")
def images(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    data: Annotated[
        str,
        typer.Argument(
            help="a folder with a folder per class, .tar shards, a saved data set, or hf:NAME; labels are optional"
        ),
    ],
    plan: Plans = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            help="top1, knn, zeroshot, ... (a wrong name lists all); repeatable [default: what fits best]",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option("--classes", help="a class name per line, in the order of the model's outputs or the labels"),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='zero-shot: e.g. "a photo of a {}.", or openai-80, openai-7; several times'),
    ] = None,
    split: Annotated[str | None, typer.Option(help="of a Hugging Face data set")] = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="images per forward")] = 32,
    journal: JournalFile = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Accuracy of an encoder on DATA, and its agreement with the unpruned model (the only score without labels)."""
    from ..eval import evaluate_images, find_samples
    from ..kinds import kind_of
    from ..sources.listing import left_facts

    how = replace(how, device=_device(how.device))
    choices = _choices(plan, keep, pixels)
    names = None if classes is None else _lines(classes)
    samples = find_samples(data, split=split, classes=names, limit=limit)
    text = None
    if "zeroshot" in (score or []):
        from ..eval.zeroshot import TEMPLATES, class_embeddings, load_both_towers

        if samples.classes is None:
            raise ValueError("zeroshot needs class names, and this data has none: give --classes FILE")
        with doing(f"loading {model}"):
            how.set_threads()
            subject, embed = load_both_towers(model, how.device, how.pretrained, size=how.size)
            text = class_embeddings(embed, samples.classes, template or TEMPLATES)
    elif template:
        raise ValueError("--template is for --score zeroshot")
    else:
        subject = how.load(kind_of(model, "embeddings"), model)
    if how.number is not None:
        subject.model.to(how.number)
    plans = _plans(choices, subject, subject.plans)
    facts = {"model": model, "pretrained": how.pretrained, "image_size": list(subject.image_size), "limit": limit}
    with _shown(len(samples.items), journal := _journal(journal, json)) as tick:
        report = evaluate_images(
            subject.model, samples, plans, inputs=subject.pixels, scores=score, text=text, batch=batch, facts=facts,
            journal=journal, tick=tick,
        )  # fmt: skip
    outputs, count = report.conditions["outputs"], report.conditions["classes"]
    if (
        not score
        and text is None
        and outputs is not None
        and count is not None
        and "knn" in report.conditions["scores"]
    ):
        err.print(
            f"[yellow]top1 left out[/]: the model has {outputs} outputs and the data {count} classes; --classes FILE names "
            "the model's classes",
            highlight=False,
        )
    _finish("eval/images", report, model, subject.device, json, journal, left_facts(samples.left_out))


@eval.command("vqa")
@options.model_options("size")
def vqa(
    model: Annotated[str, typer.Argument(help="hf:NAME_OR_PATH of a vision-language model, or demo:small-llava")],
    questions: Annotated[
        Path, typer.Argument(help='JSON lines: {"image": "file", "question": "...", "answer": "..."}')
    ],
    images: Annotated[Path, typer.Option("--images", help="folder of the images")],
    plan: Plans = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    prompt: Annotated[
        str | None,
        typer.Option(help='template with {question} and {choices} [default: asks for "a single word or phrase"]'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of an answer at most")] = 16,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="questions per forward")] = 1,
    journal: JournalFile = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Answers of a vision-language model to QUESTIONS: right or wrong, and the same as without pruning."""
    from ..eval import evaluate_vqa, read_questions
    from ..kinds import kind_of
    from ..sources.items import evenly
    from ..sources.questions import default_prompt, fill

    choices = _choices(plan, keep, pixels)
    asked, unreadable = read_questions(questions, images)
    asked = evenly(asked, limit)
    if prompt is not None:
        fill(prompt, asked[0])  # a bad template shows before the model is loaded
    how = replace(how, device=_device(how.device))
    kind = kind_of(model, "answers")
    subject = how.load(kind, model)
    plans = _plans(choices, subject, {name: one for name, one in subject.plans.items() if name == "connector"})
    with _shown(len(asked), journal := _journal(journal, json)) as tick:
        report = evaluate_vqa(
            subject.model, subject.processor, asked, plans,
            prompt=default_prompt if prompt is None else lambda question: fill(prompt, question), batch=batch,
            max_new_tokens=max_new_tokens, facts={"model": model, "pretrained": how.pretrained, "limit": limit},
            unreadable=unreadable, journal=journal, tick=tick,
        )  # fmt: skip
    _finish("eval/vqa", report, model, subject.device, json, journal)


def _plans(choices: "Sequence[Choice]", subject: "Subject", default: dict[str, "Plan"]) -> dict[str, "Plan"]:
    """Return the plans that were asked for, by name."""
    return {choice.name: subject.planned(choice) for choice in choices} or default


def _choices(texts: list[str] | None, keep: float | None, pixels: str | None) -> "list[Choice]":
    """Read ``--plan``, ``--keep`` and ``--pixels``, before a model is loaded."""
    from ..loading.plans import choose, choose_several, read_pixels

    if texts and keep is not None:
        choose(texts[0], keep)  # both: refused
    if texts:
        return [choice.smaller(read_pixels(pixels)) for choice in choose_several(texts)]
    return [choice] if (choice := choose(None, keep, pixels)) is not None else []


def _lines(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{path} must name each class once, got {len(names)} names, {len(set(names))} different")
    return names


def _device(device: str) -> str:
    """With several processes on one machine, "auto" and "cuda" mean the GPU of this one."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None or int(os.environ.get("WORLD_SIZE", "1")) == 1 or device not in ("auto", "cuda"):
        return device
    return f"cuda:{local}" if torch.cuda.is_available() else device


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _journal(journal: Path | None, json: Path | None) -> Path | None:
    if journal is not None or json is None:
        return journal
    return json.with_suffix(".journal.sqlite")


@contextmanager
def _shown(total: int, journal: Path | None) -> Iterator[Callable[[int], None]]:
    """Progress on stderr; an interruption ends with status 130 and says how to go on."""
    share = -(-total // int(os.environ.get("WORLD_SIZE", "1")))
    with resumable(journal), progress("evaluating", share, hidden=not _main_process()) as tick:
        yield tick


def _finish(
    kind: str,
    report: "Report",
    model: str,
    device: Any,
    json: Path | None,
    journal: Path | None,
    left_out: Sequence[Any] = (),
) -> None:
    """Tables, the record, and exit status 1 when something that was given is not in the scores."""
    from ..records import environment

    if not _main_process():
        raise typer.Exit(1 if report.failures else 0)
    record = {
        "kind": kind,
        **report.to_dict(),
        "left_out": left_out,
        "journal": journal.name if journal is not None else None,
        "environment": environment(device),
    }
    show(record)
    resumed = f", {report.conditions['resumed']} of them from {journal}" if report.conditions["resumed"] else ""
    out.print(f"{report.evaluated} of {report.given} evaluated{resumed}", highlight=False, soft_wrap=True)
    if json is not None:
        save(json, record)
    if report.failures:
        for failure in report.failures[:20]:
            err.print(f"[yellow]not evaluated[/] {failure.where}: {failure.reason}", highlight=False)
        if len(report.failures) > 20:
            err.print(f"... and {len(report.failures) - 20} more")
        err.print(
            f"[yellow]{len(report.failures)} of {report.given} sample(s) could not be evaluated and are not in the scores[/]"
        )
        raise typer.Exit(1)
