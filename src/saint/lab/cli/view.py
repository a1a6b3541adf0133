"""`saint view MODEL`, and the pictures of `saint demo`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    describe,
    finish,
    load,
    load_generator,
    make_plan,
    out,
    pictures,
    progress,
    save,
)

if TYPE_CHECKING:
    from PIL import Image as Picture

    from ...plans import Plan
    from ...tokens import LayerTrace
    from ..loading import Loaded, Photo
    from ..loading.listing import Left
    from ..view.tiles import Tile


def view(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = DEFAULT_MODEL,
    image: Image = None,
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
    prompt: Annotated[
        str | None, typer.Option(help="vision-language models: the question [default: Describe the image.]")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="encoders: also draw when patches left, what stands for them, and the votes")
    ] = False,
    patch: Annotated[
        str | None, typer.Option(help="with --why: the similarity graph around patch ROW,COLUMN (from 0)")
    ] = None,
) -> None:
    """Draw which patches of --image each layer of MODEL keeps.

    Of a vision-language model: what its tower sees (an image, or its tiles), and which visual tokens each stage keeps for the
    question. Without --image, photographs that are there anyway.
    """
    import torch

    from ...session import pruned
    from ..loading.listing import left_facts
    from ..loading.vlm import is_vlm
    from ..records import environment
    from ..view.explain import Witness
    from ..view.facts import layer_facts
    from ..view.reasons import Reasons
    from .why import draw_reasons, read_patch

    around = read_patch(patch)
    if around is not None and not why:
        raise ValueError("--patch draws on the pictures of --why: give both")
    if is_vlm(model):
        if size is not None:
            raise ValueError("--size is for encoders: the processor of a vision-language model chooses the size")
        if why:
            raise ValueError(
                "--why is for encoders; tiles and question of a vision-language model are drawn without it"
            )
        question = "Describe the image." if prompt is None else prompt
        _view_vlm(model, image, plan, threshold, layers, device, threads, pretrained, limit, folder, json, question)
        return
    if prompt is not None:
        raise ValueError(f"--prompt is for vision-language models, {model} is none")
    left: Left = {}
    photos, bad = pictures(image, limit, left)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    chosen = make_plan(loaded.plan, plan, threshold, layers)
    traces: list[list[LayerTrace]] = []
    drawn, witness, asked = [], Witness(), Reasons(chosen)
    reasons: list[list[list[dict[str, Any]]]] = []
    observers = [asked, witness] if why else [asked]
    with (
        progress("drawing", len(photos)) as tick,
        pruned(loaded.model, chosen, observers=observers) as session,
        torch.inference_mode(),
    ):
        for photo in photos:
            loaded.model(**loaded.inputs([photo.image]))
            traces.append(session.trace)
            reasons.append(asked.take())
            if why:
                drawn.append(draw_reasons(loaded, chosen, photo, witness.take(), around, folder))
            tick()
    files = [*draw_strips(loaded, chosen, photos, traces, folder), *drawn]
    for file in files:
        out.print(str(file), highlight=False, soft_wrap=True)  # a path in one piece
    if json is not None:
        facts = [
            {
                "name": photo.name,
                **thumbnail(loaded, photo),
                "layers": [layer_facts(t, 0, found[0]) for t, found in zip(trace, given, strict=True)],
            }
            for photo, trace, given in zip(photos, traces, reasons, strict=True)
        ]
        record = {
            "kind": "view",
            "model": model,
            "pretrained": pretrained,
            "plan": chosen.to_dict(),
            "grid": loaded.grid,
            "photos": facts,
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
            "files": [file.name for file in files],
            "environment": environment(loaded.device),
        }
        save(json, record)
    finish(bad)


def _view_vlm(
    model: str,
    image: Path | None,
    plan: str | None,
    threshold: float | None,
    layers: str | None,
    device: str,
    threads: int | None,
    pretrained: bool,
    limit: int,
    folder: Path,
    json: Path | None,
    prompt: str,
) -> None:
    import torch

    from ...session import pruned
    from ..images import data_uri
    from ..loading.listing import left_facts
    from ..loading.modes import usual_plan
    from ..records import environment
    from ..view.facts import steps_of
    from ..view.reasons import Reasons
    from ..view.tiles import tiles, visual_tokens

    left: Left = {}
    photos, bad = pictures(image, limit, left)
    loaded = load_generator(model, device, threads=threads, pretrained=pretrained)
    chosen = make_plan(usual_plan(loaded.model), plan, threshold, layers)
    files: list[Path] = []
    facts, reasons = [], Reasons(chosen)
    with (
        progress("drawing", len(photos)) as tick,
        pruned(loaded.model, chosen, observers=[reasons]) as session,
        torch.no_grad(),
    ):
        for photo in photos:
            inputs = loaded.inputs([prompt], [photo.image])
            loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
            trace, total = session.trace, visual_tokens(loaded.model, inputs)
            seen = tiles(loaded.model, loaded.processor, inputs)
            files.append(draw_tiles(f"{model}: {title(photo)}", f"{prompt!r}  \u00b7  {legend(chosen)}", seen, trace, total,
                                    folder / f"kept_{photo.name}.png"))  # fmt: skip
            facts.append(
                {
                    "name": photo.name,
                    "visual_tokens": total,
                    "tiles": [tile.grid for tile in seen],
                    "pictures": [data_uri(tile.picture) for tile in seen],
                    "layers": steps_of(trace, reasons.take()),
                }
            )
            tick()
    for file in files:
        out.print(str(file), highlight=False, soft_wrap=True)  # a path in one piece
    if json is not None:
        save(json, {
            "kind": "view",
            "model": model,
            "pretrained": pretrained,
            "prompt": prompt,
            "plan": chosen.to_dict(),
            "photos": facts,
            "skipped": [list(entry) for entry in bad],
"left_out": left_facts(left),
            "files": [file.name for file in files],
            "environment": environment(loaded.device),
        })  # fmt: skip
    finish(bad)


def draw_tiles(
    head: str, about: str, seen: "Sequence[Tile]", trace: Sequence["LayerTrace"], total: int, path: Path
) -> Path:
    """One PNG: a row per tile, with what is left of it after the stages; tokens that no grid shows are only counted."""
    from ..view import Cell, overlay, save_png, sheet
    from ..view.tiles import placed

    rows = []
    for i, tile in enumerate(seen):
        name = f"tile {i + 1} of {len(seen)}" if len(seen) > 1 else "the image"
        rows.append([Cell(tile.picture, name, f"{tile.grid[0] * tile.grid[1]} tokens")])
    shown = [t for t in trace if bool((t.tokens_out < t.tokens_in).any())] or list(trace[-1:])
    counted = []
    for step in _spaced(shown, 5):
        name = step.stage if step.stage == "connector" else f"{step.stage}, {_behind(step)}"
        per_tile = step.kept if step.stage == "vision" else placed(list(seen), step.kept[0].cpu(), total)
        if per_tile is None or len(per_tile) != len(seen):
            counted.append(f"{name}: {int(step.tokens_out.sum())} of {total} tokens")
            continue
        for row, tile, kept in zip(rows, seen, per_tile, strict=True):
            count = tile.grid[0] * tile.grid[1]
            picture = overlay(tile.picture, kept.cpu(), tile.grid)
            row.append(Cell(picture, name, f"{len(kept)} of {count} kept ({len(kept) / count:.0%})"))
    extra = f"  \u00b7  not drawn (laid on no grid): {'; '.join(counted)}" if counted else ""
    save_png(sheet(rows, head, about + extra), path)
    return path


def thumbnail(loaded: "Loaded", photo: "Photo") -> dict[str, str]:
    """ "picture": what the model sees of the photo, small, as text; nothing where it sees no fixed crop."""
    from ..images import data_uri

    return {} if loaded.source.batch is not None else {"picture": data_uri(loaded.picture(photo.image))}


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
            after = _behind(step)
            if step is shown[-1] and step is not trace[-1]:
                after = f"{after}, to layer {trace[-1].layer}"  # the others dropped nothing
            cells.append(Cell(dimmed(loaded, seen, step), after, note))
        path = folder / f"kept_{photo.name}.png"
        save_png(sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], loaded.title, legend(plan)), path)
        files.append(path)
    return files


def _behind(step: "LayerTrace") -> str:
    from ..report.reading import behind

    return behind({"layer": step.layer, "placement": step.placement})


def _spaced(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` of them, evenly spaced, with the last."""
    if len(items) <= most:
        return items
    return [items[round((i + 1) * len(items) / most) - 1] for i in range(most)]
