"""`saint demo`: unpruned and pruned side by side on photographs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .common import (
    DEFAULT_MODEL,
    MODEL_HELP,
    Device,
    Image,
    Json,
    Layers,
    Limit,
    PlanText,
    Pretrained,
    Size,
    Threads,
    Threshold,
    bar,
    describe,
    finish,
    load,
    make_plan,
    out,
    pictures,
    progress,
    warn_busy,
)
from .view import dimmed, draw_strips, legend, thumbnail, title

if TYPE_CHECKING:
    from ...plans import Plan
    from ...tokens import LayerTrace
    from ..bench import Agreement, EncoderBench
    from ..loading import Loaded, Photo
    from ..loading.listing import Left

WARMUP = 1


def demo(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = DEFAULT_MODEL,
    image: Image = None,
    plan: PlanText = None,
    threshold: Threshold = None,
    layers: Layers = None,
    size: Size = None,
    device: Device = "auto",
    threads: Threads = None,
    pretrained: Pretrained = True,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds per photograph")] = 3,
    limit: Limit = 12,
    folder: Annotated[Path, typer.Option("--out", help="folder for the pictures and the record")] = Path("demo_out"),
    json: Json = None,
) -> None:
    """Run a model unpruned and pruned on photographs: tokens, time, agreement, pictures of what was kept.

    Works offline with the demo models; --image FILE|DIR takes your own pictures.
    """
    import torch

    from ...flops import left_out
    from ...session import pruned
    from ..bench import agreement, bench_encoder
    from ..loading.listing import left_facts
    from ..records import environment, write_json
    from ..view.facts import layer_facts
    from ..view.reasons import Reasons

    left: Left = {}
    photos, bad = pictures(image, limit, left)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    chosen = make_plan(loaded.plan, plan, threshold, layers)
    benches: list[EncoderBench] = []
    agreements: list[Agreement] = []
    traces: list[list[LayerTrace]] = []
    answers: list[tuple[Any, Any]] = []
    asked, reasons = Reasons(chosen), []
    with progress("running", len(photos) * (repeats + WARMUP)) as tick:
        for photo in photos:
            inputs = loaded.inputs([photo.image])
            with torch.inference_mode():
                base = loaded.model(**inputs)
                with pruned(loaded.model, chosen, observers=[asked]) as session:
                    short = loaded.model(**inputs)
                    traces.append(session.trace)
                    reasons.append(asked.take())
            agreements.append(agreement(base, short))
            answers.append((base, short))
            benches.append(bench_encoder(loaded.model, chosen, inputs, repeats, WARMUP, extras=False, tick=tick))

    speedup = sum(b.base.median for b in benches) / sum(b.pruned.median for b in benches)
    bound = sum(b.costs["base"].flops for b in benches) / sum(b.costs["pruned"].flops for b in benches)
    missing = left_out(*(b.uncounted for b in benches))
    _print(loaded, chosen, photos, traces, benches, agreements, missing)
    out.print(
        f"measured speed-up [bold]{speedup:.2f}x[/], FLOPs bound {bound:.2f}x{missing} "
        f"({benches[0].conditions['threads']} threads, {loaded.device}, batch 1, {repeats} interleaved rounds each)",
        highlight=False,
    )
    spreads = {f"{photo.name}, unpruned": b.base for photo, b in zip(photos, benches, strict=True)}
    spreads |= {f"{photo.name}, pruned": b.pruned for photo, b in zip(photos, benches, strict=True)}
    warn_busy(benches[0].conditions["load_average"], spreads)
    values = [value for found in agreements for value in found.values]
    name = agreements[0]
    out.print(
        f"agreement with the unpruned model ({name.measure} of {_answer(name)}): "
        f"mean [bold]{statistics.fmean(values):.4f}[/], lowest {min(values):.4f}",
        highlight=False,
    )

    files: list[Path] = []
    if loaded.source.batch is None:  # patches that arrive flattened have no fixed crop to draw on
        files = draw_strips(loaded, chosen, photos, traces, folder)
        files.insert(0, _overview(loaded, chosen, photos, traces, agreements, folder))
        if agreements[0].measure == "correlation":
            files.insert(0, _maps(loaded, chosen, photos, traces, answers, agreements, folder))
    record = {
        "kind": "demo",
        "model": model,
        "pretrained": pretrained,
        "title": loaded.title,
        "licence": loaded.licence,
        "image_size": loaded.image_size,
        "grid": loaded.grid if loaded.source.batch is None else None,
        "plan": chosen.to_dict(),
        "speedup": speedup,
        "flops_bound": bound,
        "agreement": {"measure": name.measure, "of": name.answer, "mean": statistics.fmean(values), "min": min(values)},
        "photos": [
            {
                "name": photo.name,
                **thumbnail(loaded, photo),
                "layers": [layer_facts(t, 0, why[0]) for t, why in zip(trace, given, strict=True)],
                "agreement": found.values[0],
                "same_top1": found.same_top1[0] if found.same_top1 else None,
                "bench": {key: value for key, value in measured.to_dict().items() if key != "plan"},
            }
            for photo, trace, given, found, measured in zip(photos, traces, reasons, agreements, benches, strict=True)
        ],
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        "files": [file.name for file in files],
        "environment": environment(loaded.device),
    }
    write_json(folder / "record.json", record)
    if json is not None:
        write_json(json, record)
    hint = f": see {files[0].name} first" if files else ""
    out.print(f"\nwrote {len(files)} pictures and record.json to {folder}{hint}", highlight=False)
    finish(bad)


def _answer(found: "Agreement") -> str:
    return "the saliency map" if found.measure == "correlation" else found.answer


def _print(
    loaded: "Loaded",
    plan: "Plan",
    photos: Sequence["Photo"],
    traces: Sequence[list["LayerTrace"]],
    benches: Sequence["EncoderBench"],
    agreements: Sequence["Agreement"],
    missing: str,
) -> None:
    out.print(f"\n[bold]{loaded.title}[/]\n{describe(plan)}\n", highlight=False)
    total = int(traces[0][0].tokens_in[0])
    table = Table("layer", "tokens", "lowest", "highest", "", title=f"tokens left of {total}", title_justify="left")
    for step in zip(*traces, strict=True):
        left = [int(t.tokens_out[0]) for t in step]
        mean = statistics.fmean(left)
        where = "input" if step[0].placement == "input" else str(step[0].layer)
        table.add_row(where, f"{mean:.0f}", str(min(left)), str(max(left)), bar(mean / total))
    out.print(table)
    measure = agreements[0].measure
    heads = ["kept", "ms before", "after", "speed-up", "bound", "corr." if measure == "correlation" else measure]
    if agreements[0].same_top1 is not None:
        heads.append("same class")
    table = Table(box=SIMPLE_HEAD, caption=f"bound{missing}" if missing else None)
    table.add_column("photograph", no_wrap=True, max_width=18)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for photo, trace, measured, found in zip(photos, traces, benches, agreements, strict=True):
        row = [
            photo.name,
            f"{int(trace[-1].tokens_out[0])}/{total}",
            f"{measured.base.median:.0f}",
            f"{measured.pruned.median:.0f}",
            f"{measured.speedup.median:.2f}x",
            f"{measured.bound:.2f}x",
            f"{found.values[0]:.4f}",
        ]
        if found.same_top1 is not None:
            row.append("yes" if found.same_top1[0] else "no")
        table.add_row(*row)
    out.print(table)


def _by_kept(photos: Sequence["Photo"], traces: Sequence[list["LayerTrace"]], most: int) -> list[int]:
    """Which photographs to show: spread over how much was dropped, most first."""
    order = sorted(range(len(photos)), key=lambda i: int(traces[i][-1].tokens_out[0]))
    return order if len(order) <= most else [order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)]


def _overview(
    loaded: "Loaded",
    plan: "Plan",
    photos: Sequence["Photo"],
    traces: Sequence[list["LayerTrace"]],
    agreements: Sequence["Agreement"],
    folder: Path,
) -> Path:
    """Photographs above what is left of them."""
    from ..view import Cell, save_png, sheet

    top, bottom = [], []
    total = loaded.grid[0] * loaded.grid[1]
    for i in _by_kept(photos, traces, 5):
        seen = loaded.picture(photos[i].image)
        kept = int(traces[i][-1].tokens_out[0])
        found = agreements[i]
        top.append(Cell(seen, title(photos[i]), f"{total} patches"))
        bottom.append(
            Cell(
                dimmed(loaded, seen, traces[i][-1]),
                f"{kept} kept ({kept / total:.0%})",
                f"{found.measure} {found.values[0]:.3f}",
            )
        )
    path = folder / "overview.png"
    save_png(sheet([top, bottom], loaded.title, legend(plan)), path)
    return path


def _maps(
    loaded: "Loaded",
    plan: "Plan",
    photos: Sequence["Photo"],
    traces: Sequence[list["LayerTrace"]],
    answers: Sequence[tuple[Any, Any]],
    agreements: Sequence["Agreement"],
    folder: Path,
) -> Path:
    """Photograph, what is left of it, and the two maps."""
    from ..bench.agreement import answer
    from ..view import Cell, heatmap, save_png, sheet

    rows = []
    total = loaded.grid[0] * loaded.grid[1]
    for i in _by_kept(photos, traces, 4):
        seen = loaded.picture(photos[i].image)
        base, short = (answer(output)[1][0, 0] for output in answers[i])
        kept = int(traces[i][-1].tokens_out[0])
        rows.append(
            [
                Cell(seen, title(photos[i]), f"{total} patches"),
                Cell(heatmap(base, seen.size), "unpruned", "saliency map"),
                Cell(heatmap(short, seen.size), "pruned", f"correlation {agreements[i].values[0]:.3f}"),
                Cell(dimmed(loaded, seen, traces[i][-1]), "kept", f"{kept} of {total} patches ({kept / total:.0%})"),
            ]
        )
    path = folder / "maps.png"
    save_png(sheet(rows, loaded.title, legend(plan)), path)
    return path
