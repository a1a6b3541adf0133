"""Results: what was tried here (``.mutants/results.jsonl``), what is kept of it (``tools/mutants.json``), and the page."""

import datetime
import json
import subprocess
from collections.abc import Iterable
from typing import Any

from .operators import ROOT, Mutant, files

RESULTS = ROOT / ".mutants" / "results.jsonl"
KEPT = ROOT / "tools" / "mutants.json"
EQUIVALENT = ROOT / "tools" / "equivalent.json"
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants -->", "<!-- /mutants -->"
_WHAT = ("file", "text", "column", "before", "after")  # by this a survivor is known again when lines move


def known() -> dict[str, dict[str, Any]]:
    """Results so far, by key; the last one counts, and of tests that passed on a survivor the most that were run at once."""
    found: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else ():
        entry = json.loads(line)
        before = found.get(entry["key"])
        if before is not None and before["outcome"] == entry["outcome"] == "survived":
            entry["ran"] = min(entry["of"], max(entry["ran"], before["ran"]))
        found[entry["key"]] = entry
    return found


def add(mutant: Mutant, outcome: dict[str, Any]) -> dict[str, Any]:
    names = ("key", "line", *_WHAT)
    entry = {name: getattr(mutant, name) for name in names} | outcome
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as handle:  # one write for a line: several processes may append
        handle.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return entry


def commit() -> str | None:
    """The commit that source and tests are of, None if they are of none."""
    clean = ["git", "status", "--porcelain", "src", "tests"]
    if subprocess.run(clean, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        return None
    head = ["git", "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def keep(package: str, total: int, seed: int, of: str, tried: list[dict[str, Any]]) -> None:
    """Put the results of a package's sample into the record."""
    alive = [entry for entry in tried if entry["outcome"] in ("survived", "unrun")]
    names = (*_WHAT, "line", "ran", "of")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kept[package] = {
        "files": len(files(package)), "mutants": total, "sample": len(tried), "seed": seed,
        "date": datetime.date.today().isoformat(), "commit": of, "noticed": len(tried) - len(alive),
        "slow": sum(entry["outcome"] == "slow" for entry in tried),
        "survivors": sorted(({name: entry[name] for name in names} for entry in alive), key=lambda e: (e["file"], e["line"])),
    }  # fmt: skip
    text = json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False)
    KEPT.write_text(text + "\n", encoding="utf-8")


def reasons() -> dict[tuple[str, ...], str]:
    """Why no input tells a mutant from the original."""
    entries = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {tuple(entry[name] for name in _WHAT): entry["reason"] for entry in entries}


def excused(entry: dict[str, Any], why: dict[tuple[str, ...], str]) -> str | None:
    return why.get(tuple(entry[name] for name in _WHAT))


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def table(kept: dict[str, dict[str, Any]], why: dict[tuple[str, ...], str]) -> str:
    """What stands between the marks of the page."""
    columns = "package", "files", "mutants", "tried", "seed", "date", "commit", "noticed", "equivalent", "unnoticed"
    rows = [f"| {' | '.join(columns)} |", "|---|---:|---:|---:|---:|---|---|---:|---:|---:|"]
    same: list[str] = []
    open_: list[str] = []
    for package, row in kept.items():
        before = len(same)
        for entry in row["survivors"]:
            what = f"- `{entry['file']}.py`, line {entry['line']}: {_code(entry['before'])} → {_code(entry['after'])}"
            reason = excused(entry, why)
            if reason is not None:
                same.append(f"{what}: {reason}")
            elif entry["of"]:
                open_.append(f"{what} ({entry['ran']} of the {entry['of']} tests that run the line were tried)")
            else:
                open_.append(f"{what} (no test runs the line)")
        excuses = len(same) - before
        numbers = (
            row["files"],
            row["mutants"],
            row["sample"],
            row["seed"],
            row["date"],
            f"`{row['commit']}`",
            row["noticed"],
        )
        rows.append(
            f"| `{package}` | {' | '.join(map(str, numbers))} | {excuses} | {len(row['survivors']) - excuses} |"
        )
    parts = ["\n".join(rows)]
    if not kept:
        parts = ["No package has been tried yet."]
    if slow := {package: row["slow"] for package, row in kept.items() if row["slow"]}:
        words = ", ".join(f"{count} in `{package}`" for package, count in slow.items())
        parts.append(f"Noticed because the tests did not end in time: {words}.")
    parts += _list("Equivalent: no input tells them from the original.", same)
    parts += _list("Unnoticed:", open_)
    return "\n\n".join(parts)


def _list(title: str, lines: Iterable[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def page() -> None:
    """Write the table into the page of tests, from what is kept alone."""
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    PAGE.write_text(f"{head}{BEGIN}\n{table(kept, reasons())}\n{END}{tail}", encoding="utf-8")
