"""`saint check MODEL`: run the contracts on a user's model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def check(
    model: Annotated[str, typer.Argument(help="timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME")],
    device: Annotated[str, typer.Option(help="where to run")] = "cpu",
    pretrained: Annotated[bool, typer.Option(help="--no-pretrained: random weights, no download")] = True,
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input."""
    from .. import testing
    from ..loading import load_model
    from ..methods.saint import Saint
    from ..records import environment, write_json
    from ..session import pruned
    from ..vision.locate import locate

    console = Console()
    with console.status(f"loading {model}"):
        loaded = load_model(model, device=device, pretrained=pretrained)
    path, encoder, row = locate(loaded.model)
    console.print(f"{model}: {type(encoder).__name__} ({row.library}: {row.title})" + (f" at {path}" if path else ""))
    with console.status("checking"):
        target = loaded.model
        inputs = testing.example_inputs(target)
        try:
            with pruned(target, Saint(budget=0.75)):
                testing.run(target, inputs)
        except ValueError as error:  # a head that needs the whole grid
            if target is encoder:
                raise
            console.print(f"checking the encoder alone: {error}")
            target = encoder
            inputs = testing.example_inputs(target)
        plan = testing.example_plan(target, inputs)
        results = testing.check_model(target, plan, inputs)
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
