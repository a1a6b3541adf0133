"""`saint bench MODEL`."""

from typing import TYPE_CHECKING, Annotated, Any

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
    dtype_of,
    finish,
    load,
    load_generator,
    make_plan,
    out,
    pictures,
    progress,
    save,
    warn_busy,
)

if TYPE_CHECKING:
    from ..bench import EncoderBench, GenerationBench, Spread
    from ..loading.listing import Left


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
    prompt: Annotated[str, typer.Option(help="vision-language models: the question")] = "Describe the image.",
    new_tokens: Annotated[int, typer.Option(min=1, help="vision-language models: tokens generated")] = 32,
) -> None:
    """Time MODEL with and without a plan, interleaved, beside what the FLOPs promise.

    The pictures are photographs (or --image), repeated up to the batch: what is dropped depends on them. A vision-language
    model (hf:) generates: time to first token, time per token and cache memory, for --plan or for each mode.
    """
    from ..bench import bench_encoder
    from ..loading.listing import left_facts
    from ..loading.vlm import is_vlm
    from ..records import environment

    number = dtype_of(dtype)
    if is_vlm(model):
        if size is not None or threshold is not None or layers is not None:
            raise ValueError("--size, --threshold and --layers are for encoders; give a vision-language model a --plan")
        _generation(
            model, plan, batch, repeats, warmup, threads, device, number, image, pretrained, json, prompt, new_tokens
        )
        return
    left: Left = {}
    photos, bad = pictures(image, batch, left)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    loaded.model.to(number)
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
    warn_busy(conditions["load_average"], {"unpruned": result.base, "pruned": result.pruned})
    if json is not None:
        facts = {
            "kind": "bench/encoder",
            "model": model,
            "pretrained": pretrained,
            "image_size": loaded.image_size,
            "images": [photo.name for photo in used],
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
            **result.to_dict(),
            "environment": environment(loaded.device),
        }
        save(json, facts)
    finish(bad)


def print_tokens(result: "EncoderBench") -> None:
    """Tokens per drop point."""
    table = Table("layer", "tokens in", "tokens out", "padded to", title="tokens (batch mean)", title_justify="left")
    for layer in result.layers:
        table.add_row(
            "input" if layer.placement == "input" else str(layer.layer),
            f"{layer.tokens_in:.1f}",
            f"{layer.tokens_out:.1f}",
            str(layer.slots),
        )
    out.print(table)


def print_times(result: "EncoderBench") -> None:
    """Times, FLOPs and memory of all variants, and what pruning itself costs."""
    from ...flops import left_out

    table = Table("", "ms (median)", "p20 - p80", "GFLOPs", "activations MiB", title="forward", title_justify="left")
    table.caption = _missing(left_out(*(cost.uncounted for cost in result.costs.values())))
    spreads = {"base": result.base, "pruned": result.pruned, "eager": result.eager}
    names = {"base": "unpruned", "pruned": "pruned", "eager": "eager attention"}
    for key, spread in spreads.items():
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
        f"FLOPs bound {result.bound:.3f}x{left_out(result.uncounted)}; efficiency {result.efficiency:.3f}",
        highlight=False,
    )
    if result.overhead is not None:
        own = result.overhead
        out.print(
            f"pruning itself: scoring {own.scoring.median:.2f} ms, gathering {own.gathering.median:.2f} ms, "
            f"together {_percent(own.share)} of the unpruned forward",
            highlight=False,
        )
        if own.keep_all is not None:
            out.print(f"the same plan when nothing goes: {_percent(own.keep_all)} extra time", highlight=False)


def _generation(
    model: str,
    plan: str | None,
    batch: int,
    repeats: int,
    warmup: int,
    threads: int | None,
    device: str,
    dtype: Any,
    image: Any,
    pretrained: bool,
    json: Any,
    prompt: str,
    new_tokens: int,
) -> None:
    from ...plans import Plan
    from ..bench import bench_generation
    from ..loading.listing import left_facts
    from ..loading.modes import modes
    from ..records import environment

    left: Left = {}
    photos, bad = pictures(image, batch, left)
    plans = modes if plan is None else {plan if "{" not in plan else "plan": make_plan(Plan(), plan, None, None)}
    loaded = load_generator(model, device, threads=threads, pretrained=pretrained, dtype=dtype)
    if callable(plans):
        plans = plans(loaded.model)
    used = [photos[i % len(photos)] for i in range(batch)]
    inputs = loaded.inputs([prompt] * batch, [photo.image for photo in used])
    with progress("timing", repeats + warmup) as tick:
        result = bench_generation(loaded.model, plans, inputs, new_tokens, repeats, warmup, tick=tick)
    conditions = result.conditions
    out.print(f"[bold]{model}[/]", highlight=False)
    out.print(
        f"batch {batch}, {conditions['prompt_tokens']} prompt tokens, {new_tokens} new, {conditions['dtype']}, "
        f"{conditions['device']}, {conditions['threads']} threads, {repeats} rounds\n",
        highlight=False,
    )
    print_generation(result)
    firsts = {"unpruned" if name == "base" else name: times.first for name, times in result.times.items()}
    warn_busy(conditions["load_average"], firsts)
    if json is not None:
        facts = {
            "kind": "bench/generation",
            "model": model,
            "pretrained": pretrained,
            "prompt": prompt,
            "images": [photo.name for photo in used],
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
            **result.to_dict(),
            "environment": environment(loaded.device),
        }
        save(json, facts)
    finish(bad)


def print_generation(result: "GenerationBench") -> None:
    """Times, memory and FLOPs of all variants, then each plan against the unpruned model."""
    from ...flops import left_out

    table = Table("", "first token ms", "ms per token", "total ms", "tokens/s", "KV MiB", "prefill GFLOPs")
    table.caption = _missing(left_out(*(times.prefill.uncounted for times in result.times.values())))
    for name, times in result.times.items():
        cells = [times.first, times.per_token, times.total, times.tokens_per_second]
        shown = [f"{s.median:.2f} ({s.p20:.2f} - {s.p80:.2f})" if s is not None else "-" for s in cells]
        kv = f"{times.kv_bytes / 2**20:.2f}"
        table.add_row("unpruned" if name == "base" else name, *shown, kv, f"{times.prefill.flops / 1e9:.3f}")
    out.print(table)
    for name, gain in result.gains.items():
        decode = f"; decode takes {gain.decode.median:.3f}x the time" if gain.decode is not None else ""
        out.print(
            f"{name}: first token [bold]{gain.first.median:.3f}x[/] (p20 {gain.first.p20:.3f}, p80 {gain.first.p80:.3f}), FLOPs "
            f"bound {gain.bound:.3f}x{left_out(gain.uncounted)}, "
            f"efficiency {gain.efficiency:.3f}; end to end {gain.total.median:.3f}x{decode}; "
            f"KV {gain.kv:.0%}",
            highlight=False,
        )


def _missing(text: str) -> str | None:
    """Under a table with FLOPs in it."""
    return f"FLOPs{text}" if text else None


def _percent(spread: "Spread") -> str:
    return f"{spread.median:.2%} (p20 {spread.p20:.2%}, p80 {spread.p80:.2%})"
