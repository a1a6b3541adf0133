"""`saint check MODEL`: run the contracts on a user's model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ...plans import Plan
    from ...testing import Result


def check(
    model: Annotated[str, typer.Argument(help="timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME")],
    device: Annotated[str, typer.Option(help="where to run")] = "cpu",
    pretrained: Annotated[bool, typer.Option(help="--no-pretrained: random weights, no download")] = True,
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input.

    Of a vision-language model: the same over all its stages, and generation.
    """
    from ..kinds import kind_of

    console = Console()
    kind = kind_of(model)
    with console.status(f"loading {model}"):
        subject = kind.load(model, device, pretrained)
    with console.status("checking"):
        checked = subject.contracts()
    console.print(f"{model}: {checked.about}")
    _report(console, model, checked.plan, checked.results, json)


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
