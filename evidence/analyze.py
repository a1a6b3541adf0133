"""What tokens do in the demo's models, and in models of the same make with random weights.

    python evidence/analyze.py run --photos DIR          # evidence/results/analyze-*.json; a killed run continues
    python evidence/analyze.py pages                     # docs/analysis.md and its pictures, from the records

DIR is any folder of photographs. The twins with random weights are the control: what they show, training has not made.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from analyze_pages import write_pages
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from saint.analysis.record import make_record
from saint.analysis.run import Asked, Settings, analyze
from saint.demo import small_llava
from saint.eval.data import find_samples
from saint.loading import load_model
from saint.loading.vlm import load_vlm
from saint.records import environment, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
QUESTION = "What color is the thing?"  # the small LLaVA knows the words of generated scenes only
MODELS = ("demo:clip-b16", "demo:dinov2-s", "demo:small-llava")
console = Console(width=150)


def build(name: str, control: bool) -> tuple[Any, Callable[..., Any], Any]:
    """The model, what makes its inputs from an item and an image, and a plan that suits it."""
    if name == "demo:small-llava":
        loaded = load_vlm(name)
        model = seeded(lambda: small_llava.blank(None)) if control else loaded.model
        return model, lambda item, image: loaded.inputs([item.prompt], [image]), None
    encoder = load_model(name)
    model = encoder.model
    if control:
        holder = getattr(model, "backbone", model)
        twin = seeded(lambda: type(holder)(holder.config).eval())
        holder.load_state_dict(twin.state_dict())
    return model, lambda item, image: encoder.inputs([image]), encoder.plan


def seeded(make: Callable[[], Any]) -> Any:
    """Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def measure(name: str, control: bool, photos: Path, limit: int, causal: int) -> None:
    """One record."""
    model, inputs, plan = build(name, control)
    samples = find_samples(str(photos), limit=limit)
    items = [Asked.of(sample, QUESTION) for sample in samples.items]
    weights = "random" if control else "trained"
    stem = f"analyze-{name.removeprefix('demo:')}-{weights}"
    facts = {"model": name, "weights": weights, "set": photos.name}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(stem, total=len(items))
        result = analyze(
            model, items, inputs, plan=plan, settings=Settings(causal=causal), facts=facts,
            journal=HERE / "cache" / f"{stem}.journal.sqlite", tick=lambda n: bar.advance(task, n),
        )  # fmt: skip
    head = {
        "kind": "analyze",
        "model": name,
        "weights": weights,
        "images": {"count": len(result.entries), "set": photos.name},
        "questions": {"count": len(result.entries), "question": QUESTION} if name.endswith("llava") else None,
    }
    record = rounded({**head, **make_record(result), "environment": environment("cpu")})
    write_json(RESULTS / f"{stem}.json", record)
    for part in record["parts"]:
        console.print(f"{stem} {part['stage']}: {part['stages']['verdict']} {'; '.join(part['stages']['reasons'])}")


def rounded(value: Any) -> Any:
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "pages"])
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--limit", type=int, default=200, help="photographs, evenly spaced")
    parser.add_argument("--causal", type=int, default=16, help="of them in the causal column")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=MODELS, help="one model")
    options = parser.parse_args()
    if options.what == "run":
        if options.photos is None:
            parser.error("run needs --photos DIR")
        torch.set_num_threads(options.threads)
        for name in [options.only] if options.only else MODELS:
            for control in (False, True):
                measure(name, control, options.photos, options.limit, options.causal)
    records = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("analyze-*.json"))]
    write_pages(records, HERE.parent / "docs")


if __name__ == "__main__":
    main()
