"""`saint bench MODEL`."""

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import Asked, finish, pictures, progress, save, show, warn_busy

if TYPE_CHECKING:
    from ..sources.listing import Left


@options.model_options(dtype="float32")
def bench(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    threshold: options.Threshold = None,
    layers: options.Layers = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures per forward")] = 1,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="timed rounds [default: 20; 5 where a round is several pictures]")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="rounds before them")] = 3,
    images: options.Images = None,
    limit: options.Limit = 50,
    json: options.Json = None,
    prompt: options.Prompt = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="vision-language models: tokens generated [default: 32]")
    ] = None,
    *,
    how: options.How,
) -> None:
    """Time MODEL with and without a plan, interleaved, beside what the FLOPs promise.

    What is kept is counted over all pictures (--images, or photographs that are there anyway). Timed is one of them where every
    picture keeps the same number of tokens, else some that stand for all; with --batch the first ones, together. A
    vision-language model generates: time to first token, time per token and cache memory, for --plan, or for half of the work
    and for each mode (what goes in front of the language model, inside it, inside the tower, or both).
    """
    from ..kinds import kind_of
    from ..records import environment
    from ..sources.listing import left_facts

    asked = Asked.read(plan, keep, threshold, layers, pixels)
    kind = kind_of(model)
    kind.check(model, {"--size": how.size, "--prompt": prompt, "--new-tokens": new_tokens})
    left: Left = {}
    photos, bad = pictures(images, max(limit, batch), left)
    subject = how.load(kind, model)
    plans = dict([asked.of(subject)]) | (subject.modes if asked.open else {})
    steps = warmup + (repeats or 20) + (len(photos) if subject.counts else 0)
    with progress("counting and timing" if subject.counts else "timing", steps) as tick:
        result = subject.bench(
            plans, [photo.image for photo in photos], prompt=prompt, new_tokens=new_tokens, repeats=repeats, warmup=warmup,
            batch=batch, tick=tick,
        )  # fmt: skip
    record = {
        "kind": result.kind,
        "model": model,
        "pretrained": how.pretrained,
        **subject.told(prompt),
        "plan_name": next(iter(plans)),
        "images": [photos[i].name for i in result.timed_of(len(photos))],
        "counted": [photo.name for photo in photos] if subject.counts else None,
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        **result.to_dict(),
        "environment": environment(subject.device),
    }
    show(record)
    warn_busy(result.conditions["load_average"], result.spreads)
    if json is not None:
        save(json, record)
    finish(bad)
