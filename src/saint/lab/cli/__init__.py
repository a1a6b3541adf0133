"""The command `saint`. Nothing here imports torch: help must be fast."""

import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from ... import __version__
from ...errors import SaintError

COMMANDS = {  # name -> module, in the order in which a person needs them; the function (or group) carries the name
    "demo": "demo",
    "list": "tables",
    "view": "view",
    "chat": "chat",
    "bench": "bench",
    "compare": "compare",
    "check": "check",
    "advise": "advise",
    "tune": "tune",
    "eval": "eval",
    "analyze": "analyze",
    "embed": "embed",
    "export": "export",
    "serve": "serve",
    "report": "report",
    "ui": "ui",
    "env": "tables",
}
PANELS = {  # of the help: which parameters; all others are what a command alone has
    "Model": {"model", "device", "dtype", "pretrained", "size", "threads"},
    "Plan": {"keep", "layers", "pixels", "plan", "plans", "target", "threshold"},
    "Data": {
        "batch",
        "classes",
        "column",
        "image",
        "labels",
        "images",
        "limit",
        "prompt",
        "prompts",
        "question",
        "questions",
        "split",
    },
    "Results": {"folder", "frontier", "journal", "json", "output", "rows"},
}

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # options of the program that is started


class _InOrder(TyperGroup):
    """Lists commands, and groups of them, as ``COMMANDS`` does."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    cls=_InOrder,
    help="SAINT: drop redundant visual tokens, without training, in unmodified models.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"saint {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="show the traceback of an error (or set SAINT_DEBUG=1)"),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
) -> None:
    if debug:
        os.environ["SAINT_DEBUG"] = "1"


def _grouped(command: Callable[..., None]) -> None:
    """Give the options of a command their panels."""
    for name, parameter in inspect.signature(command).parameters.items():
        panel = next((panel for panel, names in PANELS.items() if name in names), "Options")
        for found in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(found, OptionInfo):
                found.rich_help_panel = panel


for _name, _module in COMMANDS.items():
    _command = getattr(import_module(f"{__name__}.{_module}"), _name.replace("list", "list_"))
    for _one in [c.callback for c in _command.registered_commands] if isinstance(_command, typer.Typer) else [_command]:
        assert _one is not None, "typer holds what it was given"
        _grouped(_one)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name, context_settings=_PASSED_ON if _name == "serve" else None)(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command line; an error a user can do something about becomes one line and exit status 2.

    Args:
        args: without the program's name; None means those of the process.
    """
    for stream in (sys.stdout, sys.stderr):  # the console of another encoding must not end a command
        if isinstance(stream, io.TextIOWrapper):
            unicode = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="backslashreplace" if unicode else "replace")
    said = logging.getLogger("torch.utils._pytree")
    said.addFilter(_not_enums)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_rest, **_named: print(f"saint: note: {message}", file=sys.stderr)
        try:
            app(args=args, prog_name="saint")
        except (SaintError, ValueError, OSError) as error:
            if _flag("SAINT_DEBUG"):
                raise
            print(f"saint: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            print("       (saint --debug COMMAND ... shows where)", file=sys.stderr)
            sys.exit(2)
        finally:
            said.removeFilter(_not_enums)


def _not_enums(record: logging.LogRecord) -> bool:
    """Two lines that torchao causes on import (transformers and peft import it), which no setting avoids."""
    return "register_constant() on Enum subclasses" not in record.getMessage()
