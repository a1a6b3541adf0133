"""Which lever for which pictures: copies, smaller pictures, pruning, both, and both with softer attention, at three budgets.

    python evidence/levers.py run --photos DIR
    python evidence/levers.py tables

Photographs, pages of text, screens and drawn scenes; CLIP ViT-B/16 and DINOv2 ViT-S/14. Nothing is searched: each lever is what
`saint advise` tries. Writes evidence/results/levers.json after every row, and goes on where it was stopped; the second form
writes the tables of docs/which-lever.md.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from documents import documents, screens
from matching_pages import replaced
from PIL import Image

from saint.lab.cli.common import pictures
from saint.lab.demo import scenes
from saint.lab.describe import describe
from saint.lab.kinds import Encoder
from saint.lab.records import environment, write_json
from saint.lab.sources.items import Item
from saint.lab.tuning.advice import advise
from saint.plans import Plan

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "results" / "levers.json", HERE.parent / "docs" / "which-lever.md"
MODELS = {"demo:clip-b16": "CLIP ViT-B/16", "demo:dinov2-s": "DINOv2 ViT-S/14"}
BUDGETS = (0.65, 0.5, 0.35)
COUNT = 24  # pictures of a kind


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
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--photos", type=Path)
    options = parser.parse_args()
    if options.what == "tables":
        tables()
    elif options.photos is None:
        parser.error("run needs --photos DIR")
    else:
        run(options.photos)


if __name__ == "__main__":
    main()
