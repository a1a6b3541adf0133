"""kNN of CLIP ViT-B/16 on pictures with labels, unpruned and at half of the FLOPs.

    python evidence/labelled.py --photos DIR --stamps DIR --fashion DIR --tuned PLAN

Photographs by the column `group` of their index.csv, stamps and Fashion-MNIST as in measure.py. The tuned plan is a file of
`saint tune demo:clip-b16 --target-flops 0.5`; the others keep as many tokens as leave at most as much work.
Writes evidence/results/labelled.json.
"""

import argparse
import csv
import dataclasses
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matching import FOLDER, PUBLISHED, Subject
from measure import FASHION, STAMPS, fashion_pictures, flops, stamps

from saint.lab import demo
from saint.lab.cli.common import pictures
from saint.lab.eval import Item, Samples, evaluate_images
from saint.lab.images import read_image
from saint.lab.records import environment, write_json
from saint.plans import Plan

RIVALS = {
    "saint": PUBLISHED,
    "match": "Match weigh, odd layers",
    "tome": "ToMe (beta 1), all layers",
    "random": "Random, layers 0-5",
}
FEW = ("saint", "match", "the tuned plan")  # on Fashion-MNIST


def photographs(folder: Path) -> Samples:
    rows = list(csv.DictReader((folder / "index.csv").open()))
    groups = sorted({row["group"] for row in rows})
    return Samples(
        [
            Item(r["file"], r["file"], partial(read_image, folder / r["file"]), label=groups.index(r["group"]))
            for r in rows
        ],
        groups,
    )


def stamp_pictures(folder: Path) -> Samples:
    named = ((file, str(file.relative_to(folder)), label) for file, label in stamps(folder))
    return Samples(
        [Item(name, name, partial(read_image, file), label=label) for file, name, label in named], list(STAMPS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("photos", "stamps", "fashion", "tuned"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=FOLDER.parent / "cache")
    options = parser.parse_args()
    fits = Subject("demo:clip-b16", pictures(options.photos, 8, {})[0])
    tuned = Plan.load(options.tuned)
    share = fits.flops(tuned) / fits.full
    plans = {"the tuned plan": tuned, **{name: fits.fitted(row, share) for name, row in RIVALS.items()}}
    sets = {
        "photographs": photographs(options.photos),
        "stamps": stamp_pictures(options.stamps),
        "Fashion-MNIST": fashion_pictures(options.fashion, 1500),
    }
    info = demo.MODELS["clip-b16"]
    model = info.load()
    record: dict[str, Any] = {
        "kind": "evidence/labelled",
        "command": "python evidence/labelled.py",
        "share": round(share, 4),
    }
    record["sets"] = []
    for title, samples in sets.items():
        used = {name: plan for name, plan in plans.items() if samples.classes != FASHION or name in FEW}
        report = evaluate_images(
            model, samples, used, batch=8, scores=["knn"], journal=options.cache / f"labelled-{title}.jsonl",
            inputs=lambda images: {"pixel_values": torch.stack([info.preprocess(i) for i in images])},
        )  # fmt: skip
        shown = [info.preprocess(sample.load()) for sample in random.Random(0).sample(samples.items, 4)]
        whole = flops(model, Plan(), shown)
        rows = [
            {
                "plan": name,
                "settings": plan.to_dict(),
                "flops": round(flops(model, plan, shown) / whole, 4),
                "knn": dataclasses.asdict(report.scores[name]["knn"]),
                "cosine": dataclasses.asdict(report.agreement[name]["cosine"]),
            }
            for name, plan in used.items()
        ]
        record["sets"].append({"set": title, "pictures": report.evaluated, "classes": samples.classes, "rows": rows})
        for row in rows:
            knn = row["knn"]
            print(
                title,
                row["plan"],
                row["flops"],
                *(round(100 * knn[key], 2) for key in ("base", "pruned", "low", "high")),
                flush=True,
            )
        write_json(FOLDER / "labelled.json", record | {"environment": environment("cpu")})


if __name__ == "__main__":
    main()
