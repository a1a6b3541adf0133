"""Measure demo:clip-b16 at half of its FLOPs in other engines, unpruned against pruned, and write benchmarks/results/.

    python benchmarks/exported.py [--rounds 15] [--only onnxruntime] [--batches 1]

ONNX Runtime, OpenVINO and torch.compile run the unpruned and the pruned graphs in turn, in one process. A speed-up is the ratio
of a round's two times; its bound is the ratio of their FLOPs. One JSON record with all conditions; needs the extra `export`, and
a C++ compiler for torch.compile.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import saint
from saint import Plan, Stage, methods
from saint.backends.export import export
from saint.flops import count_flops
from saint.lab import demo
from saint.lab.bench.timing import Spread, disturbances, interleave, load_average
from saint.lab.records import environment, write_json
from saint.upstream.versions import installed

MODEL = "clip-b16"
PLANS = {
    "base": Plan(),
    "saint, 2 layers": Plan(vision=Stage(saint.Saint(keep=0.42), layers=[1, 2])),
    "grid, 2 layers": Plan(vision=Stage(methods.Grid(keep=0.42), layers=[1, 2])),  # the same shapes, and nothing scored
    "match weigh": Plan(vision=Stage(methods.Match(keep=0.34, fate="weigh"), layers=[1, 3, 5])),
}
ENGINES = ("eager", "torch.compile", "onnxruntime", "openvino")

Run = Callable[[], Any]


def graphs(
    model: nn.Module, pixels: Tensor, threads: int, engines: list[str], folder: Path
) -> dict[str, dict[str, Any]]:
    """Of each engine, functions of pixels [B, 3, H, W] by plan."""
    found: dict[str, dict[str, Any]] = {engine: {} for engine in engines}
    for number, (name, plan) in enumerate(PLANS.items()):
        files = {"onnxruntime": onnxruntime_graph, "openvino": openvino_graph}  # one file for both
        if wanted := files.keys() & set(engines):
            file = export(model, plan, folder / f"{number}.onnx", pixels).path
            for engine in wanted:
                found[engine][name] = files[engine](file, threads)
        for engine in {"eager", "torch.compile"} & set(engines):
            twin = demo.MODELS[MODEL].load()
            saint.apply(twin, plan)
            found[engine][name] = torch.compile(twin, fullgraph=True, dynamic=False) if engine != "eager" else twin
    return found


def onnxruntime_graph(path: Path, threads: int) -> Callable[[Tensor], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # each session has threads of its own; those of one that waits must not spin while another is timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})


def openvino_graph(path: Path, threads: int) -> Callable[[Tensor], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda pixels: request.infer({"pixel_values": pixels.numpy()}, share_inputs=True, share_outputs=True)


def flops(model: nn.Module, plan: Plan, pixels: Tensor) -> int:
    with saint.pruned(model, plan):
        return count_flops(lambda: model(pixels))[1].total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", choices=ENGINES, nargs="+", default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exported-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, rows = Console(), []
    info = demo.MODELS[MODEL]
    model = info.load()
    pictures = [image for _, image in sorted(demo.photos(), key=lambda photo: photo[0] != "coffee")]
    pixels = torch.stack([info.preprocess(pictures[i % len(pictures)]) for i in range(max(options.batches))])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        made = graphs(model, pixels, options.threads, options.only, Path(folder))
        for batch in options.batches:
            part = pixels[:batch].clone()
            whole = flops(model, Plan(), part)
            bounds = {name: whole / flops(model, plan, part) for name, plan in PLANS.items()}
            for engine, runs in made.items():
                load = load_average()
                named: dict[str, Run] = {name: partial(run, part) for name, run in runs.items()}
                times = interleave(named, part.device, options.rounds, warmup=3)
                spreads = {name: Spread.of(values) for name, values in times.items()}
                for name in list(PLANS)[1:]:
                    ratio = Spread.of([base / own for base, own in zip(times["base"], times[name], strict=True)])
                    reached = ratio.median / bounds[name]
                    row = {"engine": engine, "batch": batch, "plan_name": name, "plan": PLANS[name].to_dict()}
                    row |= {"bound": bounds[name], "speedup": vars(ratio), "of_bound": reached, "load": load}
                    row |= {"ms": vars(spreads[name]), "base_ms": vars(spreads["base"])}
                    rows.append({**row, "notes": disturbances(load, spreads)})
                    console.print(
                        f"{engine} batch {batch} {name}: x{ratio.median:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}], "
                        f"bound x{bounds[name]:.2f}, {reached:.2f} of it; {spreads[name].median:.1f} ms, "
                        f"base {spreads['base'].median:.1f} ms",
                        soft_wrap=True,
                    )
    engines = {name: installed(name) for name in ("onnxruntime", "openvino", "onnx", "onnxscript")}
    record = {"kind": "benchmarks/exported", "command": "python benchmarks/exported.py", "model": f"demo:{MODEL}"}
    write_json(options.out, {**record, "environment": environment("cpu") | engines, "rows": rows})
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
