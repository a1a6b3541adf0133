"""Run transformers' own tests with a plan applied to every model that they create, and count what the plan breaks.

    python tools/upstream_suite.py ~/transformers                          # all supported families, a plan that keeps everything
    python tools/upstream_suite.py ~/transformers clip llava --keep 0.5 --csv broken.csv

The argument is a checkout of transformers at the release that is installed; nothing is fetched. Each family's tests run once
without a plan and once with one, in a process of its own. What passes without and fails with is counted by its error message.

The file is also the plugin of pytest that does it: it records outcomes, and applies the plan to the outermost model when that has
been made. Its file of records holds one line a report.
"""

import argparse
import collections
import csv
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECORD, KEEP = "UPSTREAM_SUITE_RECORD", "UPSTREAM_SUITE_KEEP"  # environment of the process that runs the tests
WIDEST = 150  # characters of a message


# -- the plugin -----------------------------------------------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    if KEEP in os.environ:
        _watch(float(os.environ[KEEP]))


def pytest_runtest_logreport(report: Any) -> None:
    if RECORD in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr or "")
        _note(test=report.nodeid, when=report.when, outcome=report.outcome, message=message)


def _note(**entry: str) -> None:
    with Path(os.environ[RECORD]).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _watch(keep: float) -> None:
    """From now on every model of transformers has the plan once it is whole."""
    from transformers import PreTrainedModel

    making = threading.local()

    def whole(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls ``make``; models that are made inside are parts of one."""
        making.depth = getattr(making, "depth", 0) + 1
        try:
            return make(*args, **kwargs)
        finally:
            making.depth -= 1

    def watch(cls: type) -> None:
        if "__init__" not in vars(cls):
            return
        original = cls.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            whole(original, self, *args, **kwargs)
            if not making.depth:
                _apply(self, keep)

        cls.__init__ = init  # type: ignore[misc]

    def load(cls: type, *args: Any, **kwargs: Any) -> Any:
        """The weights come behind the constructor."""
        made = whole(from_pretrained, cls, *args, **kwargs)
        if not making.depth:
            _apply(made[0] if isinstance(made, tuple) else made, keep)  # with output_loading_info
        return made

    def subclass(cls: type, **kwargs: Any) -> None:
        told(cls, **kwargs)
        watch(cls)

    from_pretrained, told = PreTrainedModel.from_pretrained.__func__, PreTrainedModel.__init_subclass__.__func__
    PreTrainedModel.from_pretrained = classmethod(functools.wraps(from_pretrained)(load))
    PreTrainedModel.__init_subclass__ = classmethod(functools.wraps(told)(subclass))
    for cls in _below(PreTrainedModel):
        watch(cls)


def _below(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _below(subclass)


def _apply(model: Any, keep: float) -> None:
    import saint

    if saint.status(model) is not None or any(p.is_meta for p in model.parameters()):
        return
    told = "its kind is not known"
    for plan in plans(model, keep):
        try:
            saint.apply(model, plan)
        except saint.UnsupportedModelError as error:
            told = str(error)
        else:
            told = ""
            break
    _note(test=type(model).__name__, when="made", outcome="refused" if told else "applied", message=told)


def plans(model: Any, keep: float) -> "list[Any]":
    """What is tried on ``model``, in order: all stages that its kind has, then those without the vision tower."""
    from saint import Plan
    from saint.language.locate import find as find_text
    from saint.methods import Grid
    from saint.vlm.locate import find as find_vlm

    method = Grid(keep=keep)
    if find_text(model) is not None:
        return [Plan(language=method)]
    found = find_vlm(model)
    if found is None:
        return [Plan(vision=method)]
    behind = Plan(connector=method, language=method)
    return [behind] if found[2].no_vision else [Plan(vision=method, connector=method, language=method), behind]


# -- both runs ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run of one family's tests recorded: by test whether it passed, and by test the message of its failure."""

    passed: set[str]
    failed: dict[str, str]
    models: "collections.Counter[str]"  # "applied" and "refused"
    ended: str  # "" or how pytest ended, where it ran no test


def read(path: Path, ended: str = "") -> Run:
    """The records of one run; a test passed if its call did and nothing of it failed."""
    passed: set[str] = set()
    failed: dict[str, str] = {}
    models: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry["when"] == "made":
            models[entry["outcome"]] += 1
        elif entry["outcome"] == "failed":
            failed.setdefault(entry["test"], entry["message"])
        elif entry["when"] == "call" and entry["outcome"] == "passed":
            passed.add(entry["test"])
    return Run(passed - failed.keys(), failed, models, "" if passed or failed else ended)


def run(checkout: Path, family: str, keep: float | None, extra: Sequence[str] = ()) -> Run:
    """Run the tests of ``family`` in a process of its own; without a plan where ``keep`` is None."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "reports.jsonl")
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", RECORD: str(record)}
        environment.pop(KEEP, None)
        if keep is not None:
            environment[KEEP] = repr(keep)
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *extra, test_file(family)], cwd=checkout, env=environment, capture_output=True, text=True
        )
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        return read(record, f"pytest ended with {done.returncode}: {lines[-1]}")


def test_file(family: str) -> str:
    return f"tests/models/{family}/test_modeling_{family}.py"


class Row(NamedTuple):
    """One family: how many tests pass without a plan, how many of them with it, and the others by message.

    ``applied`` and ``refused`` count models; ``ended`` says how pytest ended where it ran no test without a plan.
    """

    family: str
    without: int
    kept: int
    broken: dict[str, list[str]]
    applied: int
    refused: int
    ended: str

    def __str__(self) -> str:
        if self.ended:
            return f"{self.family}: {self.ended}"
        told = f"{self.applied} models with a plan, {self.refused} refused"
        lines = [f"{self.family}: {self.kept} of {self.without} pass; {told}"]
        return "\n".join(lines + [f"  {len(tests)} x {message}" for message, tests in self.broken.items()])


def compare(family: str, without: Run, under: Run) -> Row:
    """Hold the run under a plan against the one without."""
    broken: dict[str, list[str]] = collections.defaultdict(list)
    for test in sorted(without.passed - under.passed):
        told = under.failed.get(test, under.ended or "did not run, or was skipped")
        broken[told.strip().partition("\n")[0][:WIDEST]].append(test)
    by_size = dict(sorted(broken.items(), key=lambda item: -len(item[1])))
    kept = len(without.passed & under.passed)
    models = under.models
    return Row(family, len(without.passed), kept, by_size, models["applied"], models["refused"], without.ended)


def supported() -> list[str]:
    """Folders of transformers with a family of the support tables."""
    from saint.upstream.decoders import TEXT
    from saint.upstream.registry import ENCODERS, FAMILIES

    names = [*(s.encoder for s in ENCODERS), *(s.model for s in FAMILIES), *TEXT]
    return sorted({name.split(".")[2] for name in names if name.startswith("transformers.models.")})


def write(rows: Sequence[Row], path: Path) -> None:
    """The table as CSV: one line per family and message, the first without a message."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["family", "passed_without", "passed_with", "models_with_plan", "message", "tests", "names"])
        for row in rows:
            table.writerow([row.family, row.without, row.kept, row.applied, "", "", ""])
            for message, tests in row.broken.items():
                names = " ".join(test.rpartition("::")[2] for test in tests)
                table.writerow([row.family, "", "", "", message, len(tests), names])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="of transformers, at the release that is installed")
    parser.add_argument("families", nargs="*", help="folders of its tests/models; without any, all that are supported")
    parser.add_argument(
        "--keep", type=float, default=1.0, help="share of the tokens that each stage keeps (default: 1)"
    )
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("-k", default="", help="only tests with such names, as pytest -k takes them")
    given = parser.parse_args(arguments)
    if not 0 < given.keep <= 1:
        parser.error(f"--keep must be a share in (0, 1], got {given.keep:g}")
    missing = [family for family in given.families if not (given.checkout / test_file(family)).exists()]
    if missing:
        parser.error(
            f"{given.checkout} has no {test_file(missing[0])}; give a checkout of transformers and its families"
        )
    families = given.families or [f for f in supported() if (given.checkout / test_file(f)).exists()]
    if not families:
        parser.error(f"{given.checkout} has no tests/models with a supported family: give a checkout of transformers")
    extra = ["-k", given.k] if given.k else []
    print(f"transformers {importlib.metadata.version('transformers')}, {given.keep:g} of the tokens are kept")
    rows = []
    for family in families:
        without = run(given.checkout, family, None, extra)
        under = without if without.ended else run(given.checkout, family, given.keep, extra)
        row = compare(family, without, under)
        rows.append(row)
        print(row, flush=True)
        if given.csv:
            write(rows, given.csv)
    print(f"all: {sum(row.kept for row in rows)} of {sum(row.without for row in rows)} pass")
    return int(any(row.ended for row in rows))


if __name__ == "__main__":
    sys.exit(main())
