"""Which lever for which pictures: copies, smaller pictures, pruning, both, and both with softer attention, at three budgets.

    python evidence/levers.py run --photos DIR
    python evidence/levers.py tuned --photos DIR
    python evidence/levers.py times --photos DIR
    python evidence/levers.py tables

Photographs, pages of text, screens and drawn scenes; CLIP ViT-B/16 and DINOv2 ViT-S/14. Nothing is searched by the first form:
each lever is what `saint advise` tries. It writes evidence/results/levers.json after every row, and goes on where it was stopped.
The second form runs `saint tune` for 0.35 of the FLOPs on photographs, a third of them held back, and writes
levers-tuned-MODEL.json (--model for one of them). The third form times the levers, one picture after another, unpruned and pruned
in turn, and writes levers-times-MODEL.json. The last form writes the tables of docs/which-lever.md.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from documents import documents, screens
from matching_pages import replaced
from PIL import Image

from saint.flops import count_flops
from saint.lab.bench.timing import Spread, interleave
from saint.lab.cli.common import pictures
from saint.lab.demo import scenes
from saint.lab.describe import describe
from saint.lab.kinds import Encoder, around
from saint.lab.records import environment, write_json
from saint.lab.sources.items import Item
from saint.lab.tuning import Target, search
from saint.lab.tuning.advice import DUPLICATES, advise, made
from saint.lab.variants import BASE, variants
from saint.plans import Plan

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "results" / "levers.json", HERE.parent / "docs" / "which-lever.md"
MODELS = {"demo:clip-b16": "CLIP ViT-B/16", "demo:dinov2-s": "DINOv2 ViT-S/14"}
BUDGETS = (0.65, 0.5, 0.35)
COUNT = 24  # pictures of a kind
TIMED = 10  # rounds
TUNED, TARGET = 64, 0.35  # photographs, and share of the FLOPs, of tuned plans


def kinds(folder: Path) -> dict[str, list[Image.Image]]:
    """The pictures, by kind."""
    drawn = (scenes.scene(scenes.HELD_OUT + 70_000 + i).image() for i in range(COUNT))
    return {
        "photographs": [photo.image for photo in pictures(folder, COUNT, {})[0]],
        "pages": list(documents(COUNT)),
        "screens": list(screens(COUNT)),
        "scenes": list(drawn),
    }


def run(folder: Path) -> None:
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": []}
    done = {(row["model"], row["pictures"]["kind"], row["target"]) for row in record["rows"]}
    shown = kinds(folder)
    for name in MODELS:
        subject = Encoder.load(name)
        for kind, images in shown.items():
            data = [subject.inputs([Item.photo(kind, image, "?")], [image]) for image in images]
            for target in BUDGETS:
                if (name, kind, target) in done:
                    continue
                found = advise(subject, data, target, facts={"model": name})
                found["pictures"]["kind"] = kind
                for one in (
                    found,
                    *found["levers"],
                ):  # told, not kept: they are made again from the model and the target
                    one["plan"] = None if one["plan"] is None else describe(Plan.from_dict(one["plan"]))
                record["rows"].append(found)
                told = {
                    one["name"]: (round(one["flops"], 3), round(one["agreement"]["mean"], 4))
                    for one in found["levers"]
                    if one["plan"]
                }
                print(name, kind, target, found["advice"], told, flush=True)
                write_json(RECORD, {"kind": "levers", **record, "environment": environment(subject.device)})


def times(folder: Path, names: Iterable[str]) -> None:
    """Time each lever on photographs, where its plan depends on no picture, and copies on each kind of picture."""
    for name in names:
        subject = Encoder.load(name)
        shown = {
            kind: [subject.inputs([Item.photo(kind, image, "?")], [image]) for image in images[:TIMED]]
            for kind, images in kinds(folder).items()
        }
        rows: list[dict[str, Any]] = []
        for target in BUDGETS:
            plans = made(subject, shown["photographs"], target)
            copies = plans.pop(DUPLICATES)
            rows += [{"target": target, **row} for row in _timed(subject, plans, shown["photographs"])]
        for kind, data in shown.items():
            rows += [{"pictures": kind, **row} for row in _timed(subject, {DUPLICATES: copies}, data)]
        record = {"kind": "evidence/levers-times", "model": name, "threads": torch.get_num_threads(), "rounds": TIMED}
        write_json(_times_file(name), {**record, "environment": environment(subject.device), "rows": rows})


def _timed(subject: Encoder, plans: Mapping[str, Plan], data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Share of the FLOPs and of the time that each plan leaves: median and spread of the ratios of rounds."""
    with variants(subject.model, plans) as found, torch.inference_mode():
        runs = {name: partial(_next, variant.model, cycle(data)) for name, variant in found.items()}
        times = interleave(runs, torch.device(subject.device), TIMED, warmup=2)
        some = data if DUPLICATES in plans else data[:1]  # copies alone depend on the picture
        flops = {name: fmean(_flops(variant.model, one) for one in some) for name, variant in found.items()}
    rows = []
    for name in plans:
        left = Spread.of([own / base for own, base in zip(times[name], times[BASE], strict=True)])
        told = {part: round(value, 4) for part, value in vars(left).items()}
        rows.append({"lever": name, "flops": round(flops[name] / flops[BASE], 4), "time": told})
        print(subject.title, rows[-1], flush=True)
    return rows


def _next(model: torch.nn.Module, data: Iterator[Mapping[str, Any]]) -> None:
    """Run the next picture; each round is another one, the same of all models."""
    model(**next(data))


def _flops(model: torch.nn.Module, inputs: Mapping[str, Any]) -> int:
    return count_flops(lambda: model(**inputs))[1].total


def _times_file(name: str) -> Path:
    return HERE / "results" / f"levers-times-{name.removeprefix('demo:')}.json"


def times_table() -> list[str]:
    """FLOPs and time that are left, beside each other."""
    lines = ["", "| model | lever | FLOPs left | time left |", "|---|---|---|---|"]
    for name, title in MODELS.items():
        if not _times_file(name).exists():
            continue
        for row in json.loads(_times_file(name).read_text())["rows"]:
            lever = row["lever"] + (f", {row['pictures']}" if "pictures" in row else "")
            time = row["time"]
            cells = [
                title,
                lever,
                f"{row['flops']:.2f}",
                f"{time['median']:.2f} [{time['p20']:.2f}, {time['p80']:.2f}]",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def tuned(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        loaded = Encoder.load(name)
        photos = [photo.image for photo in pictures(folder, TUNED, {})[0]]
        data = [loaded.inputs([Item.photo("photograph", image, "?")], [image]) for image in photos]
        # the embedding of DINOv2, without the head that the demo has on it
        subject = loaded if name == "demo:clip-b16" else around(loaded.model.backbone)
        found = search(subject, data, Target(flops=TARGET), facts={"model": name}).record
        kept = {
            key: found[key]
            for key in ("model", "images", "target", "lever", "logn", "layers", "reached", "against", "date")
        }
        write_json(_tuned_file(name), {"kind": "levers-tuned", **kept, "environment": environment(subject.device)})
        print(name, kept["lever"], kept["reached"]["loss"], flush=True)


def _tuned_file(name: str) -> Path:
    return HERE / "results" / f"levers-tuned-{name.removeprefix('demo:')}.json"


def tuned_table() -> list[str]:
    """What the tuned plan loses on photographs held back, and what each lever alone does."""
    lines = [
        "",
        "| model | plan | FLOPs left | loss (1 - cosine) | the tuned plan less this one |",
        "|---|---|---|---|---|",
    ]
    for name, title in MODELS.items():
        if not _tuned_file(name).exists():
            continue
        record = json.loads(_tuned_file(name).read_text())
        reached = record["reached"]
        plan = f"**tuned: {record['lever']}, logn {record['logn']:g}**"
        lines.append(f"| {title} | {plan} | {reached['flops']['mean']:.3f} | {_within(reached['loss'])} | |")
        for rival in record["against"]:
            cells = [title, rival["name"], f"{rival['work']:.3f}", _within(rival["loss"]), _within(rival["difference"])]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _within(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(rows: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """Rows of a model: a line for each kind of picture and budget, a column for each lever."""
    chosen = [row for row in rows if row["model"] == name]
    names = [lever["name"] for lever in chosen[0]["levers"]]
    lines = ["", f"| pictures | FLOPs left | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for row in chosen:
        cells = []
        for lever in row["levers"]:
            if lever["plan"] is None:
                cells.append("-")
                continue
            value = lever["agreement"]
            text = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            text += f" at {lever['flops']:.2f}" if abs(lever["flops"] - row["target"]) > 0.02 else ""
            cells.append(f"**{text}**" if lever["name"] == row["advice"] else text)
        lines.append(f"| {row['pictures']['kind']} | {row['target']:.2f} | {' | '.join(cells)} |")
    return [*lines, ""]


def looks(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the pictures are like, as CLIP is shown them."""
    lines = ["", "| pictures | copies | blocks of one colour | fine detail |", "|---|---|---|---|"]
    for row in rows:
        if row["model"] == "demo:clip-b16" and row["target"] == BUDGETS[0]:
            seen = row["pictures"]
            lines.append(f"| {seen['kind']} | {seen['copies']:.0%} | {seen['flat']:.0%} | {seen['detail']:.2f} |")
    return [*lines, ""]


def tables() -> None:
    record, text = json.loads(RECORD.read_text()), PAGE.read_text()
    text = replaced(text, "looks", looks(record["rows"]))
    for name in MODELS:
        text = replaced(text, f"levers-{name.removeprefix('demo:')}", table(record["rows"], name))
    text = replaced(text, "levers-times", times_table())
    PAGE.write_text(replaced(text, "levers-tuned", tuned_table()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tuned", "times", "tables"])
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model", choices=list(MODELS))
    options = parser.parse_args()
    if options.what == "tables":
        tables()
    elif options.photos is None:
        parser.error(f"{options.what} needs --photos DIR")
    elif options.what in ("tuned", "times"):
        {"tuned": tuned, "times": times}[options.what](options.photos, [options.model] if options.model else MODELS)
    else:
        run(options.photos)


if __name__ == "__main__":
    main()
