"""`saint serve`: vLLM's server, with pruned pictures."""

import json
import os
import sys
from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="NAME_OR_PATH of a vision-language model, with hf: in front or without")],
    plan: Annotated[str | None, typer.Option("--plan", help="a recipe's name, JSON, or a .json file")] = None,
) -> None:
    """Start vLLM's OpenAI-compatible server; pictures enter the language model with fewer tokens.

    All other options are vLLM's.

    Without --plan only requests prune that ask for it, which vLLM takes with --trust-request-mm-kwargs.
    """
    from ...backends.vllm import budget, names
    from ...extras import require
    from ...plans import Plan

    kind, colon, rest = model.partition(":")
    if colon and kind in ("timm", "open_clip", "demo"):
        raise ValueError(f"saint serve takes hf:NAME_OR_PATH, or without hf:, of a vision-language model, got {model}")
    model = rest if kind == "hf" and colon else model
    environment = dict(os.environ)
    environment.pop(budget.VARIABLE, None)
    if plan is not None:
        chosen = Plan.load(plan)
        budget.of_plan(chosen)  # refused here, not in the middle of vLLM's start
        environment[budget.VARIABLE] = json.dumps(chosen.to_dict())
    require("vllm", "vllm")
    names.verify()
    names.check_allowed(environment)
    if plan is not None:
        names.check_model(model, vision=bool(chosen.vision))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *names.server(model), *context.args], environment)
