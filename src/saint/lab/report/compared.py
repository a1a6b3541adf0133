"""Section of `saint compare`."""

from collections.abc import Mapping
from typing import Any

from .blocks import Block, Charts, Listing, Plot, Point, Sheet, Text, front
from .measured import plan_table
from .reading import Record
from .told import conditions, load_note, skipped
from .words import interval, names, plan_line, plan_method

_MEASURES = ("cosine", "same_answer", "same_top1")  # of agreement, the first that there is


def compare_sheet(record: Record) -> Sheet:
    """`saint compare`."""
    data = record.data
    speeds, timing = data["speeds"], data["timing"]
    measure = next((m for m in _MEASURES if all(m in found for found in data["agreement"].values())), None)
    points = [] if measure is None else [_point(name, data, measure) for name in data["plans"]]
    best = [point.name for point in front(points)]
    fast = max(speeds, key=lambda name: speeds[name]["speedup"]["median"])
    spread = speeds[fast]["speedup"]
    verdict = (
        f"Fastest is “{fast}”: {interval(spread['median'], spread['p20'], spread['p80'], 2)} times the unpruned speed."
    )
    if points:
        close = max(points, key=lambda point: point.y)
        verdict += f" Closest to the unpruned model is “{close.name}”: {_words(measure)} {close.y:.4f}."
        verdict += (
            f" No other is both faster and closer than {', '.join(f'“{name}”' for name in best)}."
            if len(points) > 1
            else ""
        )
    timed = {tuple(one["timed"]) for one in speeds.values()}
    most = max(timed, key=len)
    blocks: list[Block | None] = [
        load_note(record, timing),
        Listing([(name, plan_line(plan)) for name, plan in data["plans"].items()]),
        plan_table(data, speeds),
        Text(
            f"Tokens and FLOPs are means over pictures. Timed: {names(most)}, in turn with the unpruned model, batch "
            f"{timing['batch']}. A speed-up above its bound is noise.",
            aside=True,
        ),
        _plot(points, measure),
        skipped(record),
    ]
    asked = f"Which plan suits {data['model']} best?"
    more = {"samples": f"{data['evaluated']} of {data['given']} evaluated", "question": data.get("prompt")}
    return Sheet(f"Plans compared: {data['model']}", asked, verdict, conditions(record, **more), blocks)


def _point(name: str, data: Mapping[str, Any], measure: str) -> Point:
    speed, found = data["speeds"][name]["speedup"], data["agreement"][name][measure]
    low, high = found.get("low"), found.get("high")
    method = plan_method(data["plans"][name])
    return Point(name, method, speed["median"], found["mean"], speed["p20"], speed["p80"], low, high)


def _words(measure: str | None) -> str:
    return (measure or "").replace("_", " ")


def _plot(points: list[Point], measure: str | None) -> Charts | None:
    if not points:
        return None
    note = "whiskers: p20 to p80 of speed, 95 % interval of agreement; the line joins plans that none beats in both"
    whole = [Point("unpruned", "unpruned", 1.0, 1.0), *points]
    name = _words(measure)
    plot = Plot("Agreement against speed", whole, "measured speed-up", f"{name} with the unpruned model", name, note)
    return Charts([plot], page_only=True)
