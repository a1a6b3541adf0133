"""Sections of `saint bench` and `saint eval`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import (
    Block,
    Cell,
    Charts,
    Curves,
    Group,
    Heading,
    Highlight,
    Line,
    Listing,
    More,
    PlanBox,
    Sheet,
    Table,
    Text,
)
from .reading import Record, place
from .told import conditions, load_note, skipped
from .words import YES_OR_NO, interval, names, number, plan_line


def forward_sheet(record: Record) -> Sheet:
    """`saint bench` of an encoder."""
    data = record.data
    speedup = data["speedup"]
    ratio = _spread(speedup, 2)
    bound = number(data["bound"], 2)
    if speedup["p20"] > 1:
        verdict = f"With the plan the model runs {ratio} times as fast as unpruned; FLOPs would allow {bound}."
    elif speedup["p80"] < 1:
        verdict = f"With the plan the model is slower: {ratio} times the speed of the unpruned one; FLOPs would allow {bound}."
    else:
        verdict = f"No speed-up shows: {ratio} times the unpruned speed, within the spread of rounds; FLOPs would allow {bound}."
    rows = []
    variants = {"base": "unpruned", "pruned": "pruned", "eager": "pruned, eager attention"}
    for key, name in variants.items():
        if (spread := data.get(key)) is not None:
            cost = data["costs"][key]
            rows.append([name, Cell(_spread(spread, 2), spread["median"]), cost["flops"] / 1e9, cost["memory"]])
    layers = data["layers"]
    places = [place(e) for e in layers]
    shown = [
        Line("tokens in", [e["tokens_in"] for e in layers], x=places),
        Line("tokens out", [e["tokens_out"] for e in layers], x=places),
    ]
    if any(e["slots"] > e["tokens_out"] for e in layers):  # a ragged batch costs what its longest sample does
        shown.append(Line("padded to", [float(e["slots"]) for e in layers], x=places))
    whole = ("unpruned", layers[0]["tokens_in"]) if layers else None
    around = Curves("Tokens around each drop point", shown, y="tokens", note="batch mean", zero=True, whole=whole)
    curves = [around] if layers else []
    given = data["conditions"]
    blocks: list[Block | None] = [
        load_note(record, given),
        PlanBox(data["plan"], name=data.get("plan_name", "")),
        *_over_pictures(data),
        Table(
            ["variant", "ms per forward: median [p20, p80]", "GFLOPs", "activations MiB"], rows, _forward_caption(given)
        ),
        _rate(data),
        Text(f"Efficiency (speed-up / FLOPs bound): {efficiency(data['efficiency'])}."),
        _overhead(data.get("overhead")),
        uncounted(data.get("uncounted")),
        Charts(curves),
        skipped(record),
    ]
    more = {
        "pictures": names(data["images"]),
        "pixels": " x ".join(str(side) for side in data["image_size"]),
        "batch": given["batch"],
        "rounds": f"{given['repeats']} interleaved after {given['warmup']} of warm-up",
    }
    asked = f"How much faster is {data['model']} with this plan?"
    highlights = _fast(data, given)
    return Sheet(f"Speed: {data['model']}", asked, verdict, conditions(record, **more), blocks, highlights)


def _fast(data: Mapping[str, Any], given: Mapping[str, Any]) -> list[Highlight]:
    """Tokens and speed of a forward."""
    layers, pictures = data["layers"], names(data["images"])
    made = []
    if layers:
        share = layers[-1]["tokens_out"] / layers[0]["tokens_in"]
        made.append(Highlight("kept", f"{share:.0%}", "of the tokens, behind the last layer that drops"))
    ratio = _spread(data["speedup"], 2)
    made.append(
        Highlight("faster", f"{number(data['speedup']['median'], 2)}x", f"measured, {ratio}, batch {given['batch']}")
    )
    made.append(Highlight("bound", f"{number(data['bound'], 2)}x", f"what the FLOPs would allow; pictures: {pictures}"))
    return made


def _rate(data: Mapping[str, Any]) -> Text | None:
    """Say how many images a second that is; None of a record without."""
    if (rate := data.get("images_per_second")) is None:
        return None
    return Text(f"Images per second: {number(rate['base'], 2)} unpruned, {number(rate['pruned'], 2)} pruned.")


def _forward_caption(given: Mapping[str, Any]) -> str:
    several = given.get("forwards", 1)
    return f"Forward, mean of {several} pictures" if several > 1 else "Forward"


def efficiency(value: float) -> str:
    """Speed-up / FLOPs bound; more than 1 is said to be what it is."""
    return (
        number(value, 2) if value <= 1 else f"{number(value, 2)} (more than the work went down by: noise of the timing)"
    )


def _efficiency(value: float) -> Cell:
    return Cell(number(value) + (" (noise)" if value > 1 else ""), value)


_EATEN = 0.05  # of the work: what padding may cost before it is worth a word


def _over_pictures(data: Mapping[str, Any]) -> list[Block]:
    """Say what the plan leaves of many pictures, which of them were timed, and whether padding eats the gain."""
    if (over := data.get("pictures")) is None:
        return []
    kept, flops, counted = over["kept"], over["flops"], len(over["counts"])
    several, one = counted > 1, data["images"][0]
    spread = {
        name: "" if r["low"] == r["high"] else f" ({_percent(r['low'])} to {_percent(r['high'])})"
        for name, r in (("kept", kept), ("flops", flops))
    }
    text = f"{counted} picture{'s' if several else ''}, each alone: "
    text += (
        f"{_percent(kept['mean'])} % of the tokens are kept{spread['kept']}, "
        f"and {_percent(flops['mean'])} % of the work (FLOPs) is left{spread['flops']}."
    )
    batch, timed = data["conditions"]["batch"], len(over["timed"])
    if batch == 1 and several:
        text += f" Every picture keeps the same number, so one was timed ({one})." if over["fixed"] else ""
        text += "" if over["fixed"] else f" Timed: {names(data['images'], timed)}, which stand for all of them."
    blocks: list[Block] = [Text(text)]
    alone = [over["counts"][i] for i in over["timed"]]
    mean = sum(one["pruned"] for one in alone) / sum(one["base"] for one in alone)
    padded = data["costs"]["pruned"]["flops"] / data["costs"]["base"]["flops"]
    if batch > 1 and padded - mean > _EATEN:
        blocks.append(
            Text(
                f"Padding eats the gain: a batch is as long as its longest picture, so {_percent(padded)} % of the work is left, "
                f"where its pictures alone would have {_percent(mean)} %. A plan that keeps the same number of every picture "
                'pads nothing: --keep 0.5, budget="batch" in the plan, saint.freeze, or a plan of saint tune.',
                warning=True,
            )
        )
    return blocks


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _overhead(own: Mapping[str, Any] | None) -> Text | None:
    if own is None:
        return None
    share = own["share"]
    text = (
        f"Pruning itself: scoring {number(own['scoring']['median'], 2)} ms, gathering {number(own['gathering']['median'], 2)} "
        f"ms, together {number(100 * share['median'], 2)} % of the unpruned forward "
        f"[{number(100 * share['p20'], 2)}, {number(100 * share['p80'], 2)}]."
    )
    if (idle := own.get("keep_all")) is not None:
        ends = f"[{number(100 * idle['p20'], 2)}, {number(100 * idle['p80'], 2)}]"
        if idle["p20"] <= 0:
            text += f" The same plan when nothing goes takes no more time that shows {ends} %."
        else:
            text += f" The same plan when nothing goes takes {number(100 * idle['median'], 2)} % more time {ends}."
    return Text(text)


def uncounted(operators: list[str] | None) -> Text | None:
    """Say what FLOPs, and the bounds made of them, leave out; None where it is nothing."""
    return Text(f"The FLOPs leave out {', '.join(operators)}.", warning=True) if operators else None


def generation_sheet(record: Record) -> Sheet:
    """`saint bench` of a vision-language model."""
    data = record.data
    gains, times = data["gains"], data["times"]
    best = max(gains, key=lambda name: gains[name]["first"]["median"], default=None)
    if best is None:
        verdict = "No plan was timed."
    elif gains[best]["first"]["p20"] > 1:
        verdict = f"The first token comes soonest with “{best}”: {_spread(gains[best]['first'], 2)} times as fast as unpruned."
    else:
        ratio = _spread(gains[best]["first"], 2)
        verdict = f"No plan shows a faster first token; the best, “{best}”, is at {ratio} times the unpruned speed."
    rows = []
    for name, t in times.items():
        row: list[Any] = ["unpruned" if name == "base" else name]
        row += [
            _cell(t["first"]),
            _cell(t["per_token"]),
            _cell(t["total"]),
            _cell(t["tokens_per_second"]),
            t["kv_bytes"] / 2**20,
            t["prefill"]["flops"] / 1e9,
        ]
        rows.append(row)
    gained = [
        [
            name,
            _cell(gain["first"]),
            gain["bound"],
            _efficiency(gain["efficiency"]),
            _cell(gain["total"]),
            _cell(gain["decode"]),
            Cell(f"{gain['kv']:.0%}", gain["kv"]),
        ]
        for name, gain in gains.items()
    ]
    head = [
        "",
        "first token ms",
        "ms per token",
        "total ms",
        "tokens/s",
        "KV MiB",
        "prefill GFLOPs",
    ]
    than = ["", "first token", "FLOPs bound", "efficiency", "end to end", "time of a further token", "KV"]
    given = data["conditions"]
    plans = [
        (name, _told(plan, (data.get("tokens") or {}).get(name)) + _shrunk(given, name))
        for name, plan in data["plans"].items()
    ]
    blocks: list[Block | None] = [
        load_note(record, given),
        Table(head, rows, "Generation, median [p20, p80]"),
        Table(than, gained, "Against the unpruned model: times as fast"),
        Text(
            "A further token's time and the KV cache are shares of the unpruned model's: below 1 is faster, or smaller."
        ),
        uncounted(sorted({name for gain in gains.values() for name in gain.get("uncounted") or ()})),
        Heading("Plans"),
        Listing(plans),
        skipped(record),
    ]
    more = {
        "question": data["prompt"],
        "pictures": names(data["images"]),
        "tokens": f"{given['prompt_tokens']} of the prompt, {given['new_tokens']} new, batch {given['batch']}",
        "rounds": f"{given['repeats']} interleaved after {given['warmup']} of warm-up",
    }
    asked = f"How much sooner does {data['model']} answer with each plan?"
    return Sheet(f"Speed: {data['model']}", asked, verdict, conditions(record, **more), blocks)


def _told(plan: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]] | None) -> str:
    """A plan in a line, and the visual tokens that its stages keep."""
    kept = [f"{one['stage']} {number(one['tokens_out'], 1)} of {number(one['tokens_in'], 1)}" for one in tokens or ()]
    return plan_line(plan) + (f"; tokens kept: {', '.join(kept)}" if kept else "")


def _shrunk(given: Mapping[str, Any], plan: str) -> str:
    """Say so where the pictures of a plan were shrunk in front of the model."""
    own = (given.get("pictures") or {}).get(plan)
    return "" if own is None else f"; pictures were shrunk {own['shrunk']}"


def scores_sheet(record: Record) -> Sheet:
    """`saint eval images` and `saint eval vqa`."""
    data = record.data
    given = data["conditions"]
    said = [_outcome(plan, scores, data["agreement"].get(plan, {})) for plan, scores in data["scores"].items()]
    said = [part for part in said if part]
    verdict = "; ".join(said) + "." if said else "Nothing was scored."
    blocks: list[Block | None] = [
        Listing([(name, plan_line(plan) + _shrunk(given, name)) for name, plan in data["plans"].items()]),
        plan_table(data),
        Text("one class only: every neighbour has the right label, so knn says nothing", warning=True)
        if given.get("classes") == 1 and "knn" in (given.get("scores") or ())
        else None,
        *_against_first(data),
        _details(data),
    ]
    if data["failures"]:
        items = [f"{failure['where']}: {failure['reason']}" for failure in data["failures"][:20]]
        blocks.append(Group([Heading(f"Not evaluated: {len(data['failures'])}"), Listing(items)], page_only=True))
    what = "questions" if record.kind == "eval/vqa" else "images"
    more = {what: f"{data['evaluated']} of {data['given']} evaluated", "example_prompt": given.get("example_prompt")}
    model = given.get("model", "the model")
    asked = f"What does pruning cost {model} in {'right answers' if record.kind == 'eval/vqa' else 'accuracy and agreement'}?"
    return Sheet(f"Accuracy: {model}", asked, verdict, conditions(record, **more), blocks)


_NAMES = {"kept": "tokens kept", "flops": "FLOPs left"}  # of measures, where they have another name for people
_SHARES = ("kept", "flops", *YES_OR_NO)  # measures in %


def plan_table(data: Mapping[str, Any], speeds: Mapping[str, Any] | None = None) -> Table:
    """A row per plan: tokens kept, FLOPs left, speed where it was measured, agreement, scores with their differences.

    Args:
        data: with ``agreement`` and ``scores``, as an evaluation has them.
        speeds: by plan "flops", "kept" (shares), "speedup" (a spread) and "bound".
    """
    measures = list(dict.fromkeys(name for found in data["agreement"].values() for name in found))
    measures = [*(name for name in _NAMES if name in measures), *(name for name in measures if name not in _NAMES)]
    if speeds is not None:
        measures = [name for name in measures if name not in _NAMES]
    scores = list(dict.fromkeys(name for found in data["scores"].values() for name in found))
    unpruned: list[Any] = ["unpruned", *("100 %" if name in _SHARES else "-" for name in measures)]
    rows = []
    for plan in data["plans"]:
        found, scored = data["agreement"][plan], data["scores"][plan]
        row: list[Any] = [plan]
        if speeds is not None:
            own = speeds[plan]
            row += [_share(own["kept"]), _share(own["flops"]), _cell(own["speedup"]), own["bound"]]
        row += [_measured(name, found.get(name)) for name in measures]
        for score in scores:
            row += _scored(scored.get(score))
        rows.append(row)
    for score in scores:
        base = next(found[score]["base"] for found in data["scores"].values() if score in found)
        unpruned += [Cell(f"{100 * base:.1f}", base), "-"]
    if speeds is not None:
        unpruned[1:1] = ["100 %", "100 %", "1", "1"]
    head = ["plan"]
    head += ["tokens kept", "FLOPs left", "speed-up [p20, p80]", "FLOPs bound"] if speeds is not None else []
    head += [_NAMES.get(name, name.replace("_", " ")) + ("" if name in _NAMES else " [95 %]") for name in measures]
    for score in scores:
        head += [f"{score} %", f"{score} difference [95 %]"]
    of = "; FLOPs of the language model's layers for the prompt" if "same_answer" in measures and speeds is None else ""
    return Table(head, [unpruned, *rows], f"Plans, on {data['evaluated']} samples{of}")


def _share(value: float | None) -> Any:
    return "-" if value is None else Cell(f"{_percent(value)} %", value)


def _measured(name: str, summary: Mapping[str, Any] | None) -> Any:
    if summary is None:
        return "-"
    if name in _NAMES:
        return _share(summary["mean"])
    low, high = summary.get("low"), summary.get("high")
    if name in _SHARES:
        ends = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
        return Cell(f"{100 * summary['mean']:.1f} %{ends}", summary["mean"])
    return Cell(interval(summary["mean"], low, high, 4), summary["mean"])


def _scored(p: Mapping[str, Any] | None) -> list[Any]:
    """A score under a plan, and how far it is from that of the unpruned model, in points."""
    if p is None:
        return ["-", "-"]
    return [Cell(f"{100 * p['pruned']:.1f}", p["pruned"]), Cell(_points(p), p["difference"])]


def _points(p: Mapping[str, Any]) -> str:
    ends = "" if p["low"] is None or p["high"] is None else f" [{100 * p['low']:+.1f}, {100 * p['high']:+.1f}]"
    return f"{100 * p['difference']:+.1f}{ends}"


def _against_first(data: Mapping[str, Any]) -> list[Block]:
    """Say how further plans compare with the first: another question than what each loses."""
    first = next(iter(data["plans"]), "")
    said = {
        plan: ", ".join(f"{score} {_points(p)}" for score, p in scores.items())
        for plan, scores in (data.get("against_first") or {}).items()
    }
    return [Text(f"Against the first plan, {first}: {plan} {words} points.") for plan, words in said.items() if words]


def _details(data: Mapping[str, Any]) -> More | None:
    """Return the counts behind the scores, by category, and the spread of the agreement over samples."""
    tables: list[Block] = []
    rows = [row for plan, scores in data["scores"].items() for row in _rows(plan, "all", scores)]
    rows += [
        row
        for group, plans in data["categories"].items()
        for plan, scores in plans.items()
        for row in _rows(plan, group, scores)
    ]
    if rows:
        head = [
            "plan",
            "category",
            "score",
            "n",
            "unpruned %",
            "pruned %",
            "difference [95 %]",
            "better",
            "worse",
            "could show",
        ]
        tables.append(
            Table(head, rows, "Scores, in %; could show: smallest true difference seen with 80 % probability")
        )
    rows = [
        [plan, measure, Cell(_agreement(measure, s, spread=True), s["mean"]), s["n"]]
        for plan, measures in data["agreement"].items()
        for measure, s in measures.items()
    ]  # fmt: skip
    if rows:
        tables.append(Table(["plan", "measure", "mean [p20, p80]", "n"], rows, "Agreement with the unpruned model"))
    rows = [row for plan, scores in (data.get("against_first") or {}).items() for row in _rows(plan, "all", scores)]
    if rows:
        first = next(iter(data["plans"]))
        head = [
            "plan",
            "category",
            "score",
            "n",
            f"{first} %",
            "this %",
            "difference [95 %]",
            "better",
            "worse",
            "could show",
        ]
        tables.append(Table(head, rows, f"Against the first plan, {first}"))
    return More("counts, categories and what could be shown", tables) if tables else None


def _outcome(plan: str, scores: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    """Say on how many samples a plan gives what the unpruned model does, and how its first score differs; "" of neither."""
    same = next((name for name in YES_OR_NO if name in measures), None)
    kept, named = "", f"“{plan}”"
    if same is not None:
        found, tokens = measures[same], measures.get("kept")
        share = "" if tokens is None else f" with {number(100 * tokens['mean'], 1)} % of the tokens"
        kept = f"{named} keeps {YES_OR_NO[same]} on {round(found['mean'] * found['n'])} of {found['n']}{share}"
    for score, found in scores.items():
        return f"{kept or named}: {_difference(score, found)}"
    if kept:
        return f"{kept} (no labels, so no accuracy)"
    for name, summary in measures.items():
        return f"{named}: {name} with the unpruned model {_agreement(name, summary)} (no labels, so no accuracy)"
    return ""


def _difference(score: str, found: Mapping[str, Any]) -> str:
    change = f"{score} {number(100 * found['base'], 1)} % unpruned, {number(100 * found['pruned'], 1)} % pruned"
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return f"{change}, of {found['n']} sample{'s' if found['n'] != 1 else ''}: too few for an interval"
    ends = f"difference {100 * found['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    if low > 0 or high < 0:
        return f"{change}, {ends}"
    could = (
        ""
        if found["detectable"] is None
        else f"; {found['n']} samples could have shown {number(100 * found['detectable'], 1)} points"
    )
    return f"{change}, no difference shown ({ends}{could})"


def _rows(plan: str, group: str, scores: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for score, p in _distinct(scores):
        ends = "" if p["low"] is None or p["high"] is None else f" [{100 * p['low']:+.2f}, {100 * p['high']:+.2f}]"
        could = "-" if p["detectable"] is None else Cell(f"{100 * p['detectable']:.2f}", p["detectable"])
        rows.append(
            [
                plan,
                group,
                score,
                p["n"],
                Cell(f"{100 * p['base']:.2f}", p["base"]),
                Cell(f"{100 * p['pruned']:.2f}", p["pruned"]),
                Cell(f"{100 * p['difference']:+.2f}{ends}", p["difference"]),
                p["better"],
                p["worse"],
                could,
            ]
        )
    return rows


def _distinct(scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Scores that are equal in everything as one, by all their names: two rows of the same figures say nothing new."""
    found: list[tuple[list[str], Any]] = []
    for name, score in scores.items():
        same = next((names_ for names_, other in found if other == score), None)
        if same is None:
            found.append(([name], score))
        else:
            same.append(name)
    return [(" = ".join(names_), score) for names_, score in found]


def _agreement(name: str, summary: Mapping[str, Any], *, spread: bool = False) -> str:
    if name in YES_OR_NO:
        return f"{100 * summary['mean']:.1f} %"
    ends = (summary["p20"], summary["p80"]) if spread else (None, None)
    return interval(summary["mean"], ends[0], ends[1], 4)


def _spread(spread: Mapping[str, Any], digits: int) -> str:
    return interval(spread["median"], spread["p20"], spread["p80"], digits)


def _cell(spread: Mapping[str, Any] | None) -> Any:
    return "-" if spread is None else Cell(_spread(spread, 2), spread["median"])
