"""`saint check MODEL`: run the contracts on a user's model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import out, progress, save, table

if TYPE_CHECKING:
    from ...testing import Result

ABOUT = {  # what each contract holds a pruned model to
    "identity": "a plan that keeps everything changes nothing",
    "exact undo": "removed, the model is what it was",
    "masked oracle": "dropped tokens might as well have been hidden from attention",
    "generation": "greedy tokens are those of the masked oracle",
    "removal oracle": "what goes in front of the language model might as well not have been there",
    "static cache": "a cache of fixed length gives the same tokens",
    "small twin": "what was proved of its class, with random weights: no facts about it are written",
    "batch independence": "a picture's result does not depend on the others",
    "answer independence": "nor do the new tokens of an answer",
    "really on": "tokens go, and the work shrinks with them",
    "bad input": "what cannot work is refused, and nothing is left behind",
}


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

    kind = kind_of(model)
    subject = how.load(kind, model)
    with progress("checking", len(kind.checks)) as tick:
        checked = subject.contracts(tick)
    out.print(f"{model}: {checked.about}", highlight=False, markup=False)
    rows = [[r.contract, r.outcome, r.detail, ABOUT.get(r.contract, "")] for r in checked.results]
    table(["contract", "outcome", "detail", "what it means"], rows, numbers=False)
    out.print(_verdict(checked.results), highlight=False)
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


def _verdict(results: "Sequence[Result]") -> str:
    """Say in a sentence what came of it."""
    failed = [r.contract for r in results if r.outcome == "failed"]
    skipped = [r.contract for r in results if r.outcome == "skipped"]
    if failed:
        return f"[bold red]{', '.join(failed)} failed: do not trust pruning on this model[/]"
    held = len(results) - len(skipped)
    if skipped:
        return (
            f"[yellow]{held} of {len(results)} hold, and {', '.join(skipped)} could not be looked at on this model[/]"
        )
    return f"[green]all {held} hold: pruning is right on this model[/]"
