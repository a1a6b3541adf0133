"""Section of `saint tune`: what was asked for and reached, where tokens are dropped, what that costs, other budgets."""

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import (
    Block,
    Cell,
    Charts,
    Curves,
    Group,
    Highlight,
    Line,
    Listing,
    PlanBox,
    Plot,
    Point,
    Sheet,
    Table,
    Text,
    front,
)
from .charts import mark
from .reading import Record
from .told import conditions, skipped
from .words import interval, number

_SAME_WORK = 0.03  # relative difference up to which two plans leave the same work; times are noisier than counts


def tune_sheet(record: Record) -> Sheet:
    """`saint tune`."""
    data = record.data
    images, tokens = data["images"], data["tokens"]
    verdict = f"{_target(data)} {_compared(data)}".strip()
    layers = data["layers"]
    rows = [
        [Cell(_place(row["place"]), _number(row["place"])), row["method"],
         Cell(f"{row['left']} of {tokens}", float(row["left"])), Cell(f"{row['left'] / tokens:.0%}", row["left"] / tokens)]
        for row in layers
    ]  # fmt: skip
    per_image = "Every image keeps its own number; these are means." if data.get("per_image") else None
    figures: list[Curves | Plot] = [_behind(data), *_costs(data)]
    curve = _frontier(data)
    blocks: list[Block | None] = [
        PlanBox(data["plan"], name=data.get("plan_name", ""), file="plan.json"),
        None if curve is None else Charts([curve[0]], page_only=True),
        None if curve is None else curve[1],
        Table(["where", "method", "tokens kept", "share kept"], rows, "Where tokens are dropped"),
        Text(per_image) if per_image else None,
        _held_out(data),
        Charts(figures, page_only=True),
        _missing(data),
        skipped(record),
    ]
    more = {
        "target": _asked(data["target"]),
        "images": f"{images['tuned']} to tune on, {images['held_out']} held back"
        + (f" ({images['set']})" if images.get("set") else ""),
        "measure": _measure(data),
    }
    asked = f"Where can {data['model']} drop tokens for {_asked(data['target'])}, and what does that lose?"
    return Sheet(f"Tuned plan: {data['model']}", asked, verdict, conditions(record, **more), blocks, _highlights(data))


def _highlights(data: Mapping[str, Any]) -> list[Highlight]:
    """Tokens, work and agreement of the plan."""
    reached, tokens, last = (
        data["reached"],
        data["tokens"],
        data["layers"][-1]["left"] if data["layers"] else data["tokens"],
    )
    on = f"mean of {data['images']['held_out']} images held back"
    measured = f"; {number(reached['speed'], 2)}x measured at batch 1" if "speed" in reached else ""
    kept = reached.get("agreement")
    lost = Highlight("loss", number(reached["loss"]["mean"], 3), f"{reached['measure']}, {on}")
    return [
        Highlight("kept", f"{last / tokens:.0%}", f"of {tokens} tokens, behind the last layer that drops"),
        Highlight("faster", f"{number(1 / reached['flops']['mean'], 2)}x", f"by FLOPs{measured}"),
        lost if kept is None else Highlight("agreement", number(kept["mean"], 3), f"with the unpruned output, {on}"),
    ]


def _behind(data: Mapping[str, Any]) -> Curves:
    """Tokens behind every layer."""
    (depth,) = data["depth"].values()
    kept = {_number(row["place"]): float(row["left"]) for row in data["layers"]}
    behind, now = [], float(data["tokens"])
    for place in range(-1, int(depth)):
        now = kept.get(float(place), now)
        behind.append(now)
    line = Line("tokens kept", behind, x=[float(place) for place in range(-1, int(depth))])
    whole = ("unpruned", float(data["tokens"]))
    return Curves("Tokens kept behind each layer", [line], y="tokens", zero=True, whole=whole)


def _place(place: Any) -> str:
    return "in front of the layers" if place == "input" else f"layer {place}"


def _number(place: Any) -> float:
    return -1.0 if place == "input" else float(place)


def _asked(target: Mapping[str, float]) -> str:
    ((name, value),) = target.items()
    words = {
        "flops": f"{number(100 * value, 1)} % of the FLOPs",
        "speed": f"{number(value, 2)} times the speed",
        "agreement": f"an agreement of {number(value, 4)}",
    }
    return words[name]


def _measure(data: Mapping[str, Any]) -> str:
    reached = data["reached"]
    if "agreement" in reached:
        return f"agreement with the unpruned output (1 - loss; the loss is {reached['measure']})"
    return f"{reached['measure']}, nat: lower is better"


def _target(data: Mapping[str, Any]) -> str:
    """Tell whether the target was met on images that were held back, and what is lost there."""
    ((name, wanted),) = data["target"].items()
    reached, count = data["reached"], data["images"]["held_out"]
    kept = reached.get("agreement")
    agree = "" if kept is None else f"agreement {_interval(kept)} with the unpruned model"
    agree = agree or f"{reached['measure']} {_interval(reached['loss'])} nat"
    on = f"on {count} images held back"
    flops = f"{number(100 * reached['flops']['mean'], 1)} % of the FLOPs are used"
    if name == "flops":
        met = "Met" if reached["flops"]["mean"] <= wanted else "Missed"
        return f"{met}: {flops} ({_asked(data['target'])} asked for); {agree} {on}."
    if name == "speed":
        met = "Met" if reached["speed"] >= wanted else "Missed"
        return (
            f"{met}: {number(reached['speed'], 2)} times as fast at batch 1 as measured ({number(wanted, 2)} asked for), "
            f"{flops}; {agree} {on}."
        )
    low = kept["low"]
    met = "Missed" if kept["mean"] < wanted else "Met" if low is not None and low >= wanted else "Met in the mean only"
    return f"{met}: {agree} {on} ({number(wanted, 4)} asked for); {flops}."


def _compared(data: Mapping[str, Any]) -> str:
    """Return what rivals lose on the same images; those whose measured times turned out to be of other work are named."""
    said, apart = [], []
    own = _work_of(data["reached"], data["target"])
    for rival in data["against"]:
        d = rival["difference"]
        if abs(rival["work"] / own - 1) > _SAME_WORK:
            apart.append(f"{rival['name']} at {number(100 * rival['work'], 1)} %")
        elif d["low"] is None or d["high"] is None or d["low"] <= 0 <= d["high"]:
            said.append(f"no difference to {rival['name']} is shown")
        else:
            said.append(f"it loses {'less' if d['high'] < 0 else 'more'} than {rival['name']}")
    same = f"At the same work {', and '.join(said)}." if said else ""
    if not apart:
        return same
    other = f"{' and '.join(apart)} of the {_work(data)}, the plan at {number(100 * own, 1)} %"
    return f"{same} Not at the same work, so not compared: {other}.".strip()


def _work_of(reached: Mapping[str, Any], target: Mapping[str, float]) -> float:
    """Share of the work that is used: of the time where a speed was asked for, else of the FLOPs."""
    return float(1 / reached["speed"] if "speed" in target else reached["flops"]["mean"])


def _interval(value: Mapping[str, float | None], digits: int = 4) -> str:
    return interval(value["mean"], value["low"], value["high"], digits)


def _work(data: Mapping[str, Any]) -> str:
    return "time" if "speed" in data["target"] else "FLOPs"


def _held_out(data: Mapping[str, Any]) -> Table:
    reached = data["reached"]
    own = _work_of(reached, data["target"])
    rows = [["this plan", own, _cell(reached["loss"]), "-"]]
    rows += [[r["name"], r["work"], _cell(r["loss"]), _cell(r["difference"])] for r in data["against"]]
    head = [
        "plan",
        f"share of the {_work(data)} used",
        reached["measure"],
        "this plan less that one (below 0: it loses less)",
    ]
    return Table(head, rows, f"On {data['images']['held_out']} images held back, mean [95 % interval]")


def _cell(value: Mapping[str, Any]) -> Cell:
    return Cell(_interval(value), value["mean"])


def _costs(data: Mapping[str, Any]) -> list[Curves]:
    """Per share of the tokens a chart of what leaving costs at one layer alone."""
    made = []
    curves = data.get("costs") or []
    chosen = {row["place"] if row["place"] != "input" else -1 for row in data["layers"]}
    for share in sorted({curve["share"] for curve in curves}):
        lines = [
            Line(
                _told(curve["method"], [other["method"] for other in curves]),
                curve["mean"],
                curve["low"],
                curve["high"],
                [float(p) for p in curve["places"]],
            )
            for curve in curves
            if curve["share"] == share
        ]
        title = f"Loss when {share:.0%} of the tokens are dropped at one layer alone"
        note = f"band: 95 % interval; chosen: {', '.join(mark('layer', p, str(p)) for p in sorted(chosen))}"
        made.append(Curves(title, lines, y=data["reached"]["measure"], note=note, zero=True))
    return made


def _told(settings: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """Name a method by what tells it from the others of its name: two curves of one name would be one to the reader."""
    rivals = [other for other in among if other["method"] == settings["method"]]
    keys = [key for key in settings if any(other.get(key) != settings[key] for other in rivals)]
    apart = [
        f"{key} {settings[key]:g}" if isinstance(settings[key], float) else f"{key} {settings[key]}" for key in keys
    ]
    centred = ["centred"] if settings.get("center") and "center" not in keys else []
    return ", ".join([str(settings["method"]), *centred, *apart])


def _frontier(data: Mapping[str, Any]) -> tuple[Plot, Table] | None:
    """The plan, its rivals and plans for other budgets, as a plot and a table; None where there are no other budgets."""
    found = [point for point in data.get("frontier") or [] if "reached" in point]
    if not found:
        return None
    timed = "speed" in data["target"]
    least = "agreement" not in data["reached"]

    def at(name: str, group: str, x: float, of: Mapping[str, Any]) -> Point:
        y = of["loss"] if least else of["agreement"]
        x = round(x, 2)  # plans of the same budget differ by a token or less, which shall not make one unbeaten
        return Point(name, group, x, y["mean"], y_low=y["low"], y_high=y["high"])

    points = [Point("unpruned", "unpruned", 1.0, 0.0 if least else 1.0)]
    points.append(at("this plan", "this plan", 1 / _work_of(data["reached"], data["target"]), data["reached"]))
    points += [
        at(
            f"tuned for {number(p['work'], 2)} of the {_work(data)}",
            "tuned",
            1 / _work_of(p["reached"], data["target"]),
            p["reached"],
        )
        for p in found
    ]
    points += [at(rival["name"], rival["name"], 1 / rival["work"], rival) for rival in data["against"]]
    measure = data["reached"]["measure"] if least else "agreement with the unpruned model"
    x = "measured speed-up, batch 1" if timed else "times fewer FLOPs"
    note = "whiskers: 95 % interval on images held back; the line joins plans that none beats in both"
    axis = measure.partition(" with ")[0]
    plot = Plot("Other budgets", points, x=x, y=measure, axis=axis, note=note, least=least, wide=True)
    best = front(points, least=least)
    rows = [
        [
            Cell(f"{i}: {p.name}", float(i)),
            p.x,
            Cell(interval(p.y, p.y_low, p.y_high, 4), p.y),
            "yes" if p in best else "no",
        ]
        for i, p in enumerate(points, 1)
    ]
    return plot, Table(["plan", x, measure, "unbeaten"], rows, "Other budgets, by the numbers of the plot")


def _missing(data: Mapping[str, Any]) -> Group | None:
    missing: Sequence[Mapping[str, Any]] = [p for p in data.get("frontier") or [] if "missing" in p]
    if not missing:
        return None
    items = [f"{number(p['work'], 2)} of the {_work(data)}: {p['missing']}" for p in missing]
    return Group([Text("No plan was found for:"), Listing(items)], box=True)
