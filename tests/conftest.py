import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from saint import admission

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("support")
pytest_plugins = [
    f"support.{room}" for room in ("command_line", "checkpoints", "packages", "records")
]  # their fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew (make golden)")


class _Deprecated(logging.Handler):
    """transformers says some deprecations by its logger, once: an error where our own call is the reason."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" not in message:
            return
        frame = sys._getframe()
        while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
            __name__,
            "conftest",
            "logging",
            "transformers",
            "functools",
        ):
            frame = frame.f_back
        caller = "" if frame is None else frame.f_globals.get("__name__", "")
        if caller.split(".")[0] == "saint" or "test" in caller:
            raise FutureWarning(f"{caller}: {message}")


@pytest.fixture(autouse=True, scope="session")
def _deprecations_are_errors() -> None:
    logging.getLogger("transformers").addHandler(_Deprecated())


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_remembered_for_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test proves of a model stays out of the user's cache, and what was proved there out of the tests."""
    own = tmp_path_factory.mktemp("cache") / "admitted.json"
    with mock.patch.object(admission, "_file", return_value=own):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
