"""`saint tune`: a plan for MODEL and your images, without labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import err, finish, inputs_of, out, progress, resumable, save, show

if TYPE_CHECKING:
    from ..sources.listing import Left


@options.model_options()
def tune(
    model: Annotated[str, typer.Argument(help=f"{options.MODEL_HELP}; also of a vision-language model")],
    images: Annotated[Path, typer.Option("--images", help="a folder of images, 12 or more")],
    questions: options.Questions = None,
    prompt: options.Prompt = None,
    target_flops: Annotated[
        float | None,
        typer.Option(
            "--target-flops",
            "--keep",
            help="share of the FLOPs that is left, in (0, 1): of the encoder, or of the language model",
        ),
    ] = None,
    target_speed: Annotated[float | None, typer.Option(help="times faster, as measured here at batch 1, > 1")] = None,
    target_agreement: Annotated[
        float | None, typer.Option(help="cosine (of maps: correlation) with the unpruned output, in (0, 1)")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="the plan file")] = Path("plan.json"),
    methods: Annotated[
        str | None, typer.Option(help="to choose from, e.g. saint,tome [default: those that usually win]")
    ] = None,
    plan: options.PlanText = None,
    pixels: Annotated[
        str | None,
        typer.Option(
            "--pixels", help="encoders: the one size of smaller pictures to try, e.g. 0.6 of the pixels [default: all]"
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=12, help="at most so many images, evenly spaced")] = 96,
    held_out: Annotated[float, typer.Option(help="share of the images that are held back for the check")] = 1 / 3,
    frontier: Annotated[Path | None, typer.Option("--frontier", help="also write plans for other budgets here")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the split and the resamples")] = 0,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="results of trials; a killed run continues [default: beside -o]")
    ] = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Find a plan for MODEL: where tokens leave, by which method, and how many stay. No labels, minutes.

    What leaving costs is measured at one layer at a time, a knapsack chooses, joint runs check, and images that were held back
    say what was reached, with 95 % intervals. The plan file keeps that; every command takes it as --plan.
    """
    from ..kinds import Given, kind_of
    from ..loading.plans import read_pixels, read_plan
    from ..records import environment
    from ..sources.listing import left_facts, printable
    from ..tuning import Target, forwards
    from ..tuning.run import DEFAULT_METHODS, search

    if sum(value is not None for value in (target_flops, target_speed, target_agreement)) != 1:
        raise ValueError(
            "give one target: --target-flops 0.5 (the share of the FLOPs that is left), --target-speed 1.5 (times faster, as "
            "measured here) or --target-agreement 0.99 (with the unpruned output)"
        )
    target = Target(target_flops, target_speed, target_agreement)
    size = read_pixels(pixels)
    for file, option in ((output, "-o"), (frontier, "--frontier")):
        if file is not None and file.is_dir():
            raise IsADirectoryError(f"{option} needs a file name, {file} is a directory")
    kind = kind_of(model)
    kind.check(model, {"--size": how.size, "--questions": questions, "--prompt": prompt})
    left: Left = {}
    items, bad = kind.items(Given(images, questions, prompt), limit, left)
    chosen = DEFAULT_METHODS if methods is None else tuple(name.strip() for name in methods.split(","))
    subject = how.load(kind, model)
    suits = subject.plan if plan is None else read_plan(plan)
    data = inputs_of(subject, items, bad)
    facts = {
        "model": model,
        "pretrained": how.pretrained,
        "size": how.size,
        "dtype": how.dtype,
        "set": printable(images.resolve().name),
    }
    file = output.with_suffix(".journal.sqlite") if journal is None else journal
    total = forwards(len(data), held_out, agreement=target.agreement is not None, frontier=frontier is not None)
    with resumable(file), progress("tuning", total) as tick:
        found = search(
            subject, data, target, chosen=chosen, plan=suits, held_out=held_out, journal=file, seed=seed,
            frontier=frontier is not None, pixels=size, facts=facts, tick=tick,
        )  # fmt: skip
    found.plan.save(output)
    record = {
        "kind": "tune",
        **found.record,
        "pretrained": how.pretrained,
        "plan": found.plan.to_dict(),
        "plan_name": output.name,
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        "environment": environment(subject.device),
    }
    show(record)
    counts = found.record["images"]
    resumed = f", {found.resumed} trials from the journal" if found.resumed else ""
    out.print(f"{counts['tuned']} images, {counts['held_out']} held back{resumed}", highlight=False)
    err.print(f"wrote {output}", highlight=False)
    out.print(f"next: saint bench {model} --plan {output}", highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        save(json, {**record, "frontier": found.frontier or None})
    if frontier is not None:
        save(frontier, {**record, "frontier": found.frontier})
    finish(bad, "used")
