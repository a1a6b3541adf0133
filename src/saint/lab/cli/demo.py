"""`saint demo`: unpruned and pruned side by side on photographs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .common import USUAL, Asked, finish, out, pictures, progress, show, warn_busy

if TYPE_CHECKING:
    from ...plans import Plan
    from ...tokens import LayerTrace
    from ..bench import ForwardBench
    from ..kinds import Subject
    from ..kinds.agreement import Agreement
    from ..kinds.tiles import Tile
    from ..sources.listing import Left
    from ..sources.photos import Photo

WARMUP = 1


@dataclass
class Run:
    """A plan on all photographs; lists have an entry per photograph."""

    name: str
    plan: "Plan"
    traces: "list[list[LayerTrace]]" = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[tuple[Any, Any]] = field(default_factory=list)  # unpruned, pruned
    agreements: "list[Agreement]" = field(default_factory=list)
    benches: "list[ForwardBench]" = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Of all photographs together."""
        return sum(b.base.median for b in self.benches) / sum(b.pruned.median for b in self.benches)

    @property
    def bound(self) -> float:
        """FLOPs of all photographs, unpruned / pruned."""
        return sum(b.costs["base"].flops for b in self.benches) / sum(b.costs["pruned"].flops for b in self.benches)

    @property
    def values(self) -> list[float]:
        """Agreement of each photograph."""
        return [found.values[0] for found in self.agreements]

    def to_dict(self) -> dict[str, Any]:
        """Summarise for the record."""
        first, values = self.agreements[0], self.values
        return {
            "plan": self.plan.to_dict(),
            "plan_name": self.name,
            "speedup": self.speedup,
            "flops_bound": self.bound,
            "agreement": {
                "measure": first.measure, "of": first.answer, "mean": statistics.fmean(values), "min": min(values)
            },
        }  # fmt: skip


@options.model_options("dtype")
def demo(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)] = options.DEFAULT_MODEL,
    images: options.Images = None,
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    threshold: options.Threshold = None,
    layers: options.Layers = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds per photograph")] = 3,
    limit: options.Limit = 12,
    folder: Annotated[Path, typer.Option("--output", "-o", help="folder for the pictures and the record")] = Path(
        "demo_out"
    ),
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Run a model unpruned and pruned on photographs: tokens, time, agreement, pictures of what was kept.

    Without --plan and --keep two plans are shown: one made for half of the work, and the one that suits the model as published.
    Works offline with the demo models; --images FILE|DIR takes your own pictures.
    """
    from ..kinds import kind_of
    from ..records import environment, write_json
    from ..sources.listing import left_facts

    asked = Asked.read(plan, keep, threshold, layers, pixels)
    left: Left = {}
    photos, bad = pictures(images, limit, left)
    subject = how.load(kind_of(model, "embeddings"), model)
    shown = Run(*asked.of(subject))
    usual = Run(USUAL, subject.plan) if asked.open and subject.plan is not None else None
    runs = {run.name: run for run in (shown, usual) if run is not None}
    with progress("running", len(runs) * len(photos) * (repeats + WARMUP)) as tick:
        for photo in photos:
            for run in runs.values():
                _look(subject, run, photo, repeats, tick)
    spreads = {
        f"{photo.name}, {name}, {what}": spread
        for name, run in runs.items()
        for photo, b in zip(photos, run.benches, strict=True)
        for what, spread in b.spreads.items()
    }
    files: list[Path] = []
    if subject.grid is not None:  # patches that arrive flattened have no fixed crop to draw on
        tiles = [subject.tiles(photo.image, {})[0] for photo in photos]
        files = _strips(subject, shown, photos, tiles, folder)
        files.insert(0, _overview(subject, runs, photos, tiles, folder))
        if shown.agreements[0].measure == "correlation":
            files.insert(0, _maps(subject, shown, photos, tiles, folder))
    record = {
        "kind": "demo",
        "model": model,
        "pretrained": how.pretrained,
        "title": subject.title,
        "licence": subject.licence,
        **subject.told(None),
        **shown.to_dict(),
        "beside": None if usual is None else usual.to_dict(),
        "photos": [
            {
                "name": photo.name,
                **facts,
                "agreement": found.values[0],
                "same_top1": found.same_top1[0] if found.same_top1 else None,
                "bench": {key: value for key, value in measured.to_dict().items() if key != "plan"},
            }
            for photo, facts, found, measured in zip(photos, shown.facts, shown.agreements, shown.benches, strict=True)
        ],
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        "files": [file.name for file in files],
        "environment": environment(subject.device),
    }
    show(record)
    warn_busy(shown.benches[0].conditions["load_average"], spreads)
    write_json(folder / "record.json", record)
    if json is not None:
        write_json(json, record)
    hint = f": see {files[0].name} first" if files else ""
    out.print(f"\nwrote {len(files)} pictures and record.json to {folder}{hint}", highlight=False)
    finish(bad)


def _look(subject: "Subject", run: Run, photo: "Photo", repeats: int, tick: Any) -> None:
    """Add a photograph to a run."""
    import torch

    from ...session import pruned
    from ..kinds.agreement import agreement
    from ..sources.items import Item
    from ..view.reasons import Reasons

    inputs = subject.inputs([Item.photo(photo.name, photo.image)], [photo.image])
    reasons = Reasons(run.plan)
    with torch.inference_mode():
        base = subject.model(**inputs)
        with pruned(subject.model, run.plan, observers=[reasons]) as session:
            short = subject.model(**inputs)
            trace = session.trace
    run.traces.append(trace)
    run.facts.append(subject.facts(photo.image, inputs, trace, reasons.take()))
    run.agreements.append(agreement(base, short))
    run.outputs.append((base, short))
    run.benches.append(
        subject.bench({"plan": run.plan}, [photo.image], repeats=repeats, warmup=WARMUP, extras=False, tick=tick)
    )


def _strips(
    subject: "Subject", run: Run, photos: "Sequence[Photo]", tiles: "Sequence[Tile]", folder: Path
) -> list[Path]:
    """One PNG per photograph: what is kept of it after each drop point."""
    from ..view.strips import draw, legend, title

    return [
        draw(
            subject.title, legend(run.plan), title(photo.name), [tile], subject.total({}), trace,
            folder / f"kept_{photo.name}.png",
        )
        for photo, tile, trace in zip(photos, tiles, run.traces, strict=True)
    ]  # fmt: skip


def _by_kept(run: Run, most: int) -> list[int]:
    """Choose the photographs to show: spread over how much was dropped, most first."""
    order = sorted(range(len(run.traces)), key=lambda i: int(run.traces[i][-1].tokens_out[0]))
    return order if len(order) <= most else [order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)]


def _overview(
    subject: "Subject", runs: dict[str, Run], photos: "Sequence[Photo]", tiles: "Sequence[Tile]", folder: Path
) -> Path:
    """Photographs above what each plan kept of them."""
    from ..view import Cell, save_png, sheet
    from ..view.strips import dimmed, legend, title

    first = next(iter(runs.values()))
    total = subject.total({})
    order = _by_kept(first, 5)
    rows = [[Cell(tiles[i].picture, title(photos[i].name), f"{total} patches") for i in order]]
    for name, run in runs.items():
        lead = f"{name}: " if len(runs) > 1 else ""
        rows.append([])
        for i in order:
            kept, found = int(run.traces[i][-1].tokens_out[0]), run.agreements[i]
            rows[-1].append(
                Cell(
                    dimmed(tiles[i], run.traces[i]),
                    f"{lead}{kept} kept ({kept / total:.0%})",
                    f"{found.measure} {found.values[0]:.3f}",
                )
            )
    path = folder / "overview.png"
    save_png(sheet(rows, subject.title, legend(first.plan)), path)
    return path


def _maps(subject: "Subject", run: Run, photos: "Sequence[Photo]", tiles: "Sequence[Tile]", folder: Path) -> Path:
    """Photograph, what is kept of it, and the two maps."""
    from ..view import Cell, heatmap, save_png, sheet
    from ..view.strips import dimmed, legend, title

    rows = []
    total = subject.total({})
    for i in _by_kept(run, 4):
        seen = tiles[i].picture
        base, short = (subject.compared(output)[0, 0] for output in run.outputs[i])
        kept = int(run.traces[i][-1].tokens_out[0])
        rows.append(
            [
                Cell(seen, title(photos[i].name), f"{total} patches"),
                Cell(heatmap(base, seen.size), "unpruned", "saliency map"),
                Cell(heatmap(short, seen.size), "pruned", f"correlation {run.values[i]:.3f}"),
                Cell(dimmed(tiles[i], run.traces[i]), "kept", f"{kept} of {total} patches ({kept / total:.0%})"),
            ]
        )
    path = folder / "maps.png"
    save_png(sheet(rows, subject.title, legend(run.plan)), path)
    return path
