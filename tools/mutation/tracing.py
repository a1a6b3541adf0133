"""A plug-in of pytest: which lines of saint each test runs, in how many seconds; one file of numbers for each process.

Threads that a test starts count as the test's; other processes do not. Lines that a fixture of a module runs belong to all
tests of the file. What saint remembers by ``functools.cache`` is forgotten between tests, what tests remember between files:
a line is not the first test's alone.
"""

import functools
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import coverage
import pytest

from .operators import SOURCE
from .trying import warm


class Tracing:
    def __init__(self, folder: Path, process: str) -> None:
        self.folder, self.process = folder, process
        self.coverage = coverage.Coverage(
            data_file=str(folder / f"{process}.coverage"),
            config_file=False,
            include=[f"{SOURCE}/*"],
            concurrency="thread",
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.collected: dict[str, float] = {}
        self.failed: set[str] = set()
        self.now = self.file = ""
        self.coverage.start()
        self._switch("")

    def _switch(self, name: str) -> None:
        self.now = name
        self.coverage.switch_context(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        start = time.perf_counter()
        report = yield
        if isinstance(collector, pytest.Module):
            self.collected[collector.nodeid] = time.perf_counter() - start
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        file = item.nodeid.partition("::")[0]
        if file != self.file:
            self.file = file
            _forget("support", "test_")
        _forget("saint")
        self._switch(item.nodeid)
        done = yield
        self._switch("")
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before = self.now
        if fixturedef.scope != "function":
            self._switch(self.file)
        made = yield
        self._switch(before)
        return made

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        told = {"seconds": self.seconds, "collected": self.collected, "failed": sorted(self.failed)}
        (self.folder / f"{self.process}.json").write_text(json.dumps(told), encoding="utf-8")


def _forget(*names: str) -> None:
    for module in [module for name, module in sys.modules.items() if name.startswith(names)]:
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker or not config.getoption("numprocesses", None):
        warm()
        config.pluginmanager.register(Tracing(Path(os.environ["SAINT_MUTANTS_TRACE"]), worker or "main"))
