"""`saint advise MODEL`: what to do first, in five lines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import finish, inputs_of, out, progress, save, show

if TYPE_CHECKING:
    from ..sources.listing import Left


@options.model_options()
def advise(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    images: Annotated[Path, typer.Option("--images", help="a folder of images like those that will come, 4 or more")],
    target: Annotated[
        float, typer.Option(help="share of the FLOPs of the whole model that is to be left, in (0, 1)")
    ] = 0.5,
    questions: options.Questions = None,
    prompt: options.Prompt = None,
    limit: Annotated[int, typer.Option(min=4, help="at most so many images, evenly spaced")] = 24,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Say which lever fits MODEL and your images: dropping copies, smaller pictures, pruning, or both.

    Each is run once on the same images at the same share of the FLOPs, and compared with the unpruned model. No search: `saint
    tune` finds a better plan in some minutes.
    """
    from ..kinds import Given, kind_of
    from ..records import environment
    from ..sources.listing import left_facts, printable
    from ..tuning.advice import advise as ask

    kind = kind_of(model)
    kind.check(model, {"--size": how.size, "--questions": questions, "--prompt": prompt})
    left: Left = {}
    items, bad = kind.items(Given(images, questions, prompt), limit, left)
    subject = how.load(kind, model)
    data = inputs_of(subject, items, bad)
    with progress("trying levers", 5 * len(data)) as tick:
        found = ask(subject, data, target, facts={"model": model, "set": printable(images.resolve().name)}, tick=tick)
    record = {
        "kind": "advise",
        **found,
        "pretrained": how.pretrained,
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        "environment": environment(subject.device),
    }
    show(record)
    out.print(
        f"next: saint tune {model} --images {images} --keep {target:g}", highlight=False, markup=False, soft_wrap=True
    )
    if json is not None:
        save(json, record)
    finish(bad, "used")
