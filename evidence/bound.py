"""How much choosing could win: the best of many random subsets of each photograph, and of the plans of matching.py.

    python evidence/bound.py --photos DIR --model demo:clip-b16

Random subsets leave at layers 0 and 1, so that as much of the FLOPs is left as in evidence/matching.py; the best of k draws is
taken photograph by photograph, with the output in view. Writes evidence/results/bound-MODEL.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matching import EARLY, FOLDER, PLANS, Subject, numbers, summary

import saint
from saint.lab.cli.common import pictures
from saint.lab.records import environment, write_json
from saint.methods import Random

SHARE = 0.505
DRAWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--model", default="demo:clip-b16", choices=["demo:clip-b16", "demo:dinov2-s"])
    options = parser.parse_args()
    name = options.model.partition(":")[2]
    others = [
        row for row in json.loads((FOLDER / f"matching-{name}.json").read_text())["results"] if row["share"] == SHARE
    ]
    known = np.array([numbers(row) for row in others if row["name"] in PLANS])
    best = known[np.argmax(known.mean(1))]
    record = {
        "kind": "bound",
        "model": options.model,
        "share": SHARE,
        "plans": len(known),
        "photographs": known.shape[1],
    }
    record["best plan of all photographs"] = summary(best, best)
    record["best plan of each photograph"] = summary(known.max(0), best)

    subject = Subject(options.model, pictures(options.photos, options.limit, {})[0])
    fitted = subject.fitted("Random, layers 0, 1", SHARE)
    keep = fitted.vision[0].method.keep
    drawn = []
    for seed in range(DRAWS):
        stage = saint.Stage(Random(keep=keep, seed=seed), layers=EARLY, output=fitted.vision[0].output)
        drawn.append(subject.values(saint.Plan(vision=stage))[1])
        print(seed, round(float(np.max(drawn, axis=0).mean()), 4), flush=True)
    found = np.array(drawn)
    rng = np.random.default_rng(0)
    record["random"] = {"photographs": len(subject.photos), "draws": DRAWS, "best of": {}}
    for k in (1, 4, 16, 64):  # of k of the draws, mean over sets of them
        sets = [found[rng.permutation(DRAWS)[:k]].max(0) for _ in range(1 if k == DRAWS else 200)]
        record["random"]["best of"][str(k)] = round(float(np.mean(sets)), 4)
    write_json(FOLDER / f"bound-{name}.json", record | {"environment": environment("cpu")})


if __name__ == "__main__":
    main()
