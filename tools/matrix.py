"""Run contracts and vision-language tests against other releases of the libraries that saint patches.

    python tools/matrix.py                 # all environments, writes docs/versions.md
    python tools/matrix.py newest          # one of them, prints only

Each environment is a side folder (``.matrix/NAME``) in front of the path, with the releases that are tried and what they
need beyond this environment; torch and everything else are shared. "newest" asks the index anew at each run.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"
PAGE = ROOT / "docs" / "versions.md"
LIBRARIES = ("transformers", "timm", "open_clip_torch")
ENCODERS = [
    "tests/core/test_upstream.py",
    "tests/core/test_encoders.py",
    "tests/core/test_modes.py",
    "tests/core/test_tome.py",
]
MODELS = [  # vision-language models, and methods on both kinds
    "tests/core/test_baselines.py",
    "tests/vlm/test_check_vlm.py",
    "tests/vlm/test_doorway.py",
    "tests/vlm/test_doorway_specs.py",
    "tests/core/test_forwards.py",
    "tests/core/test_language.py",
    "tests/core/test_published_mistakes.py",
    "tests/core/test_scored.py",
    *(f"tests/vlm/{path.name}" for path in sorted((ROOT / "tests" / "vlm").glob("test_vlm_*.py"))),
]


@dataclass(frozen=True)
class Environment:
    """Releases to try: version per distribution, "" for the newest there is; tests and a filter of their names."""

    about: str
    versions: dict[str, str]
    tests: list[str]
    select: str = ""


ENVIRONMENTS = {
    "encoders-floor": Environment(
        "oldest releases for encoders",
        {"transformers": "5.10.1", "timm": "1.0.20", "open_clip_torch": "3.0.0"},
        ENCODERS,
        "not test_upstream or names_of_encoders or names_of_backbones",
    ),
    "floor": Environment(
        "oldest releases for vision-language models",
        {"transformers": "5.17.0", "timm": "1.0.20", "open_clip_torch": "3.0.0"},
        ENCODERS + MODELS,
    ),
    "before": Environment(
        "before the argument for the cache was renamed", {"transformers": "5.23.0"}, ENCODERS + MODELS
    ),
    "newest": Environment("what the index has", dict.fromkeys(LIBRARIES, ""), ENCODERS + MODELS),
}


def installed(target: Path) -> dict[str, importlib.metadata.Distribution]:
    """Distributions in a side folder, by canonical name."""
    found = importlib.metadata.distributions(path=[str(target)]) if target.is_dir() else ()
    return {canonicalize_name(d.metadata["Name"]): d for d in found}


def install(target: Path, *requirements: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade",
         "--target", str(target), *requirements],
        check=True,
    )  # fmt: skip


def build(name: str, environment: Environment) -> Path:
    """The side folder: the releases asked for, and whatever they need that this environment does not satisfy."""
    target = FOLDER / name
    here = installed(target)
    wanted = {d: v for d, v in environment.versions.items() if not v or canonicalize_name(d) not in here}
    if wanted:
        install(target, *(f"{distribution}=={v}" if v else distribution for distribution, v in wanted.items()))
    while missing := unsatisfied(target):
        install(target, *missing)
    return target


def unsatisfied(target: Path) -> list[str]:
    """Requirements of the side folder that neither it nor this environment satisfies."""
    here, missing = installed(target), []
    for distribution in here.values():
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(requirement.name)
            try:
                version = (here[name] if name in here else importlib.metadata.distribution(name)).version
            except importlib.metadata.PackageNotFoundError:
                version = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


def run(name: str, environment: Environment) -> dict[str, object]:
    """Build the environment, run its tests, and count."""
    target = build(name, environment)
    report, log = FOLDER / f"{name}.xml", FOLDER / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--junit-xml", str(report), *environment.tests]
    if environment.select:
        command += ["-k", environment.select]
    path = f"{target}{os.pathsep}{ROOT / 'src'}"
    with log.open("w") as out:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=out,
            stderr=subprocess.STDOUT,
        ).returncode
    versions = {d: importlib.metadata.version(d) for d in (*LIBRARIES, "torch")}
    versions |= {d: installed(target)[canonicalize_name(d)].version for d in environment.versions}
    result: dict[str, object] = {
        "name": name,
        "about": environment.about,
        "versions": versions,
        "exit": code,
        "failures": [],
    }
    if not report.exists():
        return {
            **result,
            "passed": 0,
            "failed": 0,
            "errors": 1,
            "skipped": 0,
            "failures": [f"no report, see {log.name}"],
        }
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failed, errors, skipped, total = (int(suite.get(k, 0)) for k in ("failures", "errors", "skipped", "tests"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {outcome.get('message', '')[:120]}"
        for case in suite.iter("testcase")
        for outcome in case
        if outcome.tag in ("failure", "error")
    ]
    return {
        **result, "passed": total - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped,
        "failures": failures,
    }  # fmt: skip


def table(results: list[dict]) -> str:
    lines = [
        "| environment | transformers | timm | open_clip | torch | passed | failed | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        v = r["versions"]
        lines.append(
            f"| {r['name']}: {r['about']} | {v['transformers']} | {v['timm']} | {v['open_clip_torch']} | {v['torch']} "
            f"| {r['passed']} | {r['failed'] + r['errors']} | {r['skipped']} |"
        )
    return "\n".join(lines)


def write(results: list[dict]) -> None:
    begin, end = "<!-- matrix: generated by make matrix -->", "<!-- end matrix -->"
    head, found, rest = PAGE.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE} has no {begin} ... {end}")
    when = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {datetime.date.today()}."
    PAGE.write_text(f"{head}{begin}\n{table(results)}\n\n{when}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; none means all")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--unless-locked", action="store_true", help="run nothing where this environment has them already"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(ENVIRONMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    FOLDER.mkdir(exist_ok=True)
    results = []
    for name in options.names or ENVIRONMENTS:
        environment = ENVIRONMENTS[name]
        if options.unless_locked:
            target = build(name, environment)
            got = {d: installed(target)[canonicalize_name(d)].version for d in environment.versions}
            if all(importlib.metadata.version(d) == version for d, version in got.items()):
                print(
                    f"{name}: {', '.join(f'{d} {v}' for d, v in got.items())}: the releases of constraints.txt, which passed"
                )
                continue
        print(f"{name}: {environment.about} ...", flush=True)
        results.append(run(name, environment))
        print(table(results[-1:]), flush=True)
        for line in results[-1]["failures"][:30]:
            print(f"  {line}")
    if not options.names:
        write(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    raise SystemExit(any(r["exit"] for r in results))


if __name__ == "__main__":
    main()
