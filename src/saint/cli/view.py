"""`saint view IMAGE`, and the pictures of `saint demo`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    MODEL_HELP,
    Device,
    Json,
    Layers,
    Limit,
    PlanText,
    Pretrained,
    Size,
    Threads,
    Threshold,
    describe,
    finish,
    load,
    make_plan,
    out,
    pictures,
    progress,
)

if TYPE_CHECKING:
    from PIL import Image as Picture

    from ..loading import Loaded, Photo
    from ..plan import Plan
    from ..tokens import LayerTrace


def view(
    image: Annotated[Path, typer.Argument(help="an image, or a folder of them")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo:clip-b16",
    plan: PlanText = None,
    threshold: Threshold = None,
    layers: Layers = None,
    size: Size = None,
    device: Device = "auto",
    threads: Threads = None,
    pretrained: Pretrained = True,
    limit: Limit = 24,
    folder: Annotated[Path, typer.Option("--out", help="folder for the pictures")] = Path("view_out"),
    json: Json = None,
) -> None:
    """Draw which patches of IMAGE each layer keeps."""
    import torch

    from ..records import environment, write_json
    from ..session import pruned

    photos, bad = pictures(image, limit)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    chosen = make_plan(loaded.plan, plan, threshold, layers)
    traces: list[list[LayerTrace]] = []
    with progress("drawing", len(photos)) as tick, pruned(loaded.model, chosen) as session, torch.inference_mode():
        for photo in photos:
            loaded.model(**loaded.inputs([photo.image]))
            traces.append(session.trace)
            tick()
    files = draw_strips(loaded, chosen, photos, traces, folder)
    for file in files:
        out.print(str(file), highlight=False)
    if json is not None:
        facts = [
            {"name": photo.name, "layers": [layer_facts(t) for t in trace]}
            for photo, trace in zip(photos, traces, strict=True)
        ]
        record = {
            "kind": "view",
            "model": model,
            "plan": chosen.to_dict(),
            "grid": loaded.grid,
            "photos": facts,
            "skipped": [list(entry) for entry in bad],
            "files": [file.name for file in files],
            "environment": environment(loaded.device),
        }
        write_json(json, record)
    finish(bad)


def layer_facts(trace: "LayerTrace", sample: int = 0) -> dict[str, Any]:
    """One sample's survivors at one drop point, as plain data."""
    return {
        "layer": trace.layer,
        "tokens_in": int(trace.tokens_in[sample]),
        "tokens_out": int(trace.tokens_out[sample]),
        "kept": trace.kept[sample].tolist(),
    }


def title(photo: "Photo") -> str:
    """Its name, for people."""
    return photo.name.replace("_", " ")


def legend(plan: "Plan") -> str:
    """What the pictures show."""
    return f"{describe(plan)}  \u00b7  hatched patches were dropped"


def dimmed(loaded: "Loaded", photo: "Picture.Image", trace: "LayerTrace") -> "Picture.Image":
    """The photograph with what a drop point left of it."""
    from ..view import overlay

    return overlay(photo, trace.kept[0].cpu(), loaded.grid)


def draw_strips(
    loaded: "Loaded", plan: "Plan", photos: Sequence["Photo"], traces: Sequence[list["LayerTrace"]], folder: Path
) -> list[Path]:
    """One PNG per photo: the photo, and what is left of it after each drop point."""
    from ..view import Cell, save_png, sheet

    files = []
    rows, columns = loaded.grid
    for photo, trace in zip(photos, traces, strict=True):
        seen = loaded.picture(photo.image)
        cells = [Cell(seen, title(photo), f"{rows * columns} patches")]
        # a layer that dropped nothing shows nothing new, except when it is the last
        shown = [t for t in trace if int(t.tokens_out) < int(t.tokens_in)] or trace[-1:]
        for step in _spaced(shown, 7):
            kept = int(step.tokens_out[0])
            note = f"{kept} of {rows * columns} kept ({kept / (rows * columns):.0%})"
            after = f"after layer {step.layer}"
            if step is shown[-1] and step is not trace[-1]:
                after = f"after layers {step.layer} to {trace[-1].layer}"  # the others dropped nothing
            cells.append(Cell(dimmed(loaded, seen, step), after, note))
        path = folder / f"kept_{photo.name}.png"
        save_png(sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], loaded.title, legend(plan)), path)
        files.append(path)
    return files


def _spaced(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` of them, evenly spaced, with the last."""
    if len(items) <= most:
        return items
    return [items[round((i + 1) * len(items) / most) - 1] for i in range(most)]
