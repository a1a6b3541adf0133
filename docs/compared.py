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
from saint.lab.analysis import bootstrap
from saint.lab.report.markdown import table

RECORD = Path(__file__).parents[1] / "evidence" / "results" / "methods.json"
RESAMPLES = 10_000
APART = 0.02  # a share of the FLOPs that differs by more from the slot's is told
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
        """The method with the highest mean at a budget."""
        return max(self.at(budget), key=lambda name: self.values[name, budget].mean())

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

    def usual(self, budget: float) -> float:
        """Share of the FLOPs that most of the rows leave."""
        return median(self.rows[name, budget]["flops"] for name in self.at(budget))


def record() -> dict[str, Any]:
    """Return what was measured."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def slots(model: str) -> dict[str, Slot]:
    """Rows of a model by slot."""
    rows = [row for row in record()["rows"] if row["model"] == model]
    return {slot: Slot(found) for slot in SLOTS if (found := [row for row in rows if row["slot"] == slot])}


def answers_table() -> str:
    """Small LLaVA on scenes: points of exact answers against the unpruned model."""
    base = _unpruned()

    def cell(slot: Slot, values: np.ndarray) -> str:
        found = 100 * (values - base[: slot.count])
        return _within(bootstrap.interval(found, slot.weights), "+.1f")

    lines = []
    for name, slot in slots("small-llava").items():
        seen = [f"{median(slot.rows[m, b]['seen'] for m in slot.at(b)):.0%}" for b in slot.budgets]
        told = [
            f"*{slot.usual(b):.2f} of the FLOPs, {share} seen*" for b, share in zip(slot.budgets, seen, strict=True)
        ]
        lines += [[f"**{name}**", f"*{slot.count} scenes*", *told], *_lines(slot, cell)]
    head = ["slot", "method", *(f"{budget:.0%} of the tokens" for budget in (0.5, 0.25, 0.11))]
    return f"{table(head, lines)}\n\n{_said(f'Unpruned: {base.mean():.1%} exact answers of {len(base)} scenes.')}"


def embeddings_table() -> str:
    """CLIP on photographs: cosine with the unpruned embedding."""
    (slot,) = slots("clip-b16").values()
    lines = _lines(slot, lambda slot, values: _within(bootstrap.interval(values, slot.weights), ".3f"))
    head = ["method", *(f"FLOPs {budget:.2f}" for budget in slot.budgets)]
    return f"{table(head, [line[1:] for line in lines])}\n\n{_said(f'{slot.count} photographs.')}"


def _unpruned() -> np.ndarray:
    (row,) = (row for row in record()["rows"] if row["method"] == "unpruned" and row["model"] == "small-llava")
    return np.array(row["values"].split(), dtype=float)


def _within(found: bootstrap.Interval, form: str) -> str:
    mean, low, high = (format(float(value), form) for value in found)
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
    share = slot.rows[name, budget]["flops"]
    told = f"{text} at {share:.2f}" if abs(share - slot.usual(budget)) > APART else text
    if name == slot.best(budget):
        return f"**{told}**"
    return told if slot.apart(name, budget) else f"{told} ~"


def _title(name: str) -> str:
    name, _, how = name.partition(", ")
    return f"`{methods.get(name).__name__}`" + (f", {how}" if how else "")


def _said(first: str) -> str:
    """What stands under a table."""
    where = record()["environment"]
    return (
        f"{first} Bold: the best of its slot. ~: not worse than it, as far as these pictures tell (95 %, paired). "
        f"{where['cpu']}, {where['threads']} thread, float32, torch {where['torch']}, transformers {where['transformers']}, "
        f"{record()['date'][:10]}."
    )


def left_out() -> str:
    """Methods and budgets that are not there, with the reason."""
    found = record()
    lines = [f"- {_title(name)}: {why}." for name, why in found["left_out"].items()]
    for row in found["rows"]:
        if "why" in row:
            lines.append(
                f"- {_title(row['method'])}, {row['model']}, {row['slot']}, at {row['budget']:g}: {row['why']}."
            )
    return "\n".join(lines)
