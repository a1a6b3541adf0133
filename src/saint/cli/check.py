"""`saint check MODEL`: run the contracts on a user's model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def check(
    model: Annotated[str, typer.Argument(help="timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME")],
    device: Annotated[str, typer.Option(help="where to run")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input."""
    from .. import testing
    from ..loading import load_model
    from ..records import environment, write_json
    from ..vision.locate import locate

    console = Console()
    with console.status(f"loading {model}"):
        loaded = load_model(model, device=device)
    path, encoder, row = locate(loaded.model)
    console.print(f"{model}: {type(encoder).__name__} ({row.library}: {row.title})" + (f" at {path}" if path else ""))
    with console.status("checking"):
        inputs = testing.example_inputs(loaded.model)
        plan = testing.example_plan(loaded.model, inputs)
        results = testing.check_model(loaded.model, plan, inputs)
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
