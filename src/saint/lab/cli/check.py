"""`saint check MODEL`: run the contracts on a user's model."""

from typing import Annotated

import typer
from rich.table import Table

from . import options
from .common import err, out, save


@options.model_options("size", "dtype", device="cpu")
def check(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Prove that pruning MODEL is correct: identity, exact undo, masked oracle, batch independence, FLOPs, bad input.

    Of a vision-language model: the same over all its stages, and generation.
    """
    from ..kinds import kind_of
    from ..records import environment

    subject = how.load(kind_of(model), model)
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
            "pretrained": how.pretrained,
            "plan": checked.plan.to_dict(),
            "results": [vars(result) for result in checked.results],
            "environment": environment(subject.device),
        }
        save(json, record)
    if any(result.outcome == "failed" for result in checked.results):
        raise typer.Exit(1)
