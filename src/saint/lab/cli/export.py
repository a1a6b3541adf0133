"""`saint export`: MODEL under a plan as a file for other runtimes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import options
from .common import doing, err, finish, inputs_of, out, progress, save

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...plans import Plan
    from ..kinds import Subject
    from ..sources.listing import Left


@options.model_options("device", "dtype", device="cpu")
def export(
    model: Annotated[str, typer.Argument(help=f"{options.MODEL_HELP}; of a vision-language model its tower")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.onnx, FILE.pt2, or a folder for OpenVINO")],
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="a folder of images, on which a plan by votes is frozen first")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many images, evenly spaced")] = 96,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Write MODEL under a plan as ONNX, as a program of torch.export, or for OpenVINO: one file for batches of any size.

    A plan by votes is frozen on --images: one number of tokens per layer. The file is run and compared with the patched model
    before it is kept, and holds the plan.
    """
    from ...backends.export import export as write
    from ...backends.export import format_of
    from ...freezing import freeze
    from ..describe import describe
    from ..kinds import Given, kind_of
    from ..loading.plans import HALF, choose
    from ..records import environment
    from ..sources.items import Item
    from ..sources.listing import left_facts

    format_of(output)
    choice = choose(plan, keep, pixels) or HALF
    kind = kind_of(model)
    kind.check(model, {"--size": how.size})
    left: Left = {}
    items, bad = ([], []) if images is None else kind.items(Given(images), limit, left)
    subject = how.load(kind, model)
    chosen = subject.exported(choice)
    data = inputs_of(subject, items, bad)
    counted = len(data)
    if data:
        with progress("counting tokens", 1):
            chosen = freeze(chosen, subject.model, data)
    else:
        noise = _noise()
        data = [subject.inputs([Item.photo("noise", noise, "?")], [noise])]
    with doing(f"exporting {model}"):
        written = write(subject.model, chosen, output, subject.seen(data[0]))
    out.print(f"[bold]{model}[/]  {escape(choice.name)}: {escape(describe(chosen))}", highlight=False, soft_wrap=True)
    out.print(
        f"{written.format}, {written.size / 2**20:.1f} MiB; {', '.join(written.inputs)} -> {', '.join(written.outputs)}; "
        f"largest difference from the patched model {written.error:.1g}",
        highlight=False,
        soft_wrap=True,
    )
    kept = _kept(subject, chosen, data[0])
    out.print(kept["words"], highlight=False, soft_wrap=True)
    err.print(f"wrote {output}", highlight=False)
    if json is not None:
        facts = {
            "model": model,
            "pretrained": how.pretrained,
            "size": how.size,
            "plan": chosen.to_dict(),
            "plan_name": choice.name,
            "counted_on": counted,
            "kept": kept["kept"],
            "flops_left": kept["flops_left"],
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
        }
        file = {"format": written.format, "inputs": written.inputs, "outputs": written.outputs, "bytes": written.size}
        record = {"kind": "export", **facts, **file, "error": written.error, "environment": environment("cpu")}
        save(json, record)
    finish(bad, "used")


def _kept(subject: "Subject", plan: "Plan", inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the share of the tokens that is kept, of an encoder also that of its FLOPs which is left, and both in words."""
    import torch

    from ...session import pruned
    from ..bench import count_pictures

    if subject.counts:
        (count,) = count_pictures(subject.model, plan, [inputs])
        total, kept, flops = count.tokens, count.kept, count.share
    else:
        with pruned(subject.model, plan) as session, torch.inference_mode():
            subject.model(**inputs)
            trace = session.trace
        ends = (trace[0].tokens_in, trace[-1].tokens_out) if trace else (torch.zeros(1), torch.zeros(1))
        total, kept, flops = int(ends[0].sum()), int(ends[1].sum()), None
    words = f"{kept} of {total} tokens kept" if total else "every token kept"
    words += "" if flops is None else f", {flops:.0%} of the work (FLOPs) left"
    return {"kept": kept / total if total else 1.0, "flops_left": flops, "words": words}


def _noise() -> "Image":
    """A picture to try the file on, where none is given."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
