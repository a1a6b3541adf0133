"""Time what each method takes to choose, beside the unpruned prefill, and write benchmarks/results/selection-cpu.json.

    python benchmarks/selection.py [--rounds 5] [--shapes narrow] [--visual 576] [--only scope divprune]

A method chooses at all drop points of a slot, by default layers, on random keys and features of the shape that it would see.
Gathering is not in it, nor what a layer computes for it (keys, one row of attention). The prefill is a layer of the language
model on all visual tokens and the text, times its layers, without the tower. Both run in turn, on one thread; a share is the
ratio of a round's two times. The shapes are LLaMA 7B's, and the same with an eighth of the width, where choosing weighs more.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from torch import Tensor, nn

from saint import methods
from saint.lab.bench.timing import Spread, disturbances, interleave, load_average
from saint.lab.records import environment, write_json
from saint.methods.base import Method
from saint.needs import QUERIES, TOWER, TOWER_KEYS
from saint.tokens import Candidates, Facts, TokenMap, Tower

TEXT = 64  # tokens of the prompt beside the visual ones
TILE = 576  # visual tokens of a picture that enters the tower, 24 x 24
FRAME = 144  # visual tokens of a frame, for methods that need frames
PATCH = 14  # pixels
CLASS = 1  # tokens in front of the patches of the tower
KEEPS = (0.25, 1 / 9)
SLOTS = ("vision", "connector", "language")
OUT = Path(__file__).parent / "results" / "selection-cpu.json"


@dataclass(frozen=True)
class Shape:
    """Widths of a model: of its language model, of its tower, and of a head of each."""

    channels: int
    mlp: int
    heads: int
    tower: int
    layers: int = 32
    tower_layers: int = 24
    key: int = 128
    tower_key: int = 64


SHAPES = {"wide": Shape(4096, 11008, 32, 1024), "narrow": Shape(512, 1376, 4, 128)}


def prefill(shape: Shape, tokens: int) -> Callable[[], Any]:
    """Return a layer of the language model on so many tokens."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=shape.channels, intermediate_size=shape.mlp, num_hidden_layers=1, num_attention_heads=shape.heads,
        vocab_size=8,
    )  # fmt: skip
    model: nn.Module = hf.LlamaModel(config).eval()
    return partial(model, inputs_embeds=noise(1, tokens, shape.channels), use_cache=False)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def settings(cls: type[Method]) -> Iterator[tuple[str, Method]]:
    """Yield the method at each budget; where the picture decides, as it is, and with a tolerance where it has one."""
    if issubclass(cls, methods.base.PixelMethod):
        yield "", cls()
        if "tau" in {field.name for field in fields(cls)}:
            yield "tau 0.02", cls(tau=0.02)
        return
    for keep in KEEPS:
        yield f"keep {keep:.2g}", cls().keeping(keep)


def drop_points(method: Method, slot: str, shape: Shape, visual: int) -> list[Candidates] | None:
    """Return what a method sees at each of its drop points; None where its budget takes more layers.

    Survivors have the values of the first tokens: times do not depend on them, and memory stays small.
    """
    depth = {"vision": shape.tower_layers, "connector": 1, "language": shape.layers}[slot]
    steps = 1 if slot == "connector" or method.needs & {"pixels", "resized"} else len(method.layers(slot, depth))
    batch, count = (visual // TILE, TILE) if slot == "vision" else (1, visual)
    try:
        method.validate(count, steps)
    except ValueError:
        return None
    channels, key = (shape.tower, shape.tower_key) if slot == "vision" else (shape.channels, shape.key)
    features = noise(batch, count, channels)
    keys = features if slot == "connector" else noise(batch, count, key)
    attention = noise(batch, count).softmax(-1)
    edge = 24
    facts = Facts(
        columns=edge if slot == "vision" else None,
        cells=(torch.arange(batch * count) % FRAME).view(batch, count) if "frames" in method.needs else None,
        pixels=noise(batch, count, 3, PATCH**2) if "pixels" in method.needs else None,
        grids=((edge, edge),) * batch if method.needs & {"pixels", "resized"} else None,
        text=noise(batch, TEXT, channels) if "text" in method.needs else None,
        tower=tower(method, shape, visual) if slot == "connector" and method.needs & TOWER else None,
    )
    # what tokens of the prompt, or of the encoder, attend to
    asked = {name: attention for name in sorted(method.needs & (TOWER | QUERIES)) if slot != "connector"}
    tokens, found = TokenMap.full(batch, count, torch.device("cpu")), []
    for step in range(steps):
        left = tokens.slots
        rows = {name: row[:, :left] for name, row in asked.items()}
        shown = keys[:, :left], features[:, :left], tokens, step, steps, attention[:, :left], facts.at(tokens.index)
        found.append(Candidates(*shown, rows))
        if (selection := method.select(found[-1])) is not None:
            tokens = tokens.select(selection)
    return found


def tower(method: Method, shape: Shape, visual: int) -> Tower:
    """Return what a tower showed of pictures of a prompt; the language model reads its last but one layer."""
    read, edge = shape.tower_layers - 2, 24
    shown = {
        (name, layer): noise(1, visual, shape.tower_key) if name == TOWER_KEYS else noise(1, visual, 1).softmax(1)
        for name in method.needs & TOWER
        for layer in method.tower_layers(shape.tower_layers, read, CLASS)
    }
    place = (torch.arange(visual) % TILE).view(1, visual)
    return Tower(shown, shape.tower_layers, read, place, torch.full((1, visual, 2), edge), CLASS)


def choices(shape: Shape, visual: int, only: list[str] | None) -> dict[str, tuple[dict[str, Any], Callable[[], Any]]]:
    """Return all choices to time by a name, each with what the record says of it."""
    found = {}
    for name in sorted(only or methods.names()):
        cls = methods.get(name)
        for slot in (slot for slot in SLOTS if slot in cls.stages):
            for label, method in settings(cls):
                shown = drop_points(method, slot, shape, visual)
                if shown is None:
                    continue
                row = {"method": name, "slot": slot, "setting": label, "drop_points": len(shown)}
                found[f"{name} {slot} {label}"] = row, partial(_all, method, shown)
    return found


def _all(method: Method, shown: list[Candidates]) -> None:
    for candidates in shown:
        method.select(candidates)


def measure(name: str, visual: int, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return what one shape and number of visual tokens gave, with a row per choice."""
    shape, load = SHAPES[name], load_average()
    found = choices(shape, visual, options.only)
    runs = {"layer": prefill(shape, visual + TEXT)} | {key: run for key, (_, run) in found.items()}
    times = interleave(runs, torch.device("cpu"), options.rounds, warmup=1)
    spreads = {key: Spread.of(values) for key, values in times.items()}
    rows = []
    for key, (row, _) in found.items():
        share = Spread.of([own / (shape.layers * layer) for own, layer in zip(times[key], times["layer"], strict=True)])
        told = {part: round(value, 6) for part, value in vars(share).items()}
        rows.append({**row, "share": told, "ms": round(spreads[key].median, 3)})
        console.print(f"{name} {visual} {key}: {share.median:.2%} [{share.p20:.2%}, {share.p80:.2%}]", soft_wrap=True)
    layer, notes = spreads["layer"], disturbances(load, {"layer": spreads["layer"]})
    return {"shape": name, "visual": visual, "layer_ms": vars(layer), "load": load, "notes": notes, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--visual", type=int, nargs="+", default=[TILE, 5 * TILE], help=f"multiples of {TILE}")
    parser.add_argument("--only", nargs="+", metavar="METHOD")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    with torch.inference_mode():
        parts = [measure(name, visual, options, console) for name in options.shapes for visual in options.visual]
    record = {
        "kind": "benchmarks/selection", "command": "python benchmarks/selection.py", "date": datetime.now(UTC).isoformat(),
        "text": TEXT, "tile": TILE, "rounds": options.rounds, "threads": 1,
        "shapes": {name: vars(SHAPES[name]) for name in options.shapes},
    }  # fmt: skip
    write_json(options.out, {**record, "environment": environment("cpu"), "parts": parts})
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
