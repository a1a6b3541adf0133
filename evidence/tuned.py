"""Tuned plans on photographs that they were not tuned on: `python evidence/tuned.py --photos DIR --tuned-on 96 PLAN...`.

Plans are files of `saint tune MODEL --images DIR --limit 96`, whose photographs are left out here. Rivals get the FLOPs that the
plan leaves of the encoder (batch 1), as in evidence/matching.py; errors are paired by photograph.
Writes evidence/results/tuned-MODEL.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matching import FOLDER, PUBLISHED, SMALLER, Subject, summary

from saint.lab.cli.common import pictures
from saint.lab.records import environment, write_json
from saint.plans import Plan

RIVALS = [
    PUBLISHED,
    "Saint, layers 0, 1",
    "ToMe (beta 0), all layers",
    "ToMe (beta 1), all layers",
    "PiToMe (beta 0), all layers",
    "Random, layers 0-5",
    SMALLER,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tuned-on", type=int, default=96, help="photographs of the plans, evenly spaced")
    parser.add_argument(
        "--limit", type=int, default=150, help="photographs of the check, evenly spaced among the others"
    )
    options = parser.parse_args()
    used = {photo.name for photo in pictures(options.photos, options.tuned_on, {})[0]}
    others = [photo for photo in pictures(options.photos, 10**6, {})[0] if photo.name not in used]
    photos = [others[i * len(others) // options.limit] for i in range(min(options.limit, len(others)))]
    plans = [Plan.load(file) for file in options.plans]
    (model,) = {plan.tuned["model"] for plan in plans}
    subject, results = Subject(model, photos), []
    for plan in plans:
        share = subject.flops(plan) / subject.full
        measure, own = subject.values(plan)
        row = {"target": plan.tuned["target"], "plan": json.dumps(plan.to_dict()), "measure": measure, "rivals": {}}
        for name in RIVALS:
            side = subject.fitted_side(share + 0.005) if name == SMALLER else None  # its FLOPs are a staircase
            rival = None if side else subject.fitted(name, share)
            values = subject.values(rival, side)[1]
            # the ratio is that of the plan's error to the rival's
            paired = summary(np.array(own), np.array(values))
            row["rivals"][name] = {
                "reached": round(subject.flops(rival, side) / subject.full, 4),
                "mean": round(float(np.mean(values)), 5),
                "ratio": paired["error_ratio"],
                "ratio_interval": paired["ratio_interval"],
            }
        row |= {"reached": round(share, 4), "mean": paired["mean"], "interval": paired["interval"]}
        results.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "plan"}), flush=True)
    write_json(
        FOLDER / f"tuned-{model.partition(':')[2]}.json",
        {"kind": "tuned", "model": model, "images": len(photos), "results": results, "environment": environment("cpu")},
    )


if __name__ == "__main__":
    main()
