"""What was kept of pictures, with a slider over layers: of `saint view`, `saint demo` and `saint analyze`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from statistics import fmean
from typing import Any

from .blocks import (
    Block,
    Charts,
    Curves,
    Figure,
    Gallery,
    Group,
    Heading,
    Highlight,
    Line,
    More,
    Picture,
    PlanBox,
    Sheet,
    Table,
    Text,
)
from .figure import Step, drawn_as_seen, steps_on_grid
from .measured import uncounted
from .reading import Record, behind, mark_of, point
from .reasons import Why
from .told import conditions, load_note, skipped
from .words import names, number, plan_line

MOST = 12  # pictures of a record that are drawn


def gallery(record: Record) -> Group | None:
    """The figures of a record's photographs; sheets that lie beside it where it has no pictures of its own."""
    photos = record.data.get("photos") or record.data.get("survivors") or []
    made: list[Figure | Picture | Group] = [
        figure
        for photo in photos[:MOST]
        for figure in pictures_of(photo, record.data.get("grid"))
        if figure.uri is not None
    ]
    left_out = f"The first {MOST} of {len(photos)} pictures." if len(photos) > MOST else ""
    if not made:
        made = [*_sheets(record)]
        left_out = ""
    if not made:
        note = _of(record)
        return Group([Heading("What was kept"), *note], page_only=True) if note else None
    keys = ""
    if not record.data.get("files") or left_out or _own(photos):
        keys = "Hatched patches were dropped; the slider goes through the drop points. "
    return Group([Heading("What was kept"), *_of(record), Text(keys + left_out), Gallery(made)], page_only=True)


def _of(record: Record) -> list[Block]:
    """Say which plan an analysis shows, and which pictures it could not."""
    of = record.data.get("survivors_of")
    if of is None:
        return []
    bad = "; ".join(f"{where}: {why}" for where, why in of.get("left_out") or [])
    said: list[Block] = [Text(f"Of {of['why']}: {plan_line(of['plan'])}.")]
    return [*said, Text(f"Not shown: {bad}.")] if bad else said


def _own(photos: Sequence[Mapping[str, Any]]) -> bool:
    return any(photo.get("picture") or photo.get("pictures") for photo in photos)


def pictures_of(photo: Mapping[str, Any], grid: Sequence[int] | None) -> Iterable[Figure]:
    """The figure of each tile of a photograph."""
    name, layers = str(photo["name"]), photo["layers"]
    if "tiles" not in photo:
        own = photo.get("grid") or grid
        if own is not None:
            steps = steps_on_grid(layers, int(own[0]) * int(own[1]))
            yield drawn_as_seen(name, photo.get("picture"), own, layers, steps)
        return
    tiles, uris = photo["tiles"], photo.get("pictures") or []
    counts = [int(rows) * int(columns) for rows, columns in tiles]
    for tile, (grid_, uri) in enumerate(zip(tiles, uris, strict=False)):
        first = sum(counts[:tile])
        steps, of = [], []
        for step in layers:
            title = step["stage"] if step["stage"] == "connector" else f"{step['stage']}, {behind(step)}"
            mark = {"vision": f"v{mark_of(step)}", "connector": "c"}.get(step["stage"], str(step["layer"]))
            if step["stage"] == "vision":
                if int(step["sample"]) == tile:
                    steps.append(Step(title, step["kept"], step["tokens_in"], mark, Why.of(step, 0, counts[tile])))
                    of.append(step)
            elif sum(counts) == photo["visual_tokens"]:  # otherwise the prompt has tokens that lie on no grid
                here = [int(k) - first for k in step["kept"] if first <= int(k) < first + counts[tile]]
                steps.append(Step(title, here, step["tokens_in"], mark, Why.of(step, first, counts[tile])))
                of.append(step)
        yield drawn_as_seen(
            f"{name}, tile {tile + 1} of {len(tiles)}" if len(tiles) > 1 else name, uri, grid_, of, steps
        )


def _sheets(record: Record) -> list[Picture]:
    """Pictures named in "files", from the record's own folder."""
    made = []
    for file in (record.data.get("files") or [])[:MOST]:
        name = str(file)
        if PurePath(name).name != name or "\\" in name or name.startswith("."):
            raise ValueError(f"a picture beside a record is named by its file name alone, got {name!r:.80}")
        path = record.folder / name
        if path.is_file():
            made.append(Picture(f"sheet {name}", name, file=path.read_bytes(), wide=True))
    return made


def token_curves(record: Record) -> Charts | None:
    """Tokens kept behind each drop point, mean and range over photographs, and the table of it."""
    photos = record.data["photos"]
    by_step: dict[tuple[str, str, int, int], list[tuple[int, int]]] = {}
    for photo in photos:
        for step in photo["layers"]:
            by_step.setdefault(point(step), []).append((int(step["tokens_in"]), int(step["tokens_out"])))
    figures = []
    for stage in dict.fromkeys(stage for stage, *_ in by_step):
        own = {(layer, where, group): found for (name, where, layer, group), found in by_step.items() if name == stage}
        if len(own) < 2:
            continue  # one drop point is no curve, and the pictures say its number
        # of several in front of the layers, what the last one leaves
        kept = {(layer, where): [out for _, out in found] for (layer, where, _), found in own.items()}
        several = len(photos) > 1
        lowest, highest = ([float(f(v)) for v in kept.values()] if several else [] for f in (min, max))
        means = [fmean(v) for v in kept.values()]
        line = Line(f"tokens kept ({stage})", means, lowest, highest, [layer for layer, _ in kept])
        note = "mean; band: lowest to highest picture" if several else "one picture"
        whole = fmean(came for came, _ in next(iter(own.values())))
        figures.append(
            Curves(f"Tokens kept, {stage}", [line], y="tokens", note=note, zero=True, whole=("unpruned", whole))
        )
    return Charts(figures) if figures else None


def view_sheet(record: Record) -> Sheet:
    """`saint view`."""
    data = record.data
    photos = data["photos"]
    shares = [share for photo in photos if (share := _share(photo)) is not None]
    verdict, highlights = "The plan has no drop point: every token is kept.", []
    if shares:
        among = f"mean of {len(shares)} pictures; {number(100 * min(shares), 1)} to {number(100 * max(shares), 1)} %"
        among = "one picture" if len(shares) == 1 else among
        verdict = f"{number(100 * fmean(shares), 1)} % of the tokens are kept behind the last drop point ({among})."
        highlights = [
            Highlight(
                "kept", f"{100 * fmean(shares):.0f} %", f"of the tokens, behind the last layer that drops ({among})"
            )
        ]
    asked = f"Which patches does each layer of {data['model']} keep?"
    if data.get("prompt") is not None:
        asked = f"Asked “{data['prompt']}”, which visual tokens does {data['model']} keep?"
    blocks: list[Block | None] = [
        PlanBox(data["plan"], name=data.get("plan_name", "")),
        *(Text(f"Pictures were shrunk {own['shrunk']}.") for own in (data.get("pictures") or {}).values()),
        gallery(record),
        token_curves(record) if shares else None,
        skipped(record),
    ]
    return Sheet(
        f"What is kept: {data['model']}",
        asked,
        verdict,
        conditions(record, pictures=names([p["name"] for p in photos])),
        blocks,
        highlights,
    )


def kept_of(photo: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return, for each stage of a plan, its name ("" where it is alone), the tokens kept behind it, and those in front of it.

    The first is what the processor left of the tokens, where it was given a smaller picture.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for step in photo["layers"]:
        stages.setdefault(str(step.get("stage", "vision")), []).append(step)
    found = []
    if (whole := photo.get("visual_tokens_unpruned")) is not None:
        found.append(("smaller picture", int(photo["visual_tokens"]), int(whole)))
    for stage, steps in stages.items():
        total, kept = (
            sum(int(s[key]) for s in steps if point(s) == point(end))
            for key, end in (("tokens_in", steps[0]), ("tokens_out", steps[-1]))
        )
        found.append((stage if len(stages) > 1 or whole is not None else "", kept, total))
    return found


def _share(photo: Mapping[str, Any]) -> float | None:
    """Tokens behind the last drop point / tokens in front of the first, or of the whole picture where it was made smaller."""
    steps, whole = photo["layers"], photo.get("visual_tokens_unpruned")
    total = photo.get("visual_tokens") if whole is None else whole
    if not steps:
        return None if whole is None else int(photo["visual_tokens"]) / int(whole)
    kept = sum(int(s["tokens_out"]) for s in steps if point(s) == point(steps[-1]))
    if total is None:
        total = int(steps[0]["tokens_in"])
    return kept / int(total)


def demo_sheet(record: Record) -> Sheet:
    """`saint demo`."""
    data = record.data
    photos, agreement = data["photos"], data["agreement"]
    pictures = f"{len(photos)} picture{'s' if len(photos) != 1 else ''}"
    faster = f"{number(data['speedup'], 2)} times as fast (FLOPs bound {number(data['flops_bound'], 2)})"
    same = f"{agreement['measure']} of {number(agreement['mean'], 4)} (lowest {number(agreement['min'], 4)})"
    verdict = (
        f"With the plan the model runs {faster}, and its {agreement['of']} agrees with the unpruned one to a {same} on "
        f"{pictures}."
    )
    shares = [share for photo in photos if (share := _share(photo)) is not None]
    first = photos[0]["bench"]["conditions"] if photos else {}
    busy = load_note(record, first)
    highlights = [
        *([Highlight("kept", f"{100 * fmean(shares):.0f} %", f"of the tokens, mean of {pictures}")] if shares else []),
        Highlight(
            "faster", f"{number(data['flops_bound'], 2)}x", f"by FLOPs; measured {number(data['speedup'], 2)}x on this machine",
            "the machine was busy" if busy else "",
        ),
        Highlight("agreement", number(agreement["mean"], 3), f"{agreement['measure']} with the unpruned output"),
    ]  # fmt: skip
    rows = []
    for photo in photos:
        bench, steps = photo["bench"], photo["layers"]
        kept = f"{steps[-1]['tokens_out']} of {steps[0]['tokens_in']}" if steps else "all"
        rows.append([photo["name"], kept, bench["base"]["median"], bench["pruned"]["median"], bench["speedup"]["median"],
                     bench["bound"], photo["agreement"]])  # fmt: skip
    head = ["picture", "tokens kept", "ms unpruned", "ms pruned", "speed-up", "FLOPs bound", agreement["measure"]]
    timed = f"{first.get('repeats')} interleaved rounds per picture, batch {first.get('batch')}."
    blocks: list[Block | None] = [
        busy,
        PlanBox(data["plan"], name=data.get("plan_name", "")),
        _plans(data),
        gallery(record),
        Table(head, rows, "Per picture"),
        uncounted(sorted({name for photo in photos for name in photo["bench"].get("uncounted") or ()})),
        token_curves(record),
        skipped(record),
        More("how it was timed", [Text(timed)]),
    ]
    more = {
        "title": data.get("title"),
        "pictures": names([p["name"] for p in photos]),
        "pixels": _pixels(data.get("image_size")),
    }
    return Sheet(
        f"Demo: {data['model']}",
        f"What does pruning change in {data['model']} on photographs?",
        verdict,
        conditions(record, **more),
        blocks,
        highlights,
    )


def _plans(data: Mapping[str, Any]) -> Group | None:
    """The plan and another one, where two were shown."""
    if (beside := data.get("beside")) is None:
        return None
    rows = []
    for run in (data, beside):
        agreement = run["agreement"]
        rows.append([run["plan_name"], run["speedup"], run["flops_bound"], agreement["mean"], agreement["min"]])
    head = ["plan", "speed-up", "FLOPs bound", f"{data['agreement']['measure']}, mean", "lowest"]
    other = Text(f"{beside['plan_name']}: {plan_line(beside['plan'])}")
    return Group([other, Table(head, rows, "Against the unpruned model")])


def _pixels(size: Sequence[int] | None) -> str | None:
    return None if size is None else " x ".join(str(side) for side in size)
