"""Measure what `saint.apply(model, keep=...)` gains and costs on the demo models, and write benchmarks/results/keep-MODEL.json.

    python benchmarks/keep.py clip-b16 --photos DIR     # a folder of photographs, 50 or more
    python benchmarks/keep.py dinov2-s --photos DIR
    python benchmarks/keep.py small-llava               # questions about generated scenes

One row per share. Speed: unpruned and pruned interleaved, at batch 1 and 8, beside the bound of the FLOPs. Agreement of encoders:
each photograph's answer with its unpruned one, the mean with a bootstrap interval over photographs; of the small LLaVA the share
of right answers, paired. `make tables` puts the rows into README.md and docs/.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import saint
from saint.lab.analysis import bootstrap
from saint.lab.bench import Spread, bench_forward, bench_generation
from saint.lab.eval import Question, evaluate_vqa
from saint.lab.kinds.agreement import agreement
from saint.lab.records import environment, write_json
from saint.lab.sources.items import evenly
from saint.lab.sources.photos import load_images
from saint.lab.variants import BASE, variants
from saint.plans import Plan

KEEPS = {"clip-b16": (0.7, 0.5, 0.35), "dinov2-s": (0.7, 0.5, 0.35), "small-llava": (0.5,)}
BATCHES = (1, 8)
PLAN = "keep"  # the name under which the pruned variant runs
FEWEST = 50  # photographs
RESAMPLES = 10_000
NEW_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Speed:
    """A speed-up at one batch size.

    Attributes:
        speedup: unpruned over pruned, of the same round: of a forward of the encoder, or to the first token of an answer.
        bound: FLOPs of unpruned over pruned.
        uncounted: operators that the bound leaves out.
    """

    speedup: Spread
    bound: float
    uncounted: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """A model at one share of its work; a line of the tables of README.md and docs/results.md.

    Attributes:
        model: the name behind ``demo:``.
        keep: what ``saint.apply`` was asked for.
        plan: what it chose, as data.
        agreement: ``measure`` ("cosine", "correlation") with ``mean``, ``low``, ``high`` over ``n`` pictures; or ("right
            answers") with ``base``, ``pruned``, ``difference``, ``low``, ``high`` of the difference, as shares of ``n``
            questions.
        speed: by batch size, "1" and "8".
        conditions: of the timing at each batch size.
    """

    model: str
    keep: float
    plan: dict[str, Any]
    agreement: dict[str, Any]
    speed: dict[str, Speed]
    conditions: dict[str, Any]


def encoder_row(name: str, model: Any, plan: Plan, pictures: Sequence[Image.Image], repeats: int) -> tuple[Any, ...]:
    """Agreement, speed and conditions of an encoder; the encoder alone is timed, for a dense head is the same work in both."""
    measure, values = "", []
    with torch.inference_mode(), variants(model, {PLAN: plan}) as made:
        for inputs in batches(name, pictures):
            found = agreement(made[BASE].model(**inputs), made[PLAN].model(**inputs))
            measure, values = found.measure, values + found.values
    mean, low, high = bootstrap.interval(np.array(values), bootstrap.weights(len(values), RESAMPLES))
    agreed = {"measure": measure, "mean": float(mean), "low": float(low), "high": float(high), "n": len(values)}
    speed, conditions = {}, {}
    for batch in BATCHES:
        inputs = saint.demo.inputs(name, pictures[:batch])
        bench = bench_forward(getattr(model, "backbone", model), plan, inputs, repeats=repeats, extras=False)
        speed[str(batch)] = Speed(bench.speedup, bench.bound, bench.uncounted)
        conditions[str(batch)] = bench.conditions
    return agreed, speed, conditions


def batches(name: str, pictures: Sequence[Image.Image]) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of eight pictures each."""
    for first in range(0, len(pictures), 8):
        yield saint.demo.inputs(name, pictures[first : first + 8])


def llava_row(name: str, model: Any, plan: Plan, scenes: Sequence[Any], repeats: int) -> tuple[Any, ...]:
    """Right answers, speed to the first token and conditions of the small LLaVA."""
    asked = [
        Question(scene.image(), question.text, (question.answer,)) for scene in scenes for question in scene.questions()
    ]
    report = evaluate_vqa(model, saint.demo.processor(name), asked, {PLAN: plan}, batch=16, max_new_tokens=NEW_TOKENS)
    paired = report.scores[PLAN]["exact"]
    agreed = {"measure": "right answers", **dataclasses.asdict(paired)}
    speed, conditions = {}, {}
    for batch in BATCHES:
        inputs = saint.demo.inputs(name, [scene.image() for scene in scenes[:batch]], "what word is written")
        bench = bench_generation(model, {PLAN: plan}, inputs, NEW_TOKENS, repeats)
        gain = bench.gains[PLAN]
        speed[str(batch)] = Speed(gain.first, gain.bound, gain.uncounted)
        conditions[str(batch)] = bench.conditions
    return agreed, speed, conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=list(KEEPS))
    parser.add_argument("--photos", type=Path, help="a folder of photographs; for encoders")
    parser.add_argument("--count", type=int, default=100, help="photographs, evenly over the folder, or scenes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/keep-MODEL.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name, console = options.model, Console()
    if name == "small-llava":
        things, measured = [saint.demo.scene(number) for number in range(options.count)], llava_row
    else:
        if options.photos is None:
            parser.error(f"{name} is measured on photographs: give --photos DIR")
        photos = evenly(load_images(options.photos)[0], options.count)
        things, measured = [photo.image for photo in photos], encoder_row
    if len(things) < FEWEST:
        parser.error(f"{len(things)} pictures say little about others: give {FEWEST} or more")
    model, rows = saint.demo.model(name), []
    for keep in KEEPS[name]:
        plan = saint.plan_for(model, keep=keep)
        row = Row(name, keep, plan.to_dict(), *measured(name, model, plan, things, options.repeats))
        rows.append(dataclasses.asdict(row))
        speeds = ", ".join(
            f"batch {batch}: x{s.speedup.median:.2f} [{s.speedup.p20:.2f}, {s.speedup.p80:.2f}] of x{s.bound:.2f}"
            for batch, s in row.speed.items()
        )
        console.print(f"{name} keep {keep}: {row.agreement}, {speeds}", soft_wrap=True)
    command = f"python benchmarks/keep.py {name}" + ("" if options.photos is None else " --photos DIR")
    out = options.out or Path(__file__).parent / "results" / f"keep-{name}.json"
    record = {"kind": "benchmarks/keep", "command": command, "pictures": len(things)}
    write_json(out, {**record, "environment": environment(), "rows": rows})
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
