"""Levers on answers of the small LLaVA: drawn scenes, and the same scenes pasted on plain backgrounds; and copies by page size.

    python evidence/levers_answers.py run [--pictures 40]
    python evidence/levers_answers.py pages
    python evidence/levers_answers.py tables

The first form asks every question about every picture with each lever (exact match, paired by picture with the unpruned model),
and times tower, prompt and answer of one question, unpruned and with each lever in turn. It writes
evidence/results/levers-answers.json. The second form counts which patches of rendered pages and screens are copies of others, at
several sizes, and writes levers-pages.json. The last form writes the tables of docs/which-lever.md.
"""

import argparse
import dataclasses
import json
from functools import partial
from typing import Any

import numpy as np
import torch
from cells import interval, percent
from documents import documents, screens
from levers import HERE, PAGE
from matching_pages import replaced
from measure_vlm import Answers
from PIL import Image

import saint
from saint import copies
from saint.lab.bench.timing import Spread, interleave
from saint.lab.demo import scenes
from saint.lab.eval import compare
from saint.lab.records import environment, write_json
from saint.lab.variants import BASE, variants
from saint.methods import Duplicates, Flat
from saint.plans import Plan, Stage

ANSWERS, PAGES = HERE / "results" / "levers-answers.json", HERE / "results" / "levers-pages.json"
TOKENS = 196
TIMED = 12  # rounds
SIDE, INSIDE = 224, 160  # pixels of a picture, and of a scene pasted into one: whole patches
PLAIN = ((255, 255, 255), (236, 239, 244), (24, 26, 32))
SIZES, PATCHES, COUNT = (224, 448, 672, 896), (14, 16, 28), 24  # 28: a square of patches of a Qwen tower


def levers() -> dict[str, Plan]:
    """By what they are called in the table."""
    made = {
        "copies": Plan(vision=Duplicates()),
        "blocks of one colour": Plan(vision=Flat(side=2)),
    }
    for share in (0.5, 0.25):
        made[f"smaller pictures, {share:.0%}"] = Plan(pixels=share)
        made[f"pruning in front of the tower, {share:.0%}"] = Plan(
            vision=Stage(saint.SaintFullGraph(keep=share), placement="input")
        )
        made[f"pruning behind the tower, {share:.0%}"] = Plan(connector=saint.SaintFullGraph(keep=share))
        made[f"smaller pictures and pruning, {share:.0%}"] = Plan(
            pixels=share**0.5, connector=saint.SaintFullGraph(keep=share**0.5)
        )
    return made


def pasted(image: Image.Image, number: int) -> Image.Image:
    """A scene in the middle of a plain background, as pictures stand on pages and screens."""
    page = Image.new("RGB", (SIDE, SIDE), PLAIN[number % len(PLAIN)])
    edge = (SIDE - INSIDE) // 2
    page.paste(image.convert("RGB").resize((INSIDE, INSIDE)), (edge, edge))
    return page


def run(count: int) -> None:
    drawn = [scenes.scene(scenes.HELD_OUT + 80_000 + i) for i in range(count)]
    kinds = {
        "scenes": [(scene.image(), scene.questions()) for scene in drawn],
        "scenes on plain backgrounds": [(pasted(s.image(), i), s.questions()) for i, s in enumerate(drawn)],
    }
    record: dict[str, Any] = {"kind": "evidence/levers-answers", "pictures": count, "rows": []}
    for kind, about in kinds.items():
        answers = Answers(about)
        base, _ = answers.ask(Plan())
        times = timed(answers.model, about[0])
        record["questions"] = sum(len(questions) for _, questions in about)
        for name, plan in levers().items():
            found, tokens = answers.ask(plan)
            paired = compare(base["all"], found["all"])
            left = [own / whole for own, whole in zip(times[name], times[BASE], strict=True)]
            row = {"pictures": kind, "lever": name, "left": tokens / TOKENS, "settings": plan.to_dict()}
            row |= {"paired": dataclasses.asdict(paired), "time": vars(Spread.of(left))}
            record["rows"].append(row)
            print(
                kind, name, f"{row['left']:.2f} {paired.pruned:.3f} {interval(row['paired'])}", row["time"], flush=True
            )
            write_json(ANSWERS, {**record, "environment": environment("cpu")})


def timed(model: torch.nn.Module, about: tuple[Image.Image, list[scenes.Question]]) -> dict[str, list[float]]:
    """Ms of an answer to a question about one picture, by lever, one per round."""
    inputs = saint.demo.inputs("small-llava", about[0], about[1][0].text)
    with variants(model, levers()) as made:
        runs = {
            name: partial(variant.model.generate, **inputs, max_new_tokens=3, do_sample=False)
            for name, variant in made.items()
        }
        return interleave(runs, torch.device("cpu"), TIMED, warmup=2)


def pages() -> None:
    rows = []
    for kind, draw in (("pages", documents), ("screens", screens)):
        for side in SIZES:
            images = list(draw(COUNT, side))
            for patch in PATCHES:
                left = [1 - float(copies.repeated(patches(image, patch)).float().mean()) for image in images]
                spread = [round(float(value), 4) for value in np.quantile(left, [0.1, 0.5, 0.9])]
                rows.append({"pictures": kind, "side": side, "patch": patch, "left": spread})
    write_json(PAGES, {"kind": "evidence/levers-pages", "pictures": COUNT, "rows": rows})


def patches(image: Image.Image, patch: int) -> torch.Tensor:
    """Values of the patches of a picture, row by row, [1, N, V]."""
    pixels = torch.from_numpy(np.array(image)).float()  # [H, W, 3]
    cells = pixels.unfold(0, patch, patch).unfold(1, patch, patch)
    return cells.flatten(2).flatten(0, 1).unsqueeze(0)


def answers_table() -> list[str]:
    record = json.loads(ANSWERS.read_text())
    lines = [
        "",
        "| pictures | lever | tokens left | right | difference, points | time left |",
        "|---|---|---|---|---|---|",
    ]
    seen = ""
    for row in record["rows"]:
        paired, time = row["paired"], row["time"]
        if row["pictures"] != seen:
            seen = row["pictures"]
            lines.append(f"| {seen} | none | 100% | {percent(paired['base'])} | | |")
        cells = [seen, row["lever"], f"{row['left']:.0%}", percent(paired["pruned"]), interval(paired)]
        lines.append(f"| {' | '.join(cells)} | {time['median']:.2f} [{time['p20']:.2f}, {time['p80']:.2f}] |")
    said = f"{record['questions']} questions about {record['pictures']} pictures of each kind, one thread."
    return [*lines, "", said, ""]


def pages_table() -> list[str]:
    record = json.loads(PAGES.read_text())
    head = [f"{side} px" for side in SIZES]
    lines = ["", f"| pictures | patch | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for kind in ("pages", "screens"):
        for patch in PATCHES:
            found = {
                row["side"]: row["left"] for row in record["rows"] if (row["pictures"], row["patch"]) == (kind, patch)
            }
            cells = [f"{1 - median:.0%} [{1 - high:.0%}, {1 - low:.0%}]" for low, median, high in map(found.get, SIZES)]
            lines.append(f"| {kind} | {patch} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "pages", "tables"])
    parser.add_argument("--pictures", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.pictures)
    elif options.what == "pages":
        pages()
    else:
        text = replaced(PAGE.read_text(), "levers-answers", answers_table())
        PAGE.write_text(replaced(text, "levers-pages", pages_table()))


if __name__ == "__main__":
    main()
