"""`saint embed`: the embeddings of a folder of images, as parquet."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import options
from .common import doing, err, out, progress, resumable, save


@options.model_options()
def embed(
    source: Annotated[
        Path,
        typer.Argument(
            help="a folder of images, .parquet files (bytes, or paths on disk) or .tar shards", metavar="DIR"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the parts; a killed run continues there")],
    model: Annotated[str, typer.Option("--model", help=options.MODEL_HELP)],
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    question: Annotated[
        str | None, typer.Option(help="ask a vision-language model about every image, in place of embeddings")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 16,
    batch: Annotated[
        int | None, typer.Option(min=1, help="images per forward [default: 32, with --question 1]")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of a part")] = 1000,
    column: Annotated[str | None, typer.Option(help="of parquet files [default: the one that holds images]")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="on a Ray cluster (RAY_ADDRESS), or all of this machine")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="with --ray, models [default: one per GPU, or per CPU]")
    ] = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Embed every image of DIR under a plan, or ask about it: a row each, with the tokens kept, or why it could not be read.

    The folder of -o holds parquet parts and a manifest. The same command continues a run that was stopped; every row is there
    once. Another model, plan or source is refused.
    """
    from ..describe import describe
    from ..embed.run import run
    from ..embed.sources import find_items
    from ..embed.work import Job
    from ..kinds import Subject, kind_of
    from ..loading.plans import HALF, choose
    from ..records import environment
    from ..sources.listing import Left, left_facts

    if workers is not None and not ray:
        raise ValueError("--workers is for --ray")
    if ray and (how.device != "auto" or how.threads is not None):
        raise ValueError("--device and --threads are not for --ray, which gives each model a GPU, or else a CPU")
    choice = choose(plan, keep, pixels) or HALF
    gives = "embeddings" if question is None else "answers"
    loaded: str | Subject = model
    if choice.plan is None:  # a plan for a share of the work is made for the model
        subject = how.load(kind_of(model, gives), model)
        chosen, loaded = subject.planned(choice), model if ray else subject
    else:
        chosen = choice.plan
    job = Job(loaded, chosen, question, max_new_tokens, how.pretrained, how.size, how.dtype)
    batch = batch or job.batch
    left: Left = {}
    with doing(f"listing {source}"):
        items = find_items(source, column=column, left=left)
    with resumable(output), progress("embedding" if question is None else "asking", len(items)) as tick:
        if ray:
            from ..embed.ray import local_cluster
            from ..embed.ray import run as run_on_ray

            with local_cluster():
                made = run_on_ray(items, source, job, output, batch=batch, rows=rows, workers=workers, tick=tick)
        else:
            how.set_threads()
            made = run(items, source, job, output, batch=batch, device=how.device, rows=rows, tick=tick)
    out.print(f"[bold]{model}[/]  {escape(choice.name)}: {escape(describe(chosen))}", highlight=False, soft_wrap=True)
    resumed = f", {made.resumed} of them from an earlier run" if made.resumed else ""
    out.print(f"{made.count} rows in {output}{resumed}", highlight=False, soft_wrap=True)
    if json is not None:
        record = {
            "model": model,
            "plan": chosen.to_dict(),
            "plan_name": choice.name,
            "images": made.count,
            "errors": made.errors,
            "left_out": left_facts(left),
            "resumed": made.resumed,
        } | ({} if question is None else {"question": question, "max_new_tokens": max_new_tokens})
        save(json, {"kind": "embed", **record, "batch": batch, "ray": ray, "environment": environment()})
    if made.errors:
        verb = "embedded" if question is None else "asked about"
        err.print(f"[yellow]{made.errors} image(s) could not be {verb}: their rows hold the error[/]")
        raise typer.Exit(1)
