"""`saint view MODEL`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import options
from .common import Asked, finish, out, pictures, progress, save

if TYPE_CHECKING:
    from ..sources.listing import Left


@options.model_options("dtype")
def view(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)] = options.DEFAULT_MODEL,
    images: options.Images = None,
    prompt: options.Prompt = None,
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    threshold: options.Threshold = None,
    layers: options.Layers = None,
    limit: options.Limit = 24,
    folder: Annotated[Path, typer.Option("--output", "-o", help="folder for the pictures")] = Path("view_out"),
    json: options.Json = None,
    why: Annotated[
        bool,
        typer.Option(
            "--why", help="encoders: also draw when patches were dropped, what stands for them, and the votes"
        ),
    ] = False,
    patch: Annotated[
        str | None, typer.Option(help="with --why: the similarity graph around patch ROW,COLUMN (from 0)")
    ] = None,
    *,
    how: options.How,
) -> None:
    """Draw which patches of --images each layer of MODEL keeps.

    Of a vision-language model: what its tower sees (an image, or its tiles), and which visual tokens each stage keeps for the
    question. Without --images, photographs that are there anyway.
    """
    import torch

    from ...session import pruned
    from ..describe import describe
    from ..kinds import kind_of
    from ..kinds.subject import shrunk_by
    from ..records import environment
    from ..sources.items import Item
    from ..sources.listing import left_facts
    from ..view.explain import Witness
    from ..view.reasons import Reasons
    from ..view.strips import draw, legend, title
    from ..view.why import draw_reasons, read_patch

    around = read_patch(patch)
    if around is not None and not why:
        raise ValueError("--patch draws on the pictures of --why: give both")
    asked = Asked.read(plan, keep, threshold, layers, pixels)
    kind = kind_of(model)
    kind.check(model, {"--size": how.size, "--why": why, "--prompt": prompt})
    left: Left = {}
    photos, bad = pictures(images, limit, left)
    subject = how.load(kind, model)
    name, chosen = asked.of(subject)
    plan_inside, shown = subject.fitted(chosen)
    witness, reasons = Witness(), Reasons(chosen)
    files: list[Path] = []
    drawn: list[Path] = []
    facts: list[dict[str, Any]] = []
    lead = f"{prompt!r}  \u00b7  " if prompt is not None else ""
    with (
        progress("drawing", len(photos)) as tick,
        pruned(subject.model, plan_inside, observers=[reasons, witness] if why else [reasons]) as session,
        torch.inference_mode(),
    ):
        for photo in photos:
            item = Item.photo(photo.name, photo.image, prompt or "")
            inputs = shown.inputs([item], [photo.image])
            subject.model(**inputs)
            trace, seen = session.trace, shown.tiles(photo.image, inputs)
            path = folder / f"kept_{photo.name}.png"
            files.append(
                draw(subject.title, lead + legend(chosen), title(photo.name), seen, shown.total(inputs), trace, path)
            )
            facts.append({"name": photo.name, **shown.facts(photo.image, inputs, trace, reasons.take())})
            if shown is not subject:
                facts[-1]["visual_tokens_unpruned"] = subject.total(subject.inputs([item], [photo.image]))
            if why:
                steps = witness.take()
                drawn.append(draw_reasons(subject.title, chosen, photo.name, seen[0], steps, around, folder))
            tick()
    files += drawn
    out.print(f"[bold]{escape(model)}[/]  {escape(name)}: {escape(describe(chosen))}", highlight=False)
    for number, file in enumerate(files):
        kept = f"  {_kept(facts[number])}" if number < len(facts) else ""
        out.print(f"{file}{kept}", highlight=False, soft_wrap=True, markup=False)  # a path in one piece
    if json is not None:
        record = {
            "kind": "view",
            "model": model,
            "pretrained": how.pretrained,
            **subject.told(prompt),
            "plan": chosen.to_dict(),
            "plan_name": name,
            **shrunk_by({name: shown}),
            "photos": facts,
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
            "files": [file.name for file in files],
            "environment": environment(subject.device),
        }
        save(json, record)
    finish(bad)


def _kept(facts: dict[str, Any]) -> str:
    """Say how many tokens of a picture are kept behind the last drop point of each stage, and of a smaller one."""
    from ..report.kept import kept_of

    return "; ".join(
        f"{stage + ': ' if stage else ''}kept {kept} of {total}, {kept / total:.0%}"
        for stage, kept, total in kept_of(facts)
    )
