"""`saint bench MODEL`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .common import (
    MODEL_HELP,
    Device,
    Image,
    Json,
    Layers,
    PlanText,
    Pretrained,
    Size,
    Threads,
    Threshold,
    describe,
    err,
    finish,
    load,
    make_plan,
    out,
    pictures,
    progress,
)

if TYPE_CHECKING:
    from ..bench import EncoderBench, Spread


def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    plan: PlanText = None,
    threshold: Threshold = None,
    layers: Layers = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures per forward")] = 1,
    size: Size = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="rounds before them")] = 3,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    image: Image = None,
    pretrained: Pretrained = True,
    json: Json = None,
) -> None:
    """Time MODEL with and without a plan, interleaved, beside what the FLOPs promise.

    The pictures are photographs (or --image), repeated up to the batch: what is dropped depends on them.
    """
    import torch

    from ..bench import bench_encoder
    from ..records import environment, write_json

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    photos, bad = pictures(image, batch)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    loaded.model.to(dtypes[dtype])
    chosen = make_plan(loaded.plan, plan, threshold, layers)
    used = [photos[i % len(photos)] for i in range(batch)]
    inputs = loaded.inputs([photo.image for photo in used])
    with progress("timing", repeats + warmup) as tick:
        result = bench_encoder(loaded.model, chosen, inputs, repeats, warmup, tick=tick)

    conditions = result.conditions
    out.print(f"[bold]{loaded.title}[/]  {describe(chosen)}", highlight=False)
    out.print(
        f"batch {conditions['batch']}, {' x '.join(map(str, loaded.image_size))} px, {conditions['dtype']}, "
        f"{conditions['device']}, {conditions['threads']} threads, {repeats} rounds\n",
        highlight=False,
    )
    print_tokens(result)
    print_times(result)
    if json is not None:
        facts = {
            "kind": "bench/encoder",
            "model": model,
            "pretrained": pretrained,
            "image_size": loaded.image_size,
            "images": [photo.name for photo in used],
            "skipped": [list(entry) for entry in bad],
            **result.to_dict(),
            "environment": environment(loaded.device),
        }
        write_json(json, facts)
        err.print(f"wrote {json}", highlight=False)
    finish(bad)


def print_tokens(result: "EncoderBench") -> None:
    """Tokens per drop point."""
    table = Table("layer", "tokens in", "tokens out", "padded to", title="tokens (batch mean)", title_justify="left")
    for layer in result.layers:
        table.add_row(str(layer.layer), f"{layer.tokens_in:.1f}", f"{layer.tokens_out:.1f}", str(layer.slots))
    out.print(table)


def print_times(result: "EncoderBench") -> None:
    """Times, FLOPs and memory of all variants, and what pruning itself costs."""
    table = Table("", "ms (median)", "p20 - p80", "GFLOPs", "activations MiB", title="forward", title_justify="left")
    rows = {"base": result.base, "pruned": result.pruned, "eager": result.eager}
    names = {"base": "unpruned", "pruned": "pruned", "eager": "pruned, eager attention"}
    for key, spread in rows.items():
        if spread is not None:
            cost = result.costs[key]
            table.add_row(
                names[key],
                f"{spread.median:.2f}",
                f"{spread.p20:.2f} - {spread.p80:.2f}",
                f"{cost.flops / 1e9:.3f}",
                f"{cost.memory:.1f}",
            )
    out.print(table)
    speedup = result.speedup
    out.print(
        f"speed-up [bold]{speedup.median:.3f}x[/] (p20 {speedup.p20:.3f}, p80 {speedup.p80:.3f}); "
        f"FLOPs bound {result.bound:.3f}x; efficiency {result.efficiency:.3f}",
        highlight=False,
    )
    if result.overhead is not None:
        cost = result.overhead
        out.print(
            f"pruning itself: scoring {cost.scoring.median:.2f} ms, gathering {cost.gathering.median:.2f} ms, "
            f"together {_percent(cost.share)} of the unpruned forward",
            highlight=False,
        )
        if cost.keep_all is not None:
            out.print(f"the same plan when nothing goes: {_percent(cost.keep_all)} extra time", highlight=False)
    unknown = sorted({name for cost in result.costs.values() for name in cost.uncounted})
    if unknown:
        out.print(f"[yellow]not counted in the FLOPs[/]: {', '.join(unknown)}", highlight=False)


def _percent(spread: "Spread") -> str:
    return f"{spread.median:.2%} (p20 {spread.p20:.2%}, p80 {spread.p80:.2%})"
