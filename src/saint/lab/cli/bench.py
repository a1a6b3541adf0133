"""`saint bench MODEL`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..describe import describe
from .common import (
    MODEL_HELP,
    Device,
    Images,
    Json,
    Layers,
    PlanText,
    Pretrained,
    Prompt,
    Size,
    Threads,
    Threshold,
    dtype_of,
    finish,
    load,
    out,
    pictures,
    progress,
    save,
    warn_busy,
)

if TYPE_CHECKING:
    from ..bench import ForwardBench, GenerationBench, Spread
    from ..sources.listing import Left


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
    images: Images = None,
    pretrained: Pretrained = True,
    json: Json = None,
    prompt: Prompt = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="vision-language models: tokens generated [default: 32]")
    ] = None,
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
    kind.check(model, {"--size": size, "--prompt": prompt, "--new-tokens": new_tokens})
    left: Left = {}
    photos, bad = pictures(images, batch, left)
    subject = load(kind, model, device, size=size, threads=threads, pretrained=pretrained, dtype=dtype_of(dtype))
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
        "pretrained": pretrained,
        **subject.told(prompt),
        "images": [photo.name for photo in used],
        "skipped": [list(entry) for entry in bad],
        "left_out": left_facts(left),
        **result.to_dict(),
        "environment": environment(subject.device),
    }
    print_bench(subject.title, record, result)
    warn_busy(result.conditions["load_average"], result.spreads)
    if json is not None:
        save(json, record)
    finish(bad)


def print_bench(title: str, record: dict[str, Any], result: Any) -> None:
    """What ran, under which conditions, and what came out."""
    c = result.conditions
    about = f"[bold]{title}[/]"
    size = f"{' x '.join(map(str, record['image_size']))} px, " if "image_size" in record else ""
    prompt = f"{c['prompt_tokens']} prompt tokens, {c['new_tokens']} new, " if "prompt_tokens" in c else ""
    if "plan" in record:
        about += f"  {describe(result.plan)}"
    out.print(about, highlight=False)
    out.print(
        f"batch {c['batch']}, {size}{prompt}{c['dtype']}, {c['device']}, {c['threads']} threads, {c['repeats']} rounds\n",
        highlight=False,
    )
    if "plan" in record:
        print_tokens(result)
        print_times(result)
    else:
        print_generation(result)


def print_tokens(result: "ForwardBench") -> None:
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


def print_times(result: "ForwardBench") -> None:
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
