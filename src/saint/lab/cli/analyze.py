"""`saint analyze`: what tokens do per layer of MODEL, and whether layers fall into stages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .common import doing, finish, out, progress, resumable, save, show

if TYPE_CHECKING:
    from ..analysis.run import Analysis
    from ..kinds import Subject
    from ..sources.listing import Left


@options.model_options()
def analyze(
    model: Annotated[
        str, typer.Argument(help=f"{options.MODEL_HELP}; also of a language model, with images or without")
    ],
    images: Annotated[Path | None, typer.Option("--images", help="an image, or a folder of them")] = None,
    prompts: options.Prompts = None,
    questions: options.Questions = None,
    prompt: options.Prompt = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="at most so many images or prompts, evenly spaced [default: all]")
    ] = None,
    share: Annotated[float, typer.Option(help="of the tokens that leave in the causal column, in (0, 0.5]")] = 0.25,
    causal: Annotated[
        int,
        typer.Option(
            min=0,
            help="images or prompts of which tokens leave at each layer alone, a forward per layer and choice each; 0: none",
        ),
    ] = 32,
    choices: Annotated[
        str,
        typer.Option(
            help="which tokens leave there: of random, saint, attention (CLS or the last prompt token attends least), tome and "
            "tome_plain (merged, with and without proportional attention), with commas, saint among them"
        ),
    ] = "random,saint",
    seed: Annotated[int, typer.Option(min=0, help="of resamples and random choices")] = 0,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", help="results per image; a killed run continues [default: beside --json]"),
    ] = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Measure what tokens do in each layer of MODEL: similarity, attention, rank, updates, what the output loses without them.

    Every number is a mean over images (or prompts) with a bootstrap interval (in the record of --json). Says whether the layers
    fall into stages, or that this is not shown, and proposes a plan.
    """
    from ..analysis.record import make_record
    from ..analysis.run import Settings
    from ..analysis.run import analyze as measure
    from ..kinds import Given, kind_of
    from ..records import environment
    from ..sources.listing import left_facts, printable

    settings = Settings(share=share, causal=causal, seed=seed, choices=tuple(choices.split(",")))
    kind = kind_of(model, ("embeddings", "answers", "next tokens"))
    kind.check(
        model,
        {"--images": images, "--questions": questions, "--prompt": prompt, "--prompts": prompts, "--size": how.size},
    )
    left: Left = {}
    items, bad = kind.items(Given(images, questions, prompt, prompts), limit, left)
    source = images or prompts
    assert source is not None, "one of them has items"
    subject = how.load(kind, model)
    facts = {
        "model": model,
        "pretrained": how.pretrained,
        "size": how.size,
        "dtype": how.dtype,
        "prompt": prompt,
        "set": printable(source.name),
    }
    file = journal if journal is not None or json is None else json.with_suffix(".journal.sqlite")
    with resumable(file), progress("measuring", len(items)) as tick:
        result = measure(subject, items, settings=settings, facts=facts, journal=file, tick=tick)
    with doing("resampling"):
        record = make_record(result)
    record["skipped"] += [list(entry) for entry in bad]
    what = {"count": len(result.entries), "set": printable(source.resolve().name)}
    head = {
        "kind": "analyze",
        "model": model,
        "pretrained": how.pretrained,
        "images": what if subject.sees else None,
        "prompts": None if subject.sees else what,
        "questions": None if questions is None else {"count": len(result.entries)},
        "left_out": left_facts(left),
    }
    record = {**head, **record, "environment": environment(subject.device)}
    show(record)
    resumed = f", {result.outcome.resumed} of them from the journal" if result.outcome.resumed else ""
    out.print(f"{len(result.entries)} {subject.things}{resumed}", highlight=False)
    if json is not None:
        with doing("drawing"):
            shown = _survivors(subject, record, result, items) if subject.sees else {}
        save(json, {**record, **shown})
    finish(record["skipped"], "measured", subject.things)


def _survivors(subject: "Subject", record: dict[str, Any], result: "Analysis", items: list[Any]) -> dict[str, Any]:
    """Return what the proposed plan keeps of the first images that were measured; the usual plan where none is proposed."""
    from ...plans import Plan
    from ..view.survivors import survivors

    why = "the proposed plan"
    if record["plan"] is not None:
        plan = Plan.from_dict(record["plan"])
    else:
        no_plan = (
            "what leaving costs was not measured, --causal 0"
            if result.causal is None
            else "no layer is redundant and harmless"
        )
        why = f"no plan is proposed ({no_plan}): the usual setting for this model"
        plan = subject.plan or Plan()
    measured = result.outcome.entries
    photos, left_out = survivors(subject, plan, [i for i in items if i.id in measured])
    return {"survivors": photos, "survivors_of": {"plan": plan.to_dict(), "why": why, "left_out": left_out}}
