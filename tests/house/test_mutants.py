"""The tool that puts small errors into the source: what it changes, whom it asks, and that the error is really there."""

import ast
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from mutation import lines, operators, record, trying  # noqa: E402

EXAMPLES = {  # source -> all of its mutants
    "x = a < b": ["a < b -> a <= b"],
    "x = a <= b < c": ["a <= b < c -> a < b < c", "a <= b < c -> a <= b <= c"],
    "x = a + b": ["a + b -> a - b"],
    "x += a": ["x += a -> x -= a"],
    "x = a and b": ["a and b -> a or b", "a and b -> b", "a and b -> a"],
    "x = a or b or c": [
        "a or b or c -> a and b and c", "a or b or c -> b or c", "a or b or c -> a or c", "a or b or c -> a or b",
    ],
    "x = not a": ["not a -> a"],
    "x = -a": ["-a -> a"],
    "x = a if b else c": ["a if b else c -> a if not b else c"],
    "x = True": ["True -> False"],
    "x = 3": ["3 -> 4"],
    "x = f(a, dim=1)": ["f(a, dim=1) -> f(a)", "1 -> 2", "1 -> 0"],
    "x = f(a, b)": ["f(a, b) -> f(b, a)"],
    "x = max(a, b)": ["max(a, b) -> min(a, b)"],
    "x = a.sum(b)": ["a.sum(b) -> a.mean(b)"],
    "x = sum(a)": [],  # there is no mean() to be called
    "x = isinstance(a, b)": [],
    "x = sorted(a)": ["sorted(a) -> list(a)"],
    "x = a.isfinite(b)": ["a.isfinite(b) -> ~a.isnan(b)"],
    "x = math.isfinite(b)": ["math.isfinite(b) -> not math.isnan(b)"],
    "x = a.isinf(b)": ["a.isinf(b) -> a.isnan(b)"],
    "x = a.float()": ["a.float() -> a"],
    "x = a.to(torch.float32)": ["a.to(torch.float32) -> a", "torch.float32 -> torch.bfloat16"],
    "x = a[:n]": [":n -> n:"],
    "x = a[n:]": ["n: -> :n"],
    "x = (a, b)": ["(a, b) -> (b,)", "(a, b) -> (a,)"],  # of a module
    "x = f((a, b))": ["(a, b) -> (b,)", "(a, b) -> (a,)"],
    "x = {a, b}": ["{a, b} -> {b}", "{a, b} -> {a}"],
    "x = {a: b, c: d}": ["{a: b, c: d} -> {c: d}", "{a: b, c: d} -> {a: b}"],
    "x = [a for a in b if c]": ["for a in b if c -> for a in b"],
    "x = a['key']": ["'key' -> 'key_'"],
    "x = a.get('key')": ["'key' -> 'key_'"],
    "x = a == 'key'": ["a == 'key' -> a != 'key'", "'key' -> 'key_'"],
    "x.clear()": ["x.clear() -> pass"],
    "del x[a]": ["del x[a] -> pass"],
    "x[a] = b": ["x[a] = b -> pass"],
    "def f(self):\n    self.x = a": ["self.x = a -> pass"],
    "def __init__(self):\n    self.x = a": [],
    "def f():\n    return a": ["return a -> return None"],
    "def f():\n    return a, b": ["return (a, b) -> return None"],
    "def f():\n    if a:\n        return\n    g()": ["if a: ... -> if not a: ...", "return -> pass", "g() -> pass"],
    "def f():\n    g = a\n    return": [],
    "for a in b:\n    break": ["break -> continue"],
    "if a:\n    b\nelif c:\n    d": [
        "if a: ... elif c: ... -> if not a: ... elif c: ...", "if a: ... elif c: ... -> if a: ...", "if c: ... -> if not c: ...",
    ],
    "if not a:\n    b": ["if not a: ... -> if a: ..."],
    # what a reader reads, and what no test should look at
    '"""Two words."""': [],
    "x = 'words'": [],
    "raise ValueError(a + 1)": [],
    "x = f'{a + 1:.3f} words'": [],
    "assert a < b, 'words'": [],
    "import a": [],
    "def f(a: dict[str, 'B']) -> list[int]: ...": [],
    "x: Float[Tensor, 'B N'] | None": [],
    "X = dict[str, int]": [],
    "logger.warning(a + b)": [],
    "warnings.warn(a, stacklevel=2)": [],
    "x = typer.Option(help=a + b)": [],
    "if typing.TYPE_CHECKING:\n    f()": [],
}  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_what_is_changed(text):
    made = [f"{mutant.before} -> {mutant.after}" for mutant, _ in operators.each("x", text)]
    assert sorted(made) == sorted(EXAMPLES[text])


def test_each_error_is_one_and_the_source_is_as_before_behind_it():
    text = "\n".join(text for text in EXAMPLES if not text.startswith(("raise", "for")))
    sources, keys = [], set()
    for mutant, tree in operators.each("x", text):
        sources.append(ast.unparse(tree))
        keys.add(mutant.key)
    plain = ast.unparse(ast.parse(text))
    assert len(set(sources)) == len(sources) == len(keys) > 50
    for source in sources:
        pairs = zip(plain.splitlines(), source.splitlines(), strict=False)
        assert sum(a != b for a, b in pairs) >= 1


def test_a_long_table_gives_three_entries():
    made = [mutant for mutant, _ in operators.each("x", f"x = {{{', '.join('abcdefghijkl')}}}")]
    assert len(made) == 3


def test_long_errors_are_told_by_what_differs():
    ((_, last), *_) = [
        (m.before, m.after) for m, _ in operators.each("x", f"f({'word + ' * 40}x, other=here)") if "here" in m.before
    ]
    assert "here" not in last
    assert len(last) < 120


def test_every_file_belongs_to_one_package():
    found = [file for package in operators.packages() for file in operators.files(package)]
    assert sorted(found) == sorted(
        path.relative_to(operators.SOURCE).with_suffix("").as_posix() for path in operators.SOURCE.rglob("*.py")
    )


def test_lines_keep_their_numbers():
    mutant = next(m for m in operators.mutants("order") if m.before == "mask.cumsum(1) - 1")
    made = operators.code(mutant)
    functions = {c.co_name: c.co_firstlineno for c in made.co_consts if hasattr(c, "co_firstlineno")}
    plain = compile(mutant.path.read_text(), str(mutant.path), "exec")
    assert functions == {c.co_name: c.co_firstlineno for c in plain.co_consts if hasattr(c, "co_firstlineno")}
    namespace = {}
    exec(made, namespace)
    with pytest.raises(RuntimeError, match="out of bounds"):
        namespace["true_places"](torch.tensor([[False, True, True]]), 2)
    assert mutant.text.startswith("rank = torch.where(mask, mask.cumsum(1) - 1")
    assert mutant.text[mutant.column :].startswith(mutant.before)


def test_a_sample_is_the_same_again_and_begins_a_larger_one():
    names = operators.files("methods")
    small, total = operators.sample(names, 10, 3)
    large, _ = operators.sample(list(reversed(names)), 40, 3)
    assert small == large[:10]
    assert total == sum(len(operators.mutants(name)) for name in names)
    assert operators.sample(names, 10, 4)[0] != small


def test_a_sample_is_uniform_over_mutants_not_over_files(monkeypatch):
    made = {"a": [f"a{n}" for n in range(30)], "b": ["b0", "b1"]}
    monkeypatch.setattr(operators, "mutants", made.__getitem__)
    counts = Counter(mutant for seed in range(2000) for mutant in operators.sample(["a", "b"], 8, seed)[0])
    assert len(counts) == 32
    # each is drawn 500 times of 2000, with a standard deviation of 19
    assert max(abs(count - 500) for count in counts.values()) < 5 * 19.4


PLANTED = "VALUE = 1\n\ndef double(x):\n    return x * 2\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module of two lines and its tests, in a folder of their own; returns what tries it with other source."""
    (tmp_path / "planted_module.py").write_text(PLANTED)
    (tmp_path / "test_planted.py").write_text(
        "import pytest, planted_module\n"
        "def test_nothing(): pass\n"
        "@pytest.mark.parametrize('x', ['a b', '::', '[é]', '\\\\n'])\n"
        "def test_double(x): assert planted_module.double(x) == x + x\n"
        "def test_that_fails(): assert False\n"
    )
    monkeypatch.setattr(trying, "ROOT", tmp_path)

    def attempt(source, names, limit=60):
        tests = [f"test_planted.py::{name}" for name in names]
        code = compile(source, str(tmp_path / "planted_module.py"), "exec")
        return trying.attempt(tests, limit, "planted_module", tmp_path / "planted_module.py", code)

    return attempt


def test_an_error_is_there_when_the_tests_run(planted):
    names = ["test_nothing", "test_double[a b]", "test_double[::]"]
    passed = planted(PLANTED, names)
    assert (passed.how, passed.by, passed.ran) == ("passed", "", 3)
    failed = planted(PLANTED.replace("x * 2", "x * 3"), names)
    assert (failed.how, failed.by, failed.ran) == ("failed", "test_planted.py::test_double[a b]", 1)
    assert "planted_module" not in sys.modules


def test_only_chosen_tests_run_whatever_they_are_called(planted, tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "test_planted.py"],
        cwd=tmp_path, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = [line.partition("::")[2] for line in out.splitlines() if line.startswith("test_planted.py::test_double")]
    assert len(names) == 4
    assert planted(PLANTED, names).ran == 4
    wrong = planted(PLANTED.replace("x * 2", "x"), names[2:])
    assert (wrong.how, wrong.by) == ("failed", f"test_planted.py::{names[2]}")


def test_errors_at_import_endless_loops_and_tests_that_are_gone(planted):
    broken = planted("1 / 0", ["test_nothing"])
    assert (broken.how, broken.by) == ("failed", "test_planted.py")
    assert planted(PLANTED.replace("return x * 2", "while True: pass"), ["test_double[::]"], limit=2).how == "slow"
    assert planted(PLANTED, ["test_of_last_year"]).how == "none"


def test_a_test_that_fails_anyway_is_not_sound(planted):
    assert trying.sound("test_planted.py::test_nothing")
    assert trying.sound("test_planted.py")
    assert not trying.sound("test_planted.py::test_that_fails")


TRACED = """
import threading
import pytest
from saint import extras

def needs(): return extras.require("json", "eval")

@pytest.fixture(scope="module")
def shared():
    with pytest.raises(ImportError): extras.require("no_such_module_at_all", "eval")

def test_alone(): needs()
def test_in_a_thread():
    thread = threading.Thread(target=needs); thread.start(); thread.join()
def test_first(shared): pass
def test_second(shared): pass
def test_that_fails(): needs(); assert False
"""


def _line(text):
    return 1 + next(
        n for n, line in enumerate((operators.SOURCE / "extras.py").read_text().splitlines()) if text in line
    )


def _mutant(line, importing=False, file="extras"):
    return operators.Mutant(file, 0, line, (line, line), importing, "", 0, "", "", "")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A map of one file of tests, as the plug-in and the merge make it."""
    folder = tmp_path_factory.mktemp("traced")
    (folder / "test_traced.py").write_text(TRACED)
    start = (
        "import sys; from mutation import trying; trying.warm = lambda: None; import pytest;"
        "sys.exit(pytest.main(['-q', '-p', 'mutation.tracing', '-p', 'no:cacheprovider', 'test_traced.py']))"
    )
    path = os.pathsep.join([str(TOOLS), str(operators.SOURCE.parent)])
    environment = os.environ | {"PYTHONPATH": path, "SAINT_MUTANTS_TRACE": str(folder)}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run([sys.executable, "-c", start], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # one fails
    with lines.sqlite3.connect(folder / "map.sqlite") as base:
        base.executescript(lines._TABLES)
        for _ in range(2):  # the second time in place of the first
            lines._merge(base, json.loads((folder / "main.json").read_text()), folder / "main.coverage")
    return lines.Map(folder / "map.sqlite")


def test_threads_count_fixtures_are_everybodys_and_failures_are_left_out(traced):
    names = {node.partition("::")[2] for node in traced.runners(_mutant(_line("return import_module(module)")))}
    # the fixture runs the line too, and belongs to the file
    assert names == {"test_alone", "test_in_a_thread", "test_first", "test_second"}
    names = {node.partition("::")[2] for node in traced.runners(_mutant(_line("except ImportError")))}
    assert names == {"test_alone", "test_in_a_thread", "test_first", "test_second"}  # by the file
    rows = {
        node.partition("::")[2] for node, _, bits in traced._rows("extras") if bits >> _line("return import_module") & 1
    }
    assert rows == {"", "test_alone", "test_in_a_thread"}


def _map(path, tests, covered):
    """A map as if these tests (name: seconds) had run these lines (name: bits) of x.py."""
    with lines.sqlite3.connect(path) as base:
        base.executescript(lines._TABLES)
        base.executemany("insert into test values (?, ?, ?)", [(n, n.partition("::")[0], s) for n, s in tests.items()])
        base.executemany("insert into file values (?, 1, 10)", {(n.partition("::")[0],) for n in tests})
        base.execute("insert into source values ('d', ?)", ((operators.SOURCE / "x.py").read_text(),))
        rows = [(n, sum(1 << line for line in bits).to_bytes(9, "little")) for n, bits in covered.items()]
        base.executemany("insert into line values ('x', 'd', ?, ?)", rows)
    return lines.Map(path)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "SOURCE", tmp_path)
    monkeypatch.setattr(lines, "SOURCE", tmp_path)
    path = tmp_path / "x.py"
    path.write_text("A = 1\n\n\ndef f(a, b=2):\n    a += 1\n    return a\n\n\ndef g():\n    return 5\n")
    lines._functions.cache_clear()
    return path


def test_the_order_of_tests(source, tmp_path):
    tests = {"t_other.py::a": 0.1, "t_other.py::b": 3, "test_x.py::slow": 9, "test_x.py::p[1]": 0.2, "test_x.py::p[2]": 0.3,
             "test_x.py::p[3]": 0.4, "test_x.py::q": 2, "test_x.py::elsewhere": 0.1}  # fmt: skip
    covered = {name: [6, 10] if "other" in name else [6] for name in tests} | {"test_x.py::elsewhere": [10]}
    found = _map(tmp_path / "map", tests, covered)
    plan = found.plan(_mutant(6, file="x"), 100)
    # the file that is named after the source first; the first example of each test before any second one
    assert plan.tests == [f"test_x.py::{n}" for n in ("p[1]", "q", "slow", "p[2]", "p[3]")] + [
        "t_other.py::a",
        "t_other.py::b",
    ]
    assert plan.of == 7
    # 8 seconds: collecting a file takes one, and "slow" does not fit
    plan = found.plan(_mutant(6, file="x"), 8)
    assert plan.tests == ["test_x.py::p[1]", "test_x.py::q", "test_x.py::p[2]", "t_other.py::a", "t_other.py::b"]
    assert plan.seconds <= 8
    assert found.plan(_mutant(6, file="x"), 100, most=3).tests == ["test_x.py::p[1]", "test_x.py::q", "t_other.py::a"]
    left = found.plan(_mutant(6, file="x"), 100, without=frozenset({"test_x.py::q"}))
    assert "test_x.py::q" not in left.tests
    assert left.of == 7


def test_lines_that_no_test_runs_that_run_at_import_and_that_have_moved(source, tmp_path):
    tests = {"t.py::f": 0.1, "t.py::g": 0.1, "t.py::imports": 0.1}
    found = _map(tmp_path / "map", tests, {"t.py::f": [5, 6], "t.py::g": [10], "t.py::imports": [1, 4, 9]})
    assert found.plan(_mutant(7, file="x"), 10) == lines.Plan([], 0, 0)
    assert found.runners(_mutant(1, importing=True, file="x")) == {"t.py::f", "t.py::g"}
    importing = {(m.line, m.before): m.importing for m in operators.mutants("x")}
    assert (importing[1, "1"], importing[4, "2"], importing[5, "a += 1"]) == (True, True, False)
    source.write_text("# one more line\n" + source.read_text().replace("a += 1", "a += 3"))
    found._lines.cache_clear()
    lines._functions.cache_clear()
    assert found.runners(_mutant(11, file="x")) == {"t.py::g"}
    assert found.runners(_mutant(6, file="x")) == {"t.py::f"}  # where a line was changed
    assert found.runners(_mutant(10, file="x")) == {"t.py::imports"}
    source.write_text(source.read_text().replace("    return 5", "    b = 4\n    return 5"))
    found._lines.cache_clear()
    assert found.runners(_mutant(11, file="x")) == {"t.py::g", "t.py::imports"}  # a new line: those around it


def test_a_head_is_what_runs_before_a_body():
    text = "if (a and\n    b):\n    c = 1\nfor x in [\n    2,\n]:\n    d = 3\n"
    heads = {m.before: m.lines for m, _ in operators.each("x", text)}
    assert heads["a and b"] == (1, 2)
    assert heads["1"] == (3, 3)
    assert heads["2"] == (4, 6)


def test_the_page_says_what_the_record_says():
    kept = json.loads(record.KEPT.read_text(encoding="utf-8")) if record.KEPT.exists() else {}
    between = record.PAGE.read_text(encoding="utf-8").partition(record.BEGIN)[2].partition(record.END)[0]
    assert between.strip() == record.table(kept, record.reasons())
    for package, row in kept.items():
        assert package in operators.packages()
        assert row["noticed"] + len(row["survivors"]) == row["sample"]


def test_what_is_kept_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "KEPT", tmp_path / "kept.json")
    tried = [
        dict(file="methods/saint", text="x", column=0, before="a", after="b", line=n, ran=n, of=9, outcome=how)
        for n, how in enumerate(["survived", "killed", "slow", "unrun", "killed"])
    ]  # fmt: skip
    for package in ("vision", "methods"):
        record.keep(package, 99, 7, "abc", tried)
    kept = json.loads(record.KEPT.read_text())
    assert list(kept) == ["methods", "vision"]
    row = kept["methods"]
    assert {name: row[name] for name in ("files", "mutants", "sample", "seed", "commit", "noticed", "slow")} == {
        "files": len(operators.files("methods")), "mutants": 99, "sample": 5, "seed": 7, "commit": "abc", "noticed": 3, "slow": 1,
    }  # fmt: skip
    assert [entry["line"] for entry in row["survivors"]] == [0, 3]


def test_a_row_counts_and_names_what_has_survived():
    rng = random.Random(0)
    entries = [
        {"file": "a/b", "text": "x = 1", "column": 4, "before": "1", "after": str(n), "line": 7, "ran": 3, "of": n}
        for n in (0, 9, 4)
    ]
    rng.shuffle(entries)
    row = {
        "files": 2,
        "mutants": 99,
        "sample": 12,
        "seed": 5,
        "date": "2026-01-02",
        "commit": "abc",
        "noticed": 9,
        "slow": 1,
        "survivors": entries,
    }
    text = record.table({"a": row}, {("a/b", "x = 1", 4, "1", "4"): "it is never read"})
    assert "| `a` | 2 | 99 | 12 | 5 | 2026-01-02 | `abc` | 9 | 1 | 2 |" in text
    assert "`1` → `4`: it is never read" in text
    assert "`1` → `9` (3 of the 9 tests that run the line were tried)" in text
    assert "`1` → `0` (no test runs the line)" in text
