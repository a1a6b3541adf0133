"""`saint bench MODEL`."""

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import finish, pictures, progress, save, show, warn_busy

if TYPE_CHECKING:
    from ..sources.listing import Left


@options.model_options(dtype="float32")
def bench(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    plan: options.PlanText = None,
    threshold: options.Threshold = None,
    layers: options.Layers = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures per forward")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="rounds before them")] = 3,
    images: options.Images = None,
    json: options.Json = None,
    prompt: options.Prompt = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="vision-language models: tokens generated [default: 32]")
    ] = None,
    *,
    how: options.How,
) -> None:
    """Time MODEL with and without a plan, interleaved, beside what the FLOPs promise.

    The pictures are photographs (or --images), repeated up to the batch: what is dropped depends on them. A vision-language
    model (hf:) generates: time to first token, time per token and cache memory, for --plan or for each mode.
    """
    from ..kinds import kind_of
    from ..loading.plans import changed_plan, read_plan
    from ..records import environment
    from ..sources.listing import left_facts

    kind = kind_of(model)
    kind.check(model, {"--size": how.size, "--prompt": prompt, "--new-tokens": new_tokens})
    left: Left = {}
    photos, bad = pictures(images, batch, left)
    subject = how.load(kind, model)
    plans = subject.plans if plan is None else {plan if "{" not in plan else "plan": read_plan(plan)}
    plans = {name: changed_plan(one, threshold, layers) for name, one in plans.items()}
    used = [photos[i % len(photos)] for i in range(batch)]
    with progress("timing", repeats + warmup) as tick:
        result = subject.bench(
            plans, [photo.image for photo in used], prompt=prompt, new_tokens=new_tokens, repeats=repeats, warmup=warmup,
            tick=tick,
        )  # fmt: skip
    record = {
        "kind": result.kind,
        "model": model,
        "pretrained": how.pretrained,
        **subject.told(prompt),
        "images": [photo.name for photo in used],
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
