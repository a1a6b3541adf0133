"""A try: a forked process in which one module of saint has other code, and some tests."""

import contextlib
import functools
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

from .operators import ROOT, SOURCE

_HEAVY = (
    "pytest", "hypothesis", "numpy", "PIL.Image", "scipy.stats", "sklearn.linear_model", "torch", "torchvision", "timm",
    "open_clip", "transformers", "datasets", "pyarrow", "typer", "rich.console", "starlette.testclient", "onnx",
)  # fmt: skip


def warm() -> None:
    """Import what many tests need, and nothing of ours."""
    for name in _HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("LlavaForConditionalGeneration", "CLIPVisionModel", "Qwen2Config"):
        getattr(transformers, name)


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        if fullname != self.name:
            return None
        folders = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self, submodule_search_locations=folders
        )

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, vars(module))


class _Chosen:
    """A plug-in of pytest: of what is collected only some tests, in a given order; tells the first that fails."""

    def __init__(self, tests: list[str], told: int) -> None:
        self.order = {node: place for place, node in enumerate(tests)}
        self.told, self.ran = told, 0

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        self.ran += report.when == "teardown"
        if report.failed:
            self.tell(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.tell(report.nodeid)

    def tell(self, node: str) -> None:
        os.write(self.told, (json.dumps([node, self.ran]) + "\n").encode())


@dataclass(frozen=True)
class Outcome:
    """How a try ended: "passed", "failed", "slow" (over the limit), or "none" (there are no such tests)."""

    how: str
    by: str  # the first test that failed, or the file that could not be collected
    ran: int  # tests
    seconds: float


def attempt(
    tests: list[str], limit: float, module: str = "", path: Path = ROOT, code: CodeType | None = None
) -> Outcome:
    """Run tests, each named as pytest does, until one fails; with other code for a module if there is some."""
    start = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os._exit(_child(tests, writing, module, path, code))
        finally:
            os._exit(3)  # nothing of the parent's is undone here
    os.close(writing)
    how, told = "", []
    while not how and time.monotonic() < start + limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            how = {0: "passed", 5: "none"}.get(os.waitstatus_to_exitcode(status), "failed")
        else:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what the tests have left running
    if not how:
        os.waitpid(child, 0)
        how = "slow"
    os.set_blocking(reading, False)  # what has left the group may still hold the other end
    with contextlib.suppress(BlockingIOError):
        told = [json.loads(line) for line in os.read(reading, 1 << 20).splitlines()]
    os.close(reading)
    failures = [entry for entry in told if entry[0]]
    by, ran = failures[0] if failures else ("", told[-1][1] if told else 0)
    return Outcome(how, by, ran, time.monotonic() - start)


def _child(tests: list[str], told: int, module: str, path: Path, code: CodeType | None) -> int:
    os.setsid()
    gc.freeze()  # pytest collects garbage twice, and nothing that was there before is any
    if not os.environ.get("MUTANTS_SHOW"):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1), os.dup2(null, 2)
    if code is not None:
        assert module not in sys.modules, "imported before it could be replaced"
        sys.meta_path.insert(0, _Replaced(module, path, code))
    sys.path.insert(0, str(SOURCE.parent))
    os.chdir(ROOT)
    import hypothesis
    import pytest

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # the smallest example is of no interest here
    hypothesis.settings.register_profile("mutants", phases=phases, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    chosen = _Chosen(tests, told)
    files = list(dict.fromkeys(node.partition("::")[0] for node in tests))
    there = [file for file in files if (ROOT / file).exists()]
    if not there:
        return 5
    result = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *there], plugins=[chosen])
    chosen.tell("")
    return int(result)


@functools.cache
def sound(test: str, limit: float = 300) -> bool:
    """Whether a test that has noticed an error passes where there is none. (A file: whether it can be collected.)"""
    return attempt([test], limit).how in ("passed", "none")
