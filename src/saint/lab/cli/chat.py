"""`saint chat`: one question, answered unpruned and pruned."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import options
from .common import Asked, doing, out, save, table

if TYPE_CHECKING:
    from ..kinds import Subject

RUNS = 3  # of each, in turn; one alone says little of times


@options.model_options("size")
def chat(
    model: Annotated[str, typer.Argument(help="hf:NAME_OR_PATH of a vision-language model, or demo:small-llava")],
    images: Annotated[Path, typer.Option("--images", help="the picture")],
    prompt: Annotated[str, typer.Option("--prompt", help="the question")] = "Describe the image.",
    plan: options.PlanText = None,
    keep: options.Keep = None,
    pixels: options.Pixels = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 128,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Answer one question about an image, unpruned and pruned, greedily, with times and tokens.

    Both run three times in turn; times are the median of these, with the lowest and the highest.
    """
    from ..describe import describe
    from ..kinds import kind_of
    from ..records import environment
    from ..sources.items import Item
    from ..sources.photos import load_images

    if images.is_dir():
        raise ValueError(
            f"--images needs one picture here, {images} is a folder: give a file in it (saint view draws many)"
        )
    asked = Asked.read(plan, keep, pixels=pixels)
    photos, bad = load_images(images, 1)
    if bad:
        raise ValueError(f"{bad[0].name}: {bad[0].reason}")
    subject = how.load(kind_of(model, "answers"), model)
    inputs = subject.inputs([Item.photo(photos[0].name, photos[0].image, prompt)], [photos[0].image])
    name, chosen = asked.of(subject)
    with doing("answering"):
        answers = _answers(subject, chosen, inputs, max_new_tokens)

    out.print(f"[bold]{escape(model)}[/]  {escape(name)}: {escape(describe(chosen))}", highlight=False)
    out.print(f"{prompt!r}, {inputs['input_ids'].shape[1]} prompt tokens\n", highlight=False, markup=False)
    for who, answer in answers.items():
        out.print(f"[bold]{who}[/]")
        out.print(answer["text"] or "(no text)", markup=False, highlight=False)
        out.print()
    rows = []
    for who, answer in answers.items():
        kv = "-" if answer["kv_bytes"] is None else f"{answer['kv_bytes'] / 2**20:.2f}"
        rows.append([who, _range(answer["first_ms"]), _range(answer["total_ms"]), str(answer["new_tokens"]), kv])
    table(["", "first token ms", "total ms", "new tokens", "KV MiB"], rows)
    out.print(
        f"median [lowest, highest] of {RUNS} runs in turn: saint bench times more of them",
        highlight=False,
        markup=False,
    )
    if json is not None:
        facts = {
            "kind": "chat",
            "model": model,
            "pretrained": how.pretrained,
            "image": photos[0].name,
            "prompt": prompt,
            "plan": chosen.to_dict(),
            "plan_name": name,
            "answers": answers,
            "environment": environment(subject.device),
        }
        save(json, facts)


def _answers(subject: "Subject", plan: Any, inputs: dict[str, Any], length: int) -> dict[str, dict[str, Any]]:
    """Answer unpruned and pruned, in turn, every second time in reverse order."""
    from ..variants import BASE, variants

    with variants(subject.model, {"pruned": plan}) as made:
        subjects = {name: replace(subject, model=variant.model) for name, variant in made.items()}
        for one in subjects.values():
            one.answer(inputs, 1)  # the first run of a process pays for what later ones find ready
        said: dict[str, list[Any]] = {name: [] for name in subjects}
        for lap in range(RUNS):
            for name in list(subjects) if lap % 2 == 0 else reversed(list(subjects)):
                said[name].append(subjects[name].answer(inputs, length))
        session = made["pruned"].session
        memory = None if session is None else session.kv_memory
    held = {BASE: getattr(memory, "unpruned", None), "pruned": getattr(memory, "kept", None)}
    return {
        "unpruned" if name == BASE else name: {
            "text": found[0].text,
            "new_tokens": len(found[0].times.tokens),
            "first_ms": _spread([one.times.first_ms for one in found]),
            "total_ms": _spread([one.times.total_ms for one in found]),
            "kv_bytes": held[name],
        }
        for name, found in said.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def _range(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} [{spread['low']:.1f}, {spread['high']:.1f}]"
