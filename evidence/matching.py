"""Plans, published rivals and smaller pictures at equal FLOPs: `python evidence/matching.py --photos DIR`.

For each share of the encoder's FLOPs (batch 1) the budget of every plan is fitted by bisection, then the answers of the pruned
model are compared with those of the unpruned one, photograph by photograph. The last row prunes nothing: the photograph is scaled
to the largest picture that costs no more. Writes evidence/results/matching-*.json; `--only` adds rows to what is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saint
from saint.flops import count_flops, left_out
from saint.lab.cli.common import pictures
from saint.lab.kinds import Encoder
from saint.lab.kinds.agreement import agreement
from saint.lab.records import environment, write_json
from saint.methods import Grid, Match, PiToMe, Random, ToMe

FOLDER = Path(__file__).parent / "results"
EARLY, HALF, ODD, ALL = [0, 1], list(range(6)), list(range(1, 12, 2)), list(range(12))
CARRIED = "Match merge, layers 2-11, carried"  # of dense outputs: the other rows copy the survivor
PUBLISHED = "Saint, layers 0-5"  # what the others are compared with
SMALLER = "smaller picture"
PLANS = {
    PUBLISHED: (lambda keep: saint.Saint(budget=keep), HALF),
    "Saint, layers 0, 1": (lambda keep: saint.Saint(budget=keep), EARLY),
    "Match, layers 0, 1": (lambda keep: Match(keep=keep), EARLY),
    "Match, layers 0-5": (lambda keep: Match(keep=keep), HALF),
    "Match weigh, layers 0-5": (lambda keep: Match(keep=keep, fate="weigh"), HALF),
    "Match weigh, odd layers": (lambda keep: Match(keep=keep, fate="weigh"), ODD),
    "Match merge, all layers": (lambda keep: Match(keep=keep, fate="merge", beta=1.0), ALL),
    "Match merge, layers 2-11": (lambda keep: Match(keep=keep, fate="merge", beta=1.0), ALL[2:]),
    CARRIED: (lambda keep: Match(keep=keep, fate="merge", beta=1.0), ALL[2:]),
    "ToMe (beta 0), layers 0-5": (lambda keep: ToMe(keep=keep, beta=0.0), HALF),
    "ToMe (beta 0), all layers": (lambda keep: ToMe(keep=keep, beta=0.0), ALL),
    "ToMe (beta 1), all layers": (lambda keep: ToMe(keep=keep), ALL),
    "PiToMe (beta 0), all layers": (lambda keep: PiToMe(keep=keep, beta=0.0), ALL),
    "PiToMe (beta 1), all layers": (lambda keep: PiToMe(keep=keep), ALL),
    "Random, layers 0, 1": (lambda keep: Random(keep=keep), EARLY),
    "Random, layers 0-5": (lambda keep: Random(keep=keep), HALF),
    "Grid, layers 0, 1": (lambda keep: Grid(keep=keep), EARLY),
    "Grid, layers 0-5": (lambda keep: Grid(keep=keep), HALF),
}


class Subject:
    """A demo model, its photographs and its answers to them, unpruned."""

    def __init__(self, name: str, photos: list[Any]) -> None:
        self.loaded, self.photos = Encoder.load(name), photos
        self.dense = name == "demo:dinov2-s"
        self.patch, self.side = 14 if self.dense else 16, self.loaded.image_size[0]
        self.full = self.flops()
        self.base = [self.run(inputs) for inputs in self.batches(self.side)]

    def inputs(self, photos: list[Any], side: int) -> dict[str, Any]:
        """Photographs, each scaled once from its file, as square pictures."""
        pixels = torch.stack([self.loaded.source.pixels(photo.image, (side, side)) for photo in photos])
        smaller = {} if self.dense or side == self.side else {"interpolate_pos_encoding": True}  # DINOv2 always does
        return {"pixel_values": pixels, **smaller}

    def batches(self, side: int) -> Any:
        return (self.inputs(self.photos[i : i + 25], side) for i in range(0, len(self.photos), 25))

    def run(self, inputs: dict[str, Any], part: str = "") -> Any:
        with torch.inference_mode():
            return self.loaded.model.get_submodule(part)(**inputs)

    def flops(self, plan: Any = None, side: int | None = None) -> int:
        """FLOPs of the encoder, for one picture: without the saliency head, on which no plan saves anything."""
        one = self.inputs(self.photos[:1], side or self.side)
        with saint.pruned(self.loaded.model, plan or saint.Plan()):
            found = count_flops(lambda: self.run(one, "backbone" if self.dense else ""))[1]
        if missing := left_out(found.uncounted):
            raise SystemExit(f"no share of the FLOPs can be published{missing}")
        return found.total

    def fitted(self, name: str, share: float) -> Any:
        """The plan with the largest budget whose FLOPs are at most ``share``; None where no budget is small enough."""
        make, layers = PLANS[name]
        output = "survivors" if not self.dense else "carried" if name == CARRIED else "similar"

        def plan(keep: float) -> Any:
            return saint.Plan(vision=saint.Stage(make(keep), layers=layers, output=output))

        low, high = 0.5 ** len(layers) + 0.01, 1.0  # each drop point may halve at most
        if self.flops(plan(low)) > share * self.full:
            return None
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if self.flops(plan(middle)) > share * self.full else (middle, high)
        return plan(low)

    def fitted_side(self, share: float) -> int | None:
        """The largest side in pixels, a multiple of the patches', whose FLOPs are at most ``share``."""
        sides = range(self.side, 0, -self.patch)
        return next((side for side in sides if self.flops(side=side) <= share * self.full), None)

    def values(self, plan: Any = None, side: int | None = None) -> tuple[str, list[float]]:
        """Agreement with the unpruned model at full resolution: what is measured, and each photograph's."""
        with saint.pruned(self.loaded.model, plan or saint.Plan()):
            answers = [self.run(inputs) for inputs in self.batches(side or self.side)]
        if side is not None and self.dense:
            answers = [torch.nn.functional.interpolate(a, (self.side, self.side), mode="bilinear") for a in answers]
        found = [agreement(a, b) for a, b in zip(self.base, answers, strict=True)]
        return found[0].measure, [round(value, 5) for part in found for value in part.values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--model", default="demo:clip-b16", choices=["demo:clip-b16", "demo:dinov2-s"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.35, 0.5, 0.6, 0.7, 0.85])
    parser.add_argument("--only", nargs="+", choices=[*PLANS, SMALLER], metavar="ROW", help="add these to the record")
    parser.add_argument("--record", type=Path, help="the file [default: in evidence/results, by the model's name]")
    options = parser.parse_args()
    file = options.record or FOLDER / f"matching-{options.model.partition(':')[2]}.json"
    photos, _ = pictures(options.photos, options.limit, {})
    names = " ".join(photo.name for photo in photos)
    rows, environments = stored(file, options.model, names) if options.only else ({}, [])
    here = environment("cpu")
    environments += [here] if here not in environments else []
    subject = Subject(options.model, photos)
    for share in options.shares:
        for name in options.only or [*PLANS, SMALLER]:
            plan = side = None
            if name == CARRIED and not subject.dense:
                continue
            if name == SMALLER:
                side = subject.fitted_side(share)
            else:
                plan = subject.fitted(name, share)
            if plan is None and side is None:
                print(f"{share} {name}: cannot be reached", flush=True)
                continue
            measure, values = subject.values(plan, side)
            if name == PUBLISHED:
                published = values
            elif (share, PUBLISHED) in rows:
                published = numbers(rows[share, PUBLISHED])
            else:
                raise SystemExit(f"no row {PUBLISHED!r} at {share} to compare with: measure it first (--only takes it)")
            rows[share, name] = {
                "share": share,
                "name": name,
                "reached": round(subject.flops(plan, side) / subject.full, 5),
                "measure": measure,
                "side": side or subject.side,
                "environment": environments.index(here),
                "plan": plan and json.dumps(plan.to_dict()),  # in one line: the record stays small
                **summary(np.array(values), np.array(published)),
                "values": " ".join(f"{value:.5f}" for value in values),
            }
            shown = {key: value for key, value in rows[share, name].items() if key not in ("plan", "values")}
            print(json.dumps(shown), flush=True)
        record = {"kind": "matching", "model": options.model, "images": len(photos), "photos": names}
        write_json(file, {**record, "results": list(rows.values()), "environments": environments})


def stored(file: Path, model: str, photos: str) -> tuple[dict[tuple[float, str], dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a record by share and name, and where they were measured; photographs must be the same, rows are paired by them."""
    if not file.is_file():
        raise SystemExit(f"{file} is not there to add rows to: run without --only first")
    record = json.loads(file.read_text())
    if record["model"] != model or record.get("photos") != photos:
        raise SystemExit(
            f"{file} holds {record['model']} on {record['images']} other photographs, or none of their values: run without --only"
        )
    return {(row["share"], row["name"]): row for row in record["results"]}, record["environments"]


def numbers(row: dict[str, Any]) -> list[float]:
    return [float(value) for value in row["values"].split()]


def summary(values: np.ndarray, published: np.ndarray) -> dict[str, Any]:
    """Mean, its 95 % interval, and the error (1 - mean) over that of the published rule, paired over photographs."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(values), (2000, len(values)))
    ratio = (1 - values[draws].mean(1)) / (1 - published[draws].mean(1))
    figures = {
        "mean": values.mean(),
        "interval": np.quantile(values[draws].mean(1), [0.025, 0.975]),
        "error_ratio": (1 - values.mean()) / (1 - published.mean()),
        "ratio_interval": np.quantile(ratio, [0.025, 0.975]),
    }
    return {key: np.round(value, 5).tolist() for key, value in figures.items()}


if __name__ == "__main__":
    main()
