"""Match against SAINT's votes, ToMe and random choice at equal FLOPs: `python evidence/matching.py --photos DIR`.

For each share of the FLOPs (batch 1) the budget of every plan is fitted by bisection, then the answers of the pruned model are
compared with the unpruned ones, photograph by photograph. Writes evidence/results/matching-*.json and prints a table.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import saint
from saint.bench.agreement import agreement
from saint.cli.common import load, pictures
from saint.flops import count_flops
from saint.methods import Match, Random, ToMe
from saint.records import environment, write_json

FOLDER = Path(__file__).parent / "results"
EARLY, HALF = [0, 1], list(range(6))
PLANS = {
    "Saint, layers 0-5": (lambda keep: saint.Saint(budget=keep), HALF),
    "Saint, layers 0, 1": (lambda keep: saint.Saint(budget=keep), EARLY),
    "Match, layers 0, 1": (lambda keep: Match(budget=keep), EARLY),
    "Match, layers 0-5": (lambda keep: Match(budget=keep), HALF),
    "ToMe (beta 0), layers 0-5": (lambda keep: ToMe(budget=keep, beta=0.0), HALF),
    "Random, layers 0, 1": (lambda keep: Random(keep=keep), EARLY),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--model", default="demo:clip-b16")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7])
    options = parser.parse_args()
    loaded = load(options.model, "cpu", size=None, threads=None)
    photos, _ = pictures(options.photos, options.limit)
    batches = [loaded.inputs([photo.image for photo in photos[i : i + 25]]) for i in range(0, len(photos), 25)]
    one = loaded.inputs([photos[0].image])
    output = "similar" if options.model == "demo:dinov2-s" else "survivors"

    def run(inputs):
        with torch.inference_mode():
            return loaded.model(**inputs)

    full = count_flops(lambda: run(one))[1].total
    base = [run(batch) for batch in batches]

    def plan_of(make, layers, keep):
        return saint.Plan(vision=saint.Stage(make(keep), layers=layers, output=output))

    def share_of(plan):
        with saint.apply(loaded.model, plan):
            return count_flops(lambda: run(one))[1].total / full

    results = []
    for share in options.shares:
        scores = {}
        for name, (make, layers) in PLANS.items():
            low, high = 0.5 ** len(layers) + 0.01, 1.0  # each drop point may halve at most
            for _ in range(10):
                middle = (low + high) / 2
                low, high = (low, middle) if share_of(plan_of(make, layers, middle)) > share else (middle, high)
            plan = plan_of(make, layers, low)
            with saint.apply(loaded.model, plan):
                pruned = [run(batch) for batch in batches]
            found = [agreement(a, b) for a, b in zip(base, pruned, strict=True)]
            scores[name] = np.array([value for part in found for value in part.values])
            results.append(
                {
                    "share": share,
                    "name": name,
                    "reached": share_of(plan),
                    "measure": found[0].measure,
                    "plan": plan.to_dict(),
                    **summary(scores[name], scores["Saint, layers 0-5"]),
                }
            )
            print(json.dumps({k: v for k, v in results[-1].items() if k != "plan"}), flush=True)
    name = options.model.partition(":")[2]
    write_json(
        FOLDER / f"matching-{name}.json",
        {
            "kind": "matching",
            "model": options.model,
            "images": len(photos),
            "results": results,
            "environment": environment("cpu"),
        },
    )


def summary(values: np.ndarray, published: np.ndarray) -> dict:
    """Mean, its 95 % interval, and the error (1 - mean) over that of the published rule, paired over photographs."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(values), (2000, len(values)))
    ratio = (1 - values[draws].mean(1)) / (1 - published[draws].mean(1))
    return {
        "mean": float(values.mean()),
        "interval": np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist(),
        "error_ratio": float((1 - values.mean()) / (1 - published.mean())),
        "ratio_interval": np.quantile(ratio, [0.025, 0.975]).tolist(),
    }


if __name__ == "__main__":
    main()
