"""Measured speed of the plans of matching.py: `python evidence/matching_speed.py --photos DIR --model demo:clip-b16`.

Plans of a share, the smaller picture and the unpruned model take turns in one process, on the same photographs and weights. Adds
"speedup" (by batch size: median, 20th and 80th percentile over rounds of unpruned over pruned time) to the rows of the record.
"""

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from matching import FOLDER, PUBLISHED, SMALLER, Subject

import saint
from saint.lab.bench.timing import Spread, interleave
from saint.lab.cli.common import pictures
from saint.lab.records import environment, write_json
from saint.lab.variants import copy_sharing_weights

TIMED = (
    PUBLISHED,
    "Match weigh, odd layers",
    "Match merge, all layers",
    "ToMe (beta 1), all layers",
    "Random, layers 0-5",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="demo:clip-b16", choices=["demo:clip-b16", "demo:dinov2-s"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.505])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = FOLDER / f"matching-{options.model.partition(':')[2]}.json"
    record = json.loads(file.read_text())
    subject = Subject(options.model, pictures(options.photos, 8, {})[0])
    for share in options.shares:
        rows = [r for r in record["results"] if r["share"] == share and r["name"] in (*TIMED, SMALLER)]
        for batch in (1, 8):
            given = {
                side: subject.inputs(subject.photos[:batch], side)
                for side in {subject.side, *(r["side"] for r in rows)}
            }
            with ExitStack() as stack:
                runs = {"unpruned": partial(forward, copy_sharing_weights(subject.loaded.model), given[subject.side])}
                for row in rows:
                    model = copy_sharing_weights(subject.loaded.model)
                    if row["plan"] is not None:
                        stack.enter_context(saint.pruned(model, saint.Plan.from_json(row["plan"])))
                    runs[row["name"]] = partial(forward, model, given[row["side"]])
                times = interleave(runs, torch.device("cpu"), options.rounds, 2)
            for row in rows:
                ratios = [base / own for base, own in zip(times["unpruned"], times[row["name"]], strict=True)]
                spread = Spread.of(ratios)
                found = {"median": spread.median, "p20": spread.p20, "p80": spread.p80}
                row.setdefault("speedup", {})[str(batch)] = {name: round(value, 3) for name, value in found.items()}
                print(
                    share, batch, row["name"], f"bound {1 / row['reached']:.2f}", row["speedup"][str(batch)], flush=True
                )
    write_json(file, {**record, "timed": environment("cpu")})


def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        model(**inputs)


if __name__ == "__main__":
    main()
