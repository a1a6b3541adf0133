"""Measure the two demo models on this machine, unpruned against pruned, and write benchmarks/results/.

    python benchmarks/encoders.py [--repeats 15] [--only clip-b16]

Each model runs its default plan and a plan near half the FLOPs, on photographs, batch 1 and 8. One JSON record with all
conditions; `python docs/make_tables.py` puts the table into docs/results.md.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console

import saint
from saint.flops import left_out
from saint.lab import demo
from saint.lab.bench import bench_forward
from saint.lab.records import environment, write_json
from saint.plans import Plan, Stage
from saint.session import as_plan

HALF = {
    "clip-b16": Plan(vision=saint.Saint(threshold=0.75, keep=0.35)),
    "dinov2-s": Plan(vision=Stage(saint.Saint(center=True, keep=0.36), layers=[0, 2, 4], output="similar")),
}
# model, pixels, batch
CASES = [("clip-b16", 224, 1), ("clip-b16", 224, 8), ("dinov2-s", 224, 1), ("dinov2-s", 224, 8), ("dinov2-s", 518, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(demo.MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoders-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, rows = Console(), []
    # batch 1 is the coffee cup: it keeps about as many tokens as the mean photograph
    pictures = [image for _, image in sorted(demo.photos(), key=lambda photo: photo[0] != "coffee")]
    for name, size, batch in CASES:
        if options.only not in (None, name):
            continue
        info = demo.MODELS[name]
        model = info.load()
        # the encoder alone: a convolutional head is the same work in both
        encoder = model.backbone if name == "dinov2-s" else model
        inputs = {"pixel_values": torch.stack([info.preprocess(image, size) for image in pictures[:batch]])}
        for label, plan in (("default", as_plan(info.recipe)), ("half", HALF[name])):
            # the ratio from a run of base and pruned alone; what pruning costs inside, from a second run with meters
            result = bench_forward(encoder, plan, inputs, repeats=options.repeats, extras=False)
            metered = bench_forward(encoder, plan, inputs, repeats=max(3, options.repeats // 2))
            overhead = metered.overhead
            assert overhead is not None
            assert metered.eager is not None
            row = {
                "model": name,
                "pixels": size,
                "batch": batch,
                "plan_name": label,
                **result.to_dict(),
                "overhead": dataclasses.asdict(overhead),
                "eager_over_fused": metered.eager.median / metered.pruned.median,
            }
            rows.append(row)
            idle = overhead.keep_all.median if overhead.keep_all else float("nan")
            console.print(
                f"{name} {size} px batch {batch} {label}: {1 / result.bound:.2f} of the FLOPs, "
                f"x{result.speedup.median:.2f} [{result.speedup.p20:.2f}, {result.speedup.p80:.2f}], "
                f"bound x{result.bound:.2f}{left_out(result.uncounted)}, "
                f"efficiency {result.efficiency:.2f}, pruning {overhead.share.median:.1%}, "
                f"nothing dropped {idle:+.1%}, eager attention x{row['eager_over_fused']:.2f} the time",
                soft_wrap=True,
            )
    record = {"kind": "benchmarks/encoders", "command": "python benchmarks/encoders.py"}
    write_json(options.out, {**record, "environment": environment(), "rows": rows})
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
