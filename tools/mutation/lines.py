"""The map: which tests run a line of the source, and how long each takes (``.mutants/map.sqlite``)."""

import ast
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .operators import ROOT, SOURCE, Mutant

MAP = ROOT / ".mutants" / "map.sqlite"
_TABLES = """
create table if not exists test (node text primary key, file text, seconds real);
create table if not exists file (file text primary key, collect real, lines integer);
create table if not exists source (digest text primary key, text text);
create table if not exists line (source text, digest text, node text, bits blob, primary key (source, node));
"""  # bits: a number whose n-th bit says that line n was run; a node without "::" is a file, and stands for all of its tests
_MARGIN = 0.05  # seconds that pytest takes for any test
_FILES = 8  # files of tests that are collected for one mutant
TESTS = 150


def trace(paths: list[str], workers: int) -> None:
    """Run files of tests (all, if none is named) and put what they run into the map, in place of what it had of them."""
    import pytest  # noqa: F401  (says early that it is not there)

    folder = MAP.parent / "trace"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if any("::" in path for path in paths):
        raise SystemExit("files or folders of tests, not single tests: a file is mapped as a whole")
    path = os.pathsep.join([str(SOURCE.parent), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SAINT_MUTANTS_TRACE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "mutation.tracing", "-p", "no:cacheprovider", *paths]
    if workers > 1:
        command += ["-n", str(workers), "--dist", "loadfile"]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code not in (0, 1):  # tests that fail are no reason to throw the others away
        raise SystemExit(f"pytest ended with {code}; the map is as it was")
    with sqlite3.connect(MAP) as base:
        base.executescript(_TABLES)
        for told in sorted(folder.glob("*.json")):
            _merge(base, json.loads(told.read_text(encoding="utf-8")), told.with_suffix(".coverage"))
        gone = [file for (file,) in base.execute("select file from file") if not (ROOT / file).exists()]
        _drop(base, gone)
        base.execute("delete from source where digest not in (select digest from line)")
        print(*base.execute("select count(*), count(distinct file), round(sum(seconds)) from test").fetchone(), end="")
        print(" tests, files, seconds in the map")


def _drop(base: sqlite3.Connection, files: list[str]) -> None:
    for file in files:
        base.execute("delete from line where node = ? or node like ?", (file, f"{file}::%"))
        base.execute("delete from test where file = ?", (file,))
        base.execute("delete from file where file = ?", (file,))


def _merge(base: sqlite3.Connection, told: dict[str, dict[str, float]], data: Path) -> None:
    """Take over one process: only tests that pass."""
    seconds = {node: time for node, time in told["seconds"].items() if node not in told["failed"]}
    if told["failed"]:
        print("not mapped, they fail:", *told["failed"], sep="\n  ")
    files = sorted({node.partition("::")[0] for node in told["seconds"]})
    _drop(base, files)
    rows = [(node, node.partition("::")[0], time) for node, time in seconds.items()]
    base.executemany("insert into test values (?, ?, ?)", rows)
    covered: dict[tuple[str, str], int] = defaultdict(int)
    digests: dict[str, str] = {}
    with sqlite3.connect(data) as found:
        query = (
            "select file.path, context, numbits from line_bits "
            "join file on file.id = file_id join context on context.id = context_id"
        )
        for path, node, bits in found.execute(query).fetchall():
            file, separator, _ = node.partition("::")
            if file not in files or (separator and node not in seconds):
                continue
            source = Path(path).relative_to(SOURCE).with_suffix("").as_posix()
            if path not in digests:
                text = Path(path).read_text(encoding="utf-8")
                digests[path] = hashlib.sha256(text.encode()).hexdigest()[:16]
                base.execute("insert or ignore into source values (?, ?)", (digests[path], text))
            base.execute("insert or replace into line values (?, ?, ?, ?)", (source, digests[path], node, bits))
            covered[file, source] |= int.from_bytes(bits, "little")
    others = [
        (file, time) for file, time in told["collected"].items() if file not in files
    ]  # skipped, or another process's
    base.executemany("insert or ignore into file values (?, ?, 0)", others)
    for file in files:
        lines = sum(bits.bit_count() for (of, _), bits in covered.items() if of == file)
        base.execute("insert into file values (?, ?, ?)", (file, told["collected"].get(file, 0.0), lines))


@dataclass(frozen=True)
class Plan:
    """Tests for one mutant, in the order in which they are run."""

    tests: list[str]
    of: int  # tests known to run the line
    seconds: float  # that they take, roughly


class Map:
    def __init__(self, path: Path = MAP, only: Iterable[str] = ()) -> None:
        self._only = {Path(name).name for name in only}
        if not path.exists():
            raise SystemExit("there is no map of the tests yet: `python tools/mutants.py map`")
        self._base = sqlite3.connect(path)
        self._tests = {node: (file, s) for node, file, s in self._base.execute("select node, file, seconds from test")}
        self._files = {
            file: (s, lines) for file, s, lines in self._base.execute("select file, collect, lines from file")
        }

    def lacking(self) -> list[str]:
        """Files of tests that were never traced."""
        there = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
        return sorted(set(there) - self._files.keys())

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _rows(self, source: str) -> list[tuple[str, str, int]]:
        found = self._base.execute("select node, digest, bits from line where source = ?", (source,))
        return [(node, digest, int.from_bytes(bits, "little")) for node, digest, bits in found]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _lines(self, source: str, digest: str, first: int, last: int) -> int:
        """Lines, as bits, that lines of today's file had when the tests were traced."""
        (then,) = self._base.execute("select text from source where digest = ?", (digest,)).fetchone()
        now = (SOURCE / f"{source}.py").read_text(encoding="utf-8")
        if now == then:
            return sum(1 << line for line in range(first, last + 1))
        bits = 0
        matcher = difflib.SequenceMatcher(None, then.splitlines(), now.splitlines(), autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():  # b and d are behind the last
            for line in range(max(first - 1, c), min(last, d)):
                if tag == "equal":
                    bits |= 1 << (a + line - c + 1)
                else:  # new or other lines: those they stand for, or those around them
                    bits |= sum(1 << (old + 1) for old in (range(a, b) if tag == "replace" else (a - 1, a)))
        return bits

    def runners(self, mutant: Mutant) -> set[str]:
        """Tests that run the line. Of one that runs at import: those that run any line of a function of the file."""
        found: set[str] = set()
        inside = _functions(mutant.path) if mutant.importing else [mutant.lines]
        for node, digest, bits in self._rows(mutant.file):
            if any(bits & self._lines(mutant.file, digest, *lines) for lines in inside):
                found.add(node)
        if mutant.importing and not found:  # a table, and nothing but tables
            found = {node.partition("::")[0] for node, _, _ in self._rows(mutant.file)}
            found |= {file for file in self._files if _named(file, mutant.file)}
        whole = {node for node in found if "::" not in node}
        return {node for node, (file, _) in self._tests.items() if node in found or file in whole}

    def plan(self, mutant: Mutant, budget: float, without: frozenset[str] = frozenset(), most: int = TESTS) -> Plan:
        """Quickest first, in turn from each file, those first that know most of this source; what a budget of seconds allows."""
        runners = self.runners(mutant)
        asked = {node for node in runners if not self._only or Path(self._tests[node][0]).name in self._only}
        without |= runners - asked
        files = self._ranked(mutant, {self._tests[node][0] for node in runners - without})
        chosen: dict[str, list[str]] = {}
        left, queues = (
            budget,
            [_mixed([(n, self._tests[n][1]) for n in runners - without if self._tests[n][0] == f]) for f in files],
        )
        for round_ in zip_longest(*queues):
            for file, entry in zip(files, round_, strict=True):
                if entry is None or sum(map(len, chosen.values())) >= most:
                    continue
                node, seconds = entry
                cost = seconds + _MARGIN + (0 if file in chosen else self._files[file][0])
                if (cost <= left or not chosen) and (file in chosen or len(chosen) < _FILES or most > TESTS):
                    chosen.setdefault(file, []).append(node)
                    left -= cost
        tests = [
            node for file in files for node in chosen.get(file, [])
        ]  # a file at a time: its fixtures are made once
        return Plan(tests, len(runners), budget - left)

    def _ranked(self, mutant: Mutant, files: set[str]) -> list[str]:
        """Files of tests: those named after the source or a word of the line, those that run most of it, little else."""
        shares: dict[str, int] = defaultdict(int)
        words = {word for word in re.findall(r"[a-z]{4,}", mutant.text.lower()) if word not in _COMMON}
        for node, _, bits in self._rows(mutant.file):
            shares[node.partition("::")[0]] |= bits
        most = max((bits.bit_count() for bits in shares.values()), default=1)

        def order(file: str) -> tuple[object, ...]:
            named = _named(file, mutant.file)
            said = any(
                word.startswith(part) for part in Path(file).stem.split("_")[1:] for word in words if len(part) > 3
            )
            return (not named, not said, -round(5 * shares[file].bit_count() / most), self._files[file][1], file)

        return sorted(files, key=order)


_COMMON = {"self", "return", "none", "tensor", "layer", "layers", "model", "true", "false"}


def _named(file: str, source: str) -> bool:
    """Whether a file of tests has the name of a source file."""
    return source.removesuffix("/__init__").rpartition("/")[2] in Path(file).stem.removeprefix("test_")


def _mixed(tests: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Quickest first; the second example of a test behind the first of each."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for node, seconds in sorted(tests, key=lambda test: (test[1], test[0])):
        name = node.partition("[")[0]
        ranked.append((seen[name], seconds, node))
        seen[name] += 1
    return [(node, seconds) for _, seconds, node in sorted(ranked)]


@functools.lru_cache(maxsize=8)
def _functions(path: Path) -> list[tuple[int, int]]:
    """First and last lines of the bodies of all functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.body[0].lineno, node.end_lineno or node.lineno) for node in found if not _one_line(node)]


def _one_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return node.body[0].lineno == node.lineno
