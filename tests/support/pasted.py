"""Blocks of code run one after the other in one namespace that is empty at first, as a reader would paste them.

``run`` does it in a fresh interpreter, which runs this file.
"""

import json
import linecache
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

NO_WEIGHTS = 3  # exit status: a demo model's weights cannot be had
SOURCE = Path(__file__).parents[2] / "src"


def run(blocks: Sequence[tuple[str, str]], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run blocks of code in a fresh interpreter without a hub, one after the other, and return what they print.

    Args:
        blocks: the name and the code of each.
        folder: where they run.
        environment: further variables.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning:saint", __file__],
        input=json.dumps(blocks),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", **(environment or {})},
    )
    if done.returncode == NO_WEIGHTS:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Run the blocks that come in as JSON; no model may be left with a plan on it."""
    scope: dict[str, object] = {"__name__": "__main__"}
    for name, code in json.load(sys.stdin):
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # tracebacks show the line
        try:
            exec(compile(code, name, "exec"), scope)
        except Exception as error:
            if type(error).__name__ == "DemoUnavailableError":
                print(error, file=sys.stderr)
                raise SystemExit(NO_WEIGHTS) from error
            traceback.print_exc()
            raise SystemExit(1) from error
    import torch

    import saint

    left = [name for name, value in scope.items() if isinstance(value, torch.nn.Module) and saint.status(value)]
    assert not left, f"a plan is left on {left}"


if __name__ == "__main__":
    main()
