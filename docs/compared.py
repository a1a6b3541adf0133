"""Tables of docs/methods.md from the record of evidence/methods.py: every method in every slot, beside the others.

Intervals are those of one bootstrap over the pictures of a slot, so that methods are paired.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from saint import methods
from saint.flops import left_out
from saint.lab.analysis import bootstrap
from saint.lab.report.markdown import table

RECORD = Path(__file__).parents[1] / "evidence" / "results" / "methods.json"
RESAMPLES = 10_000
APART = 0.02  # a share that differs by more from the slot's is told
SLOTS = ("vision", "connector", "language")
Row = Mapping[str, Any]


class Slot:
    """Rows of a slot, cut to the pictures that all of them have.

    Attributes:
        rows: those that were measured, by method and budget.
        budgets: descending.
        count: pictures.
        values: of each row, [pictures].
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {(row["method"], row["budget"]): row for row in rows if row["values"]}
        self.budgets = sorted({budget for _, budget in self.rows}, reverse=True)
        found = {key: np.array(row["values"].split(), dtype=float) for key, row in self.rows.items()}
        self.count = min(map(len, found.values()))
        self.values = {key: values[: self.count] for key, values in found.items()}
        self.weights = bootstrap.weights(self.count, RESAMPLES)

    def best(self, budget: float) -> str:
        """The method with the highest mean at a budget, of those that leave no more than most."""
        within = [name for name in self.at(budget) if not self.over(name, budget)]
        return max(within, key=lambda name: self.values[name, budget].mean())

    def over(self, name: str, budget: float) -> bool:
        """Tell whether a method leaves more than most: thresholds miss budgets on other pictures."""
        row = self.rows[name, budget]
        return any(row[what] > self.usual(budget, what) + APART for what in ("flops", "seen") if what in row)

    def at(self, budget: float) -> list[str]:
        """Methods that have a budget."""
        return [name for name, had in self.rows if had == budget]

    def apart(self, name: str, budget: float) -> bool:
        """Tell whether a method is worse than the best: the paired interval of their difference excludes 0."""
        found = bootstrap.interval(self.values[name, budget] - self.values[self.best(budget), budget], self.weights)
        return bool(found.high < 0)

    def ranked(self) -> list[str]:
        """Methods, the best over all budgets first."""
        names = dict.fromkeys(name for name, _ in self.rows)
        mean = {
            name: np.mean([self.values[name, b].mean() for b in self.budgets if (name, b) in self.values])
            for name in names
        }
        return sorted(names, key=lambda name: -mean[name])

    def usual(self, budget: float, what: str = "flops") -> float:
        """Share of the FLOPs that most rows leave, or of the visual tokens that layers of the language model see ("seen")."""
        return median(self.rows[name, budget][what] for name in self.at(budget))

    def unusual(self, name: str, budget: float) -> str:
        """Say where a row leaves other shares than most."""
        row, said = self.rows[name, budget], ""
        if abs(row["flops"] - self.usual(budget)) > APART:
            said += f" at {row['flops']:.2f}"
        if "seen" in row and abs(row["seen"] - self.usual(budget, "seen")) > APART:
            said += f", {row['seen']:.0%} seen"
        return said


def record() -> dict[str, Any]:
    """Return what was measured."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def slots(model: str) -> dict[str, Slot]:
    """Rows of a model by slot."""
    rows = [row for row in record()["rows"] if row["model"] == model]
    return {slot: Slot(found) for slot in SLOTS if (found := [row for row in rows if row["slot"] == slot])}


def answers_table() -> str:
    """Small LLaVA on scenes: points of exact answers against the unpruned model."""
    base, found = _unpruned(), slots("small-llava")

    def cell(slot: Slot, values: np.ndarray) -> str:
        points = 100 * (values - base[: slot.count])
        return _within(bootstrap.interval(points, slot.weights), "+.1f")

    lines = []
    for name, slot in found.items():
        told = [f"*{slot.usual(b):.2f} of the FLOPs, {slot.usual(b, 'seen'):.0%} seen*" for b in slot.budgets]
        lines += [[f"**{name}**", f"*{slot.count} scenes*", *told], *_lines(slot, cell)]
    head = ["slot", "method", *(f"{budget:.0%} of the tokens" for budget in (0.5, 0.25, 0.11))]
    return f"{table(head, lines)}\n\n{_said(f'Unpruned: {base.mean():.1%} exact answers of {len(base)} scenes.', found.values())}"


def embeddings_table() -> str:
    """CLIP on photographs: cosine with the unpruned embedding."""
    (slot,) = slots("clip-b16").values()
    lines = _lines(slot, lambda slot, values: _within(bootstrap.interval(values, slot.weights), ".3f"))
    head = ["method", *(f"FLOPs {budget:.2f}" for budget in slot.budgets)]
    return f"{table(head, [line[1:] for line in lines])}\n\n{_said(f'{slot.count} photographs.', [slot])}"


def _unpruned() -> np.ndarray:
    (row,) = (row for row in record()["rows"] if row["method"] == "unpruned" and row["model"] == "small-llava")
    return np.array(row["values"].split(), dtype=float)


def _within(found: bootstrap.Interval, form: str) -> str:
    mean, low, high = (format(round(float(value), int(form[-2])) + 0.0, form) for value in found)  # no -0.0
    return f"{mean} [{low}, {high}]"


def _lines(slot: Slot, cell: Callable[[Slot, np.ndarray], str]) -> list[list[str]]:
    lines = []
    for name in slot.ranked():
        line = ["", _title(name)]
        for budget in slot.budgets:
            row = slot.rows.get((name, budget))
            line.append("-" if row is None else _marked(slot, name, budget, cell(slot, slot.values[name, budget])))
        lines.append(line)
    return lines


def _marked(slot: Slot, name: str, budget: float, text: str) -> str:
    told = text + slot.unusual(name, budget)
    if name == slot.best(budget):
        return f"**{told}**"
    return told if slot.over(name, budget) or slot.apart(name, budget) else f"{told} ~"


def _title(name: str) -> str:
    name, _, how = name.partition(", ")
    return f"`{methods.get(name).__name__}`" + (f", {how}" if how else "")


def _said(first: str, found: Iterable[Slot]) -> str:
    """What stands under a table."""
    where = record()["environment"]
    missing = left_out(*(row["uncounted"] for slot in found for row in slot.rows.values()))
    return (
        f"{first} Bold: the best of its slot, of those that leave no more than most. ~: not worse than it, as far as "
        f"these pictures tell (95 %, paired). "
        f"{f'FLOPs{missing}. ' if missing else ''}"
        f"{where['cpu']}, {where['threads']} thread, float32, torch {where['torch']}, transformers {where['transformers']}, "
        f"{record()['date'][:10]}."
    )


def missing_list() -> str:
    """Methods and budgets that are not there, with the reason."""
    found = record()
    lines = [f"- {_title(name)}: {why}." for name, why in found["left_out"].items()]
    for row in found["rows"]:
        if "why" in row:
            lines.append(
                f"- {_title(row['method'])}, {row['model']}, {row['slot']}, at {row['budget']:g}: {row['why']}."
            )
    return "\n".join(lines)
