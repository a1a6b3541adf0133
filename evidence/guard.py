"""What the guard of fine detail does to photographs, pages of text and drawn scenes at equal mean FLOPs.

    python evidence/guard.py --photos DIR

CLIP ViT-B/16, one method and its layers. For each share of the FLOPs and each guard the budget is fitted so that the mean FLOPs
over a tenth of the mix, one picture at a time, are at most that share: what pages keep more, photographs keep less.
Writes evidence/results/guard.json.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from documents import documents
from matching import FOLDER, ODD, Subject
from scipy.stats import spearmanr

import saint
from saint.flops import count_flops
from saint.lab.cli.common import pictures
from saint.lab.demo import scenes
from saint.lab.records import environment, write_json
from saint.methods import Match
from saint.vision.guard import detail

GUARDS = (0.0, 0.5, 0.8)


def mix(folder: Path) -> dict[str, list[Any]]:
    """60 photographs, 40 pages and 30 scenes, by kind."""
    drawn = (scenes.scene(scenes.HELD_OUT + 70_000 + i).image() for i in range(30))
    return {
        "photographs": pictures(folder, 60, {})[0],
        "pages": [SimpleNamespace(image=page) for page in documents(40)],
        "scenes": [SimpleNamespace(image=scene) for scene in drawn],
    }


def plan(keep: float, guard: float) -> saint.Plan:
    return saint.Plan(vision=saint.Stage(Match(keep=keep, fate="weigh"), layers=ODD, guard=guard))


def work(subject: Subject, candidate: saint.Plan) -> float:
    """Mean share of the FLOPs over every thirteenth picture, one at a time."""
    with saint.pruned(subject.loaded.model, candidate):
        ones = [subject.inputs([photo], subject.side) for photo in subject.photos[::13]]
        spent = [count_flops(lambda one=one: subject.run(one))[1].total for one in ones]
    return sum(spent) / len(spent) / subject.full


def fitted(subject: Subject, share: float, guard: float) -> saint.Plan | None:
    low, high = 0.03, 1.0
    if work(subject, plan(low, guard)) > share:
        return None
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if work(subject, plan(middle, guard)) > share else (middle, high)
    return plan(low, guard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7])
    options = parser.parse_args()
    shown = mix(options.photos)
    kinds = np.array([kind for kind, photos in shown.items() for _ in photos])
    subject = Subject("demo:clip-b16", [photo for photos in shown.values() for photo in photos])
    details = np.concatenate([detail(batch["pixel_values"]).numpy() for batch in subject.batches(subject.side)])
    record: dict[str, Any] = {
        "kind": "guard",
        "model": "demo:clip-b16",
        "pictures": {k: len(p) for k, p in shown.items()},
    }
    record["detail"] = {k: np.round(np.quantile(details[kinds == k], [0.05, 0.5, 0.95]), 3).tolist() for k in shown}
    record["rows"] = rows = []
    print(record["detail"])
    for share in options.shares:
        for guard in GUARDS:
            found = fitted(subject, share, guard)
            if found is None:
                print(f"{share} guard {guard}: cannot be reached", flush=True)
                continue
            losses = 1 - np.array(subject.values(found)[1])
            row = {
                "share": share,
                "guard": guard,
                "keep": round(found.vision[0].method.fixed, 4),
                "reached": round(work(subject, found), 4),
                "loss": {k: round(float(losses[kinds == k].mean()), 4) for k in shown},
                "mean": round(float(losses.mean()), 4),
                "95 % are below": round(float(np.quantile(losses, 0.95)), 4),
                "rank correlation of detail and loss": round(float(spearmanr(details, losses).statistic), 3),
            }
            rows.append(row)
            print(row, flush=True)
            write_json(FOLDER / "guard.json", record | {"environment": environment("cpu")})


if __name__ == "__main__":
    main()
