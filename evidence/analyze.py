"""What tokens do in the demo's models, and in models of the same make with random weights.

    python evidence/analyze.py run --photos DIR          # evidence/results/analyze-*.json; a killed run continues
    python evidence/analyze.py again --photos DIR        # trained weights, other photographs, another seed: again-*.json
    python evidence/analyze.py pages                     # docs/analysis.md and its pictures, from the records

DIR is any folder of photographs. The language model without images reads passages of Python's own documentation
(`pydoc_data`) and needs none. The twins with random weights are the control: what they show, training has not made.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from analyze_again import overlap
from analyze_pages import write_pages
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from saint.lab.analysis.causal import METHODS
from saint.lab.analysis.record import make_record
from saint.lab.analysis.run import Settings, analyze
from saint.lab.demo import small_llava
from saint.lab.kinds import Subject, Text, kind_of
from saint.lab.records import environment, write_json
from saint.lab.sources.items import Item
from saint.lab.sources.samples import find_samples

HERE = Path(__file__).parent
RESULTS = HERE / "results"
QUESTION = "What color is the thing?"  # the small LLaVA knows the words of generated scenes only
CAUSAL = {
    "demo:clip-b16": 24,
    "demo:dinov2-s": 24,
    "demo:small-llava": 8,
    "demo:smollm2-135m": 8,  # of passages: 30 layers and five choices are 150 forwards each
}  # photographs with a forward per layer and choice
MODELS = tuple(CAUSAL)
TEXT = "demo:smollm2-135m"
TOKENS = 256  # of a passage
console = Console(width=150)


class Passages(Text):
    """A language model that is shown the start of a text."""

    def prompted(self, prompt: str) -> dict[str, Any]:
        made = super().prompted(prompt)
        return {key: value[:, :TOKENS] if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def build(name: str, control: bool) -> Subject:
    """The model, with random weights of a ``control``."""
    if name == TEXT:
        text = Passages.load(name)
        made = seeded(lambda: type(text.model)(text.model.config).eval()) if control else text.model
        return replace(text, model=made)
    subject = kind_of(name).load(name)
    if control and name == "demo:small-llava":
        return replace(subject, model=seeded(lambda: small_llava.blank(None)))
    if control:
        holder = getattr(subject.model, "backbone", subject.model)
        twin = seeded(lambda: type(holder)(holder.config).eval())
        holder.load_state_dict(twin.state_dict())
    return subject


def seeded(make: Callable[[], Any]) -> Any:
    """Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def passages(limit: int, shift: bool) -> list[Item]:
    """Prose of the Python documentation, evenly spaced, each from the start of a paragraph; ``shift``: those in between."""
    whole = "\n\n".join(text for _, text in sorted(topics.items()))
    taken: list[int] = []
    for place in [*range(0, 2 * limit, 2), *range(1, 2 * limit, 2)]:
        at = place * len(whole) // (2 * limit + 1)
        while (at := whole.index("\n\n", at) + 2) in taken:  # a long paragraph is the next one of several places
            pass
        taken.append(at)
    return [
        Item(str(at), f"pydoc_data.topics, character {at}", lambda: None, whole[at : at + 8 * TOKENS].lstrip())
        for at in (taken[limit:] if shift else taken[:limit])
    ]


def photographs(photos: Path, limit: int, again: bool) -> list[Item]:
    """Of a folder, evenly spaced; ``again``: those that lie between."""
    samples = find_samples(str(photos)).items
    if len(samples) < (2 if again else 1) * limit:
        raise ValueError(f"{photos} has {len(samples)} photographs: give --limit {len(samples) // (2 if again else 1)}")
    shift = len(samples) // (2 * limit) if again else 0
    return [replace(samples[place * len(samples) // limit + shift], prompt=QUESTION) for place in range(limit)]


def measure(
    name: str, control: bool, photos: Path | None, limit: int, causal: int, again: bool = False
) -> dict[str, Any]:
    """One record. ``again``: another seed, and photographs or passages that lie between those of the first run."""
    subject = build(name, control)
    if photos is None:
        items, source = passages(limit, again), f"pydoc_data.topics of Python {platform.python_version()}"
    else:
        items, source = photographs(photos, limit, again), photos.name
    weights = "random" if control else "trained"
    stem = f"{'again' if again else 'analyze'}-{name.removeprefix('demo:')}-{weights}"
    facts = {"model": name, "weights": weights, "set": source}
    settings = Settings(causal=causal, choices=METHODS, seed=1 if again else 0)
    if control and causal:  # its causal column is drawn beside the other and decides nothing
        settings = Settings(causal=min(8, causal))
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(stem, total=len(items))
        result = analyze(
            subject, items, settings=settings, facts=facts,
            journal=HERE / "cache" / f"{stem}.journal.sqlite", tick=lambda n: bar.advance(task, n),
        )  # fmt: skip
    head = {
        "kind": "analyze",
        "model": name,
        "weights": weights,
        "images": None if photos is None else {"count": len(result.entries), "set": source},
        "prompts": {"count": len(result.entries), "set": source, "tokens": TOKENS} if photos is None else None,
        "questions": {"count": len(result.entries), "question": QUESTION} if name.endswith("llava") else None,
    }
    record: dict[str, Any] = rounded({**head, **make_record(result), "environment": environment("cpu")})
    for part in record["parts"]:
        console.print(f"{stem} {part['stage']}: {part['stages']['verdict']} {'; '.join(part['stages']['reasons'])}")
    return record


def rounded(value: Any) -> Any:
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "again", "pages"])
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--limit", type=int, default=100, help="photographs, evenly spaced")
    parser.add_argument("--causal", type=int, help="of them in the causal column [default: 24, language models 8]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=MODELS, help="one model")
    options = parser.parse_args()
    if options.what != "pages" and options.photos is None and options.only != TEXT:
        parser.error(f"{options.what} needs --photos DIR")
    torch.set_num_threads(options.threads)
    for name in [options.only] if options.only else MODELS:
        short = name.removeprefix("demo:")
        photos = None if name == TEXT else options.photos
        if options.what == "run":
            causal = CAUSAL[name] if options.causal is None else options.causal
            for control in (False, True):
                record = measure(name, control, photos, options.limit, causal)
                write_json(RESULTS / f"analyze-{short}-{record['weights']}.json", record)
        elif options.what == "again":
            first = json.loads((RESULTS / f"analyze-{short}-trained.json").read_text())
            second = measure(name, False, photos, options.limit, 0, again=True)
            write_json(RESULTS / f"again-{short}-trained.json", rounded(overlap(first, second)))
    records, again = ([json.loads(f.read_text()) for f in sorted(RESULTS.glob(g))] for g in ("analyze-*", "again-*"))
    write_pages(records, again, HERE.parent / "docs")


if __name__ == "__main__":
    main()
