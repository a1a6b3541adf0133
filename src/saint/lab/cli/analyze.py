"""`saint analyze`: what tokens do per layer of MODEL, and whether layers fall into stages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from .common import (
    MODEL_HELP,
    Device,
    DType,
    Json,
    Pretrained,
    Prompt,
    Prompts,
    Questions,
    Size,
    Threads,
    dtype_of,
    err,
    finish,
    load,
    out,
    progress,
    resumable,
    save,
)

if TYPE_CHECKING:
    from ..analysis.run import Analysis
    from ..kinds import Subject
    from ..sources.listing import Left

# columns of the table on the terminal: quantity, heading, digits
_COLUMNS = (
    ("key_similarity", "sim", 2),
    ("key_similarity_centred", "simc", 2),
    ("cls_entropy", "Hcls", 2),
    ("last_entropy", "Hlast", 2),
    ("token_entropy", "Htok", 2),
    ("received_entropy", "Hrec", 2),
    ("visual_share", "v>v", 2),
    ("text_share", "t>v", 2),
    ("effective_rank", "rank", 0),
    ("residual_update", "upd", 2),
    ("cka_adjacent", "CKA", 2),
    ("outliers", "high", 2),
)
_LEGEND = (
    "sim, simc: cosine of keys, of centred keys; Hcls, Hlast, Htok, Hrec: entropy of the attention of CLS, the last token, "
    "{tokens}, and of received attention (nat); {shares}upd: update; "
    "CKA: of input and output; high: share of high norms; drop: share of sources that SAINT would drop"
)


def analyze(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; also of a language model, with images or without")],
    images: Annotated[Path | None, typer.Option("--images", help="an image, or a folder of them")] = None,
    prompts: Prompts = None,
    questions: Questions = None,
    prompt: Prompt = None,
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
    size: Size = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: DType = "auto",
    pretrained: Pretrained = True,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", help="results per image; a killed run continues [default: beside --json]"),
    ] = None,
    json: Json = None,
) -> None:
    """What tokens do in each layer of MODEL: similarity, attention, rank, updates, and what the output loses without them.

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
    number = dtype_of(dtype)
    kind = kind_of(model, ("embeddings", "answers", "next tokens"))
    kind.check(
        model,
        {"--images": images, "--questions": questions, "--prompt": prompt, "--prompts": prompts, "--size": size},
    )
    left: Left = {}
    items, bad = kind.items(Given(images, questions, prompt, prompts), limit, left)
    source = images or prompts
    assert source is not None, "one of them has items"
    subject = load(kind, model, device, size=size, threads=threads, pretrained=pretrained, dtype=number)
    facts = {
        "model": model,
        "pretrained": pretrained,
        "size": size,
        "dtype": dtype,
        "prompt": prompt,
        "set": printable(source.name),
    }
    file = journal if journal is not None or json is None else json.with_suffix(".journal.sqlite")
    with resumable(file), progress("measuring", len(items)) as tick:
        result = measure(subject, items, settings=settings, facts=facts, journal=file, tick=tick)
    with err.status("resampling"):
        record = make_record(result)
    record["skipped"] += [list(entry) for entry in bad]
    print_record(model, record, result)
    if json is not None:
        what = {"count": len(result.entries), "set": printable(source.resolve().name)}
        head = {
            "kind": "analyze",
            "model": model,
            "pretrained": pretrained,
            "images": what if subject.sees else None,
            "prompts": None if subject.sees else what,
            "questions": None if questions is None else {"count": len(result.entries)},
            "left_out": left_facts(left),
        }
        with err.status("drawing"):
            shown = _survivors(subject, record, result, items) if subject.sees else {}
        save(json, {**head, **record, **shown, "environment": environment(subject.device)})
    finish(record["skipped"], "measured", subject.things)


def _survivors(subject: "Subject", record: dict[str, Any], result: "Analysis", items: list[Any]) -> dict[str, Any]:
    """What the proposed plan keeps of the first images that were measured; the usual plan where none is proposed."""
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


def print_record(model: str, record: dict[str, Any], result: "Analysis") -> None:
    """Per part a table, a row per layer, and the verdict; then the plan."""
    count = len(result.entries)
    resumed = f", {record['resumed']} of them from the journal" if record["resumed"] else ""
    out.print(f"[bold]{model}[/]  {count} {result.subject.things}{resumed}", highlight=False)
    for part in record["parts"]:
        out.print()
        _print_part(part, record["candidates"])
    if record["plan_line"] is not None:
        out.print("\nA plan to try (the earliest layers where SAINT costs little and finds much; evaluate it):")
        out.print(record["plan_line"], highlight=False, soft_wrap=True)
    elif result.causal is not None:
        out.print("\nNo plan proposed: no layer is both redundant and harmless to thin out.")


def _print_part(part: dict[str, Any], candidates: str) -> None:
    tokens = part["tokens"]
    protected = f" and {tokens['protected']:g} protected" if tokens["protected"] else ""
    title = f"[bold]{part['stage']}[/]  {part['layers']} layers, {tokens['candidates']:g} candidates{protected} tokens"
    quantities = {quantity["name"]: quantity for quantity in part["quantities"]}
    columns = [column for column in _COLUMNS if column[0] in quantities]
    thresholds = part["droppable"]["thresholds"]
    middle = thresholds.index(0.75) if 0.75 in thresholds else len(thresholds) // 2
    table = Table("layer", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    starts = {boundary["layer"] for boundary in part["stages"]["boundaries"]}
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    table.add_column("drop", justify="right")
    for what, why in part["missing"]:
        err.print(f"[yellow]note[/] no {what} of the {part['stage']} stage: {why}", highlight=False)
    causal = part["causal"]
    for method in () if causal is None else causal["methods"]:
        table.add_column(f"-{method}", justify="right")
    for layer in range(part["layers"]):
        if layer in starts:
            table.add_section()
        cells = [_cell(quantities[name]["mean"][layer], digits) for name, _, digits in columns]
        cells.append(_cell(part["droppable"]["mean"][middle][layer], 2))
        cells += [_cell(m["mean"][layer], 3) for m in ({} if causal is None else causal["methods"]).values()]
        table.add_row(str(layer), *cells)
    out.print(table)
    out.print(f"{_legend(candidates)} at {thresholds[middle]:g}", highlight=False, style="dim")
    if causal is not None:
        unit = f" ({causal['unit']})" if causal["unit"] else ""
        when = f"when {causal['share']:.0%} of the tokens leave at that layer alone, by that choice"
        names = ", ".join(f"-{method}" for method in causal["methods"])
        out.print(f"{names}: {causal['measure']}{unit} {when}", highlight=False, style="dim")
    stages = part["stages"]
    out.print(f"[bold]Stages: {stages['verdict']}[/]", highlight=False)
    for reason in stages["reasons"]:
        out.print(f"  {reason}", highlight=False)
    for segment in stages["segments"]:
        out.print(f"  layers {segment['first']} to {segment['last']}: {segment['what']}", highlight=False)
    if "bic" in stages["criteria"]:
        shown = ", ".join(f"{_named(name)} {value:.0f}" for name, value in stages["criteria"]["bic"].items())
        out.print(f"  BIC: {shown}", highlight=False)


def _legend(candidates: str) -> str:
    shares = "" if candidates == "prompt tokens" else "v>v, t>v: attention of visual and text tokens on visual ones; "
    return _LEGEND.format(tokens=candidates, shares=shares)


def _named(name: str) -> str:
    return {"line": "straight line", "smooth": "smooth curves"}.get(name, f"{name} segment{'s' * (name != '1')}")


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
