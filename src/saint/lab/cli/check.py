"""`saint check MODEL`: run the contracts on a user's model."""

from typing import Annotated

import typer
from rich.table import Table

from .common import MODEL_HELP, Device, Json, Pretrained, Threads, err, load, out, save


def check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    device: Device = "cpu",
    threads: Threads = None,
    pretrained: Pretrained = True,
    json: Json = None,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input.

    Of a vision-language model: the same over all its stages, and generation.
    """
    from ..kinds import kind_of
    from ..records import environment

    subject = load(kind_of(model), model, device, threads=threads, pretrained=pretrained)
    with err.status("checking"):
        checked = subject.contracts()
    out.print(f"{model}: {checked.about}", highlight=False)
    table = Table("contract", "outcome", "detail")
    for result in checked.results:
        style = {"passed": "green", "failed": "bold red"}.get(result.outcome, "yellow")
        table.add_row(result.contract, f"[{style}]{result.outcome}[/]", result.detail)
    out.print(table)
    if json is not None:
        record = {
            "kind": "check",
            "model": model,
            "pretrained": pretrained,
            "plan": checked.plan.to_dict(),
            "results": [vars(result) for result in checked.results],
            "environment": environment(subject.device),
        }
        save(json, record)
    if any(result.outcome == "failed" for result in checked.results):
        raise typer.Exit(1)
