"""Accuracy or agreement against measured speed, over plans: from records of both."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import Block, Cell, Charts, Plot, Point, Table, front
from .reading import Record
from .words import YES_OR_NO, interval, number, plan_line, plan_method


@dataclass(frozen=True)
class _Speed:
    median: float
    low: float | None
    high: float | None
    what: str


@dataclass(frozen=True)
class _Quality:
    measure: str
    value: float
    low: float | None
    high: float | None
    base: float  # of the unpruned model


@dataclass(frozen=True)
class Trade:
    """One plan of one model, with a measured speed and a measured quality."""

    model: str
    measure: str
    base: float
    point: Point


def trades(records: Sequence[Record]) -> list[Trade]:
    """Plans of which the records hold both a speed and a quality, matched by model and by the whole plan."""
    speeds: dict[tuple[str, str], list[tuple[str, _Speed]]] = {}
    found: list[tuple[tuple[str, str], str, Mapping[str, Any], _Quality]] = []
    for record in records:
        for model, name, plan, speed in _speeds(record):
            speeds.setdefault((model, _key(plan)), []).append((name, speed))
        found += [((model, _key(plan)), name, plan, quality) for model, name, plan, quality in _qualities(record)]
    made = []
    for key, name, plan, quality in found:
        for timed_as, speed in speeds.get(key, []):
            named = name if name not in ("", "default", "plan1") else timed_as or plan_line(plan)
            label = f"{named} ({speed.what})"
            point = Point(
                label, plan_method(plan), speed.median, quality.value, speed.low, speed.high, quality.low, quality.high
            )
            made.append(Trade(key[0], quality.measure, quality.base, point))
    return made


def _key(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


def _speeds(record: Record) -> Iterator[tuple[str, str, Mapping[str, Any], _Speed]]:
    data = record.data
    if record.kind == "bench/encoder":
        s, given = data["speedup"], data["conditions"]
        yield (
            data["model"],
            "",
            data["plan"],
            _Speed(s["median"], s["p20"], s["p80"], f"batch {given['batch']}, {given['dtype']}"),
        )
    elif record.kind == "bench/generation":
        given = data["conditions"]
        for name, plan in data["plans"].items():
            s = data["gains"][name]["first"]
            yield (
                data["model"],
                name,
                plan,
                _Speed(s["median"], s["p20"], s["p80"], f"first token, batch {given['batch']}, {given['dtype']}"),
            )
    elif record.kind == "demo":
        for name, run in _demoed(data):
            yield data["model"], name, run["plan"], _Speed(run["speedup"], None, None, "demo, batch 1")
    elif record.kind == "tune":
        for name, plan, reached in _tuned(data):
            if "speed" in reached:
                yield data["model"], name, plan, _Speed(reached["speed"], None, None, "tune, batch 1")


def _qualities(record: Record) -> Iterator[tuple[str, str, Mapping[str, Any], _Quality]]:
    data = record.data
    if record.kind in ("eval/images", "eval/vqa"):
        model = data["conditions"].get("model")
        for name, plan in data["plans"].items() if isinstance(model, str) else ():
            for score, p in data["scores"][name].items():
                # the interval is that of the paired difference, laid around the pruned score
                low = None if p["low"] is None else p["base"] + p["low"]
                high = None if p["high"] is None else p["base"] + p["high"]
                yield model, name, plan, _Quality(f"{score}, 0 to 1", p["pruned"], low, high, p["base"])
            for measure, s in data["agreement"][name].items():
                if measure not in ("kl", "kept", "flops"):  # 1 is the best of the others
                    said = f"{measure} with the unpruned model"
                    said = f"share that keeps {YES_OR_NO[measure]}" if measure in YES_OR_NO else said
                    yield model, name, plan, _Quality(said, s["mean"], None, None, 1.0)
    elif record.kind == "demo":
        for name, run in _demoed(data):
            agreement = run["agreement"]
            measure = f"{agreement['measure']} with the unpruned model (demo)"
            yield data["model"], name, run["plan"], _Quality(measure, agreement["mean"], None, None, 1.0)
    elif record.kind == "tune":
        for name, plan, reached in _tuned(data):
            if (a := reached.get("agreement")) is not None:
                measure = "agreement with the unpruned model (tune, held-out images)"
                yield data["model"], name, plan, _Quality(measure, a["mean"], a["low"], a["high"], 1.0)


def _demoed(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the plan of a demo, and the other one where two were shown."""
    yield data.get("plan_name", ""), data
    if data.get("beside") is not None:
        yield data["beside"]["plan_name"], data["beside"]


def _tuned(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Name, plan and what it reached, of the tuned plan and of those for other budgets."""
    yield "tuned", data["plan"], data["reached"]
    for point in data.get("frontier") or []:
        if "plan" in point:
            yield f"tuned for {point['work']:g}", point["plan"], point["reached"]


def trade_blocks(records: Sequence[Record]) -> tuple[str, list[Block]] | None:
    """A sentence and the plots, one per model and measure, the unpruned model in each; None where no plan has both."""
    groups: dict[tuple[str, str], list[Trade]] = {}
    for trade in trades(records):
        groups.setdefault((trade.model, trade.measure), []).append(trade)
    if not groups or len(records) < 2:  # a demo alone has both of one plan, and its own section says them
        return None
    figures, tables, said = [], [], []
    for (model, measure), own in groups.items():
        points = [Point("unpruned", "unpruned", 1.0, own[0].base), *(trade.point for trade in own)]
        best = front(points)
        note = "whiskers: p20 to p80 of speed, 95 % interval of quality; the line joins plans that none beats in both"
        figures.append(
            Plot(
                f"{model}: {measure}",
                points,
                x="measured speed-up",
                y=measure,
                axis=measure.partition(" with ")[0][:30],
                note=note,
                wide=True,
            )
        )
        rows = [
            [
                Cell(f"{i}: {p.name}", float(i)),
                p.group,
                Cell(interval(p.x, p.x_low, p.x_high, 2), p.x),
                Cell(interval(p.y, p.y_low, p.y_high, 4), p.y),
                "yes" if p in best else "no",
            ]
            for i, p in enumerate(points, 1)
        ]
        tables.append(Table(["plan", "method", "speed-up", measure, "unbeaten"], rows, f"{model}: {measure}"))
        said.append(_said(model, measure, best, points[0]))
    return " ".join(said), [Charts(figures), *tables]


def _said(model: str, measure: str, best: Sequence[Point], base: Point) -> str:
    """Say what the fastest plan that none beats gives, and what the unpruned model does."""
    if len(best) == 1 and best[0] is base:
        return f"{model}: no plan is faster than the unpruned model without a lower {measure}."
    fastest = max(best, key=lambda point: point.x)
    own = f"{number(fastest.x, 2)} times as fast with a {measure.removesuffix(', 0 to 1')} of {number(fastest.y, 4)}"
    return f"{model}: {fastest.name} is {own} (unpruned: {number(base.y, 4)})."
