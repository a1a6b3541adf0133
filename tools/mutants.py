"""Mutation testing: small errors are put into the source, one at a time, and the tests that run that line must notice.

    python tools/mutants.py map [tests/core/test_graph.py ...]     which tests run which line: once, then for new tests
    python tools/mutants.py run vision --sample 60 --seed 1   a fair sample over the mutants of a package
    python tools/mutants.py run vision --deep 300             its survivors again, with more of the tests that run the line
    python tools/mutants.py run vision --again                its survivors again, behind new tests (map those first)
    python tools/mutants.py run vision --again --tests test_guard   the same, with the tests of these files alone
    python tools/mutants.py page                              docs/testing.md, from tools/mutants.json and tools/equivalent.json

A run continues where it stopped (``.mutants/``). Heavy libraries are imported once; each mutant is a forked process in which one
module of ``saint`` has other code. Nothing on disk is changed. A test counts as one that notices if it passes without the error.
A survivor that no input tells from the original gets a line with the reason in ``tools/equivalent.json``. ``show 3fa2`` prints
the error with that key, and runs its tests in plain view.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutation import lines, record, trying
from mutation.operators import Mutant, code, files, packages, sample


def attempt(mutant: Mutant, tests: lines.Map, budget: float, deep: float) -> dict[str, object]:
    """Try one mutant: the tests of the budget, or with ``deep`` as many more seconds of tests."""
    without: frozenset[str] = frozenset()
    while True:
        plan = tests.plan(mutant, budget + deep, without, most=10_000 if deep else lines.TESTS)
        if not plan.tests:
            return {"outcome": "survived" if plan.of else "unrun", "ran": 0, "of": plan.of, "seconds": 0.0}
        result = trying.attempt(plan.tests, 60 + 4 * plan.seconds, mutant.module, mutant.path, code(mutant))
        told = {"ran": result.ran, "of": plan.of, "seconds": round(result.seconds, 2), "by": result.by}
        if result.how == "passed":
            return told | {"outcome": "survived"}
        blamed = result.by or plan.tests[0].partition("::")[0]
        if result.how == "none":
            print(f"{mutant}: its tests are not there any more; map them again", flush=True)
            without |= frozenset(plan.tests)
        elif result.how == "slow" or trying.sound(blamed):
            return told | {"outcome": "slow" if result.how == "slow" else "killed"}
        else:
            print(f"fails without any error too, and is left out: {blamed}", flush=True)
            without |= {test for test in plan.tests if test == blamed or test.startswith(f"{blamed}::")}


def run(options: argparse.Namespace) -> None:
    names = [name for name in files(options.package) if not options.file or any(word in name for word in options.file)]
    chosen, total = sample(names, options.sample, options.seed)
    done, why = record.known(), record.reasons()
    waiting = [m for m in chosen if not _settled(m, done, why, options)]
    print(f"{len(chosen)} of {total} mutants in {len(names)} files, {len(waiting)} to be tried", flush=True)
    if waiting:
        lines.Map()  # says if there is none
        trying.warm()
        children = []
        for worker in range(options.workers):
            child = os.fork()
            if child == 0:
                code_ = 1
                try:
                    _work(waiting[worker :: options.workers], lines.Map(only=options.tests), options)
                    code_ = 0
                except SystemExit as error:
                    print(error, file=sys.stderr)
                finally:
                    sys.stdout.flush()
                    os._exit(code_)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            raise SystemExit("stopped; what was tried is kept")
    done = record.known()
    tried = [done[m.key] for m in chosen]
    alive = [e for e in tried if e["outcome"] in ("survived", "unrun") and record.excused(e, why) is None]
    print(f"{len(tried)} tried, {len(alive)} unnoticed:", *map(_line, alive), sep="\n  ")
    of = record.commit()
    if options.file:
        print("not recorded: a part of the package is no sample of it")
    elif lacking := lines.Map().lacking():
        print(f"not recorded: {len(lacking)} files of tests are not in the map, such as {lacking[0]}")
    elif of is None:
        print("not recorded: commit src and tests first, and run this again (nothing is tried twice)")
    else:
        record.keep(options.package, total, options.seed, of, tried)
        record.page()


def _settled(mutant: Mutant, done: dict, why: dict, options: argparse.Namespace) -> bool:
    entry = done.get(mutant.key)
    if entry is None or entry["outcome"] in ("killed", "slow") or record.excused(entry, why) is not None:
        return entry is not None
    if options.again:
        return False
    return not options.deep or entry["ran"] >= entry["of"] or entry.get("deep", 0) >= options.deep


def _work(waiting: list[Mutant], tests: lines.Map, options: argparse.Namespace) -> None:
    for mutant in waiting:
        outcome = attempt(mutant, tests, options.budget, options.deep)
        print(_line(record.add(mutant, outcome | {"deep": options.deep})), flush=True)


def _line(entry: dict) -> str:
    head = f"{entry['outcome']:8} {entry['ran']:3}/{entry['of']:<4} {entry['seconds']:5.1f} s {entry['key'][:8]}"
    return f"{head} {entry['file']}.py:{entry['line']}: {entry['before']} -> {entry['after']}"


def show(key: str, budget: float) -> None:
    """Run the tests of one mutant, with what they print."""
    entry = next(entry for entry in record.known().values() if entry["key"].startswith(key))
    mutant = next(mutant for mutant in sample([entry["file"]], 10**6, 0)[0] if mutant.key == entry["key"])
    print(mutant, mutant.text, sep="\n", flush=True)
    os.environ["MUTANTS_SHOW"] = "1"
    print(attempt(mutant, lines.Map(), budget, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    map_ = commands.add_parser("map", help="run tests and remember which lines each runs")
    map_.add_argument("paths", nargs="*", help="files of tests; all if none is named")
    map_.add_argument("--workers", type=int, default=2)
    run_ = commands.add_parser("run", help="try a sample of a package's mutants")
    run_.add_argument("package", choices=packages())
    run_.add_argument("--sample", type=int, default=60, help="mutants, drawn uniformly over the package")
    run_.add_argument("--seed", type=int, default=1)
    run_.add_argument("--workers", type=int, default=1, help="processes")
    run_.add_argument("--file", nargs="*", help="only files whose name contains one of these; not recorded")
    run_.add_argument("--budget", type=float, default=25, help="seconds of tests for a mutant")
    run_.add_argument("--deep", type=float, default=0, help="so many seconds more for what has survived")
    run_.add_argument(
        "--tests", nargs="*", default=(), help="files of tests: no others, for survivors that these should see"
    )
    run_.add_argument("--again", action="store_true", help="try survivors again")
    show_ = commands.add_parser("show", help="run the tests of one mutant in plain view")
    show_.add_argument("key")
    show_.add_argument("--budget", type=float, default=25)
    commands.add_parser("page", help="write the table of docs/testing.md")
    options = parser.parse_args()
    match options.command:
        case "map":
            lines.trace(options.paths, options.workers)
        case "run":
            run(options)
        case "show":
            show(options.key, options.budget)
        case "page":
            record.page()


if __name__ == "__main__":
    main()
