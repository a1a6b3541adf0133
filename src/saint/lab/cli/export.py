"""`saint export`: MODEL under a plan as a file for other runtimes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .asked import finish_asked, gather, load_subject
from .common import MODEL_HELP, Json, PlanText, Pretrained, Size, Threads, describe, err, out, progress, save

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..loading.listing import Left


def export(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; of a vision-language model its tower")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.onnx, FILE.pt2, or a folder for OpenVINO")],
    plan: PlanText = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="a folder of images, on which a plan by votes is frozen first")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many images, evenly spaced")] = 96,
    size: Size = None,
    threads: Threads = None,
    pretrained: Pretrained = True,
    json: Json = None,
) -> None:
    """Write MODEL under a plan as ONNX, as a program of torch.export, or for OpenVINO: one file for batches of any size.

    A plan by votes is frozen on --images: one number of tokens per layer. The file is run and compared with the patched model
    before it is kept, and holds the plan.
    """
    from ...backends.export import export as write
    from ...backends.export import format_of
    from ...freezing import freeze
    from ..images import reason
    from ..loading.listing import left_facts
    from ..loading.plans import read_plan
    from ..loading.vlm import is_vlm
    from ..records import environment

    format_of(output)
    generates = is_vlm(model)
    left: Left = {}
    items, bad = ([], []) if images is None else gather(images, None, None, limit, left)
    subject = load_subject(
        model, "cpu", generates=generates, size=size, threads=threads, pretrained=pretrained, dtype=None
    )
    if plan is None and subject.plan is None:
        raise ValueError("a vision-language model has no plan of its own for its tower: give --plan")
    chosen = subject.plan if plan is None else read_plan(plan)
    data: list[dict[str, Any]] = []
    for item in items:
        try:
            data.append(dict(subject.inputs(item, item.load())))
        except (OSError, ValueError) as error:
            bad.append((item.where, reason(error)))
    counted = len(data)
    if data:
        with progress("counting tokens", 1):
            chosen = freeze(chosen, subject.model, data)
    else:
        data = [dict(subject.loaded.inputs(["?"], [_noise()]) if generates else subject.loaded.inputs([_noise()]))]
    example = {"pixel_values": data[0]["pixel_values"]} if generates else data[0]
    with err.status(f"exporting {model}"):
        written = write(subject.model, chosen, output, example)
    out.print(f"[bold]{model}[/]  {describe(chosen)}", highlight=False, soft_wrap=True)
    out.print(
        f"{written.format}, {written.size / 2**20:.1f} MiB; {', '.join(written.inputs)} -> {', '.join(written.outputs)}; "
        f"largest difference from the patched model {written.error:.1g}",
        highlight=False,
        soft_wrap=True,
    )
    err.print(f"wrote {output}", highlight=False)
    if json is not None:
        facts = {
            "model": model,
            "pretrained": pretrained,
            "size": size,
            "plan": chosen.to_dict(),
            "counted_on": counted,
            "skipped": [list(entry) for entry in bad],
            "left_out": left_facts(left),
        }
        file = {"format": written.format, "inputs": written.inputs, "outputs": written.outputs, "bytes": written.size}
        record = {"kind": "export", **facts, **file, "error": written.error, "environment": environment("cpu")}
        save(json, record)
    finish_asked(bad, "used")


def _noise() -> "Image":
    """A picture to try the file on, where none is given."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
