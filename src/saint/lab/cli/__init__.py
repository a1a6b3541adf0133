"""The command `saint`. Nothing here imports torch: help must be fast."""

import io
import logging
import os
import sys
import warnings
from importlib import import_module

import typer

from ...errors import SaintError

COMMANDS = {  # name -> module; the function (or group of commands) carries the name
    "demo": "demo",
    "check": "check",
    "bench": "bench",
    "eval": "eval",
    "chat": "chat",
    "view": "view",
    "analyze": "analyze",
    "tune": "tune",
    "export": "export",
    "embed": "embed",
    "report": "report",
    "ui": "ui",
    "serve": "serve",
    "list": "tables",
    "env": "tables",
}

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # options of the program that is started

app = typer.Typer(
    help="SAINT: drop redundant visual tokens, without training, in unmodified models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="show the traceback of an error (or set SAINT_DEBUG=1)"),
) -> None:
    if debug:
        os.environ["SAINT_DEBUG"] = "1"


for _name, _module in COMMANDS.items():
    _command = getattr(import_module(f"{__name__}.{_module}"), _name.replace("list", "list_"))
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
