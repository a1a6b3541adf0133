"""`saint check MODEL`: run the contracts on a user's model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ...plans import Plan
    from ...testing import Result
    from ..loading.vlm import LoadedVLM


def check(
    model: Annotated[str, typer.Argument(help="timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME")],
    device: Annotated[str, typer.Option(help="where to run")] = "cpu",
    pretrained: Annotated[bool, typer.Option(help="--no-pretrained: random weights, no download")] = True,
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input.

    Of a vision-language model: the same over all its stages, and generation.
    """
    from ... import testing
    from ...methods.saint import Saint
    from ...session import pruned
    from ...testing.vlm import check_vlm, hybrid_plan
    from ...vision.locate import locate
    from ...vlm.locate import locate as locate_vlm
    from ..loading import load_model
    from ..loading.vlm import is_vlm, load_vlm

    console = Console()
    if is_vlm(model):
        with console.status(f"loading {model}"):
            vlm = load_vlm(model, device=device, pretrained=pretrained)
        path, module, family = locate_vlm(vlm.model, "language")
        console.print(f"{model}: {type(module).__name__} (transformers: {family.title})")
        with console.status("checking"):
            plan = hybrid_plan(vlm.model)
            results = check_vlm(vlm.model, partial(_samples, vlm), plan)
        _report(console, model, plan, results, json)
        return
    with console.status(f"loading {model}"):
        loaded = load_model(model, device=device, pretrained=pretrained)
    path, encoder, spec = locate(loaded.model)
    console.print(f"{model}: {type(encoder).__name__} ({spec.library}: {spec.title})" + (f" at {path}" if path else ""))
    with console.status("checking"):
        target = loaded.model
        inputs = testing.example_inputs(target)
        try:
            with pruned(target, Saint(budget=0.75)):
                testing.run(target, inputs)
        except ValueError as error:  # a head that needs the full grid
            if target is encoder:
                raise
            console.print(f"checking the encoder alone: {error}")
            target = encoder
            inputs = testing.example_inputs(target)
        plan = testing.example_plan(target, inputs)
        results = testing.check_model(target, plan, inputs)
    _report(console, model, plan, results, json)


def _samples(vlm: "LoadedVLM", which: Sequence[int]) -> dict[str, Any]:
    """Two pictures with questions of different length."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (336, 336, 3), dtype=np.uint8) for _ in range(2)]
    noise[1][:168] = noise[1][:168] // 16 + 100  # half of it is calm
    questions = ("What is in the picture?", "Which of the two halves of the picture is calm, and which one is not?")
    return vlm.inputs([questions[i] for i in which], [Image.fromarray(noise[i]) for i in which])


def _report(console: Console, model: str, plan: "Plan", results: "Sequence[Result]", json: Path | None) -> None:
    from ..records import environment, write_json

    table = Table("contract", "outcome", "detail")
    for result in results:
        style = {"passed": "green", "failed": "bold red"}.get(result.outcome, "yellow")
        table.add_row(result.contract, f"[{style}]{result.outcome}[/]", result.detail)
    console.print(table)
    if json is not None:
        write_json(
            json,
            {
                "model": model,
                "plan": plan.to_dict(),
                "results": [vars(result) for result in results],
                "environment": environment(),
            },
        )
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)
