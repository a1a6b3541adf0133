"""`saint chat`: one question, answered unpruned and pruned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..describe import describe
from . import options
from .common import err, make_plan, out, save

if TYPE_CHECKING:
    from ..kinds import Subject


@options.model_options("size")
def chat(
    model: Annotated[str, typer.Argument(help="hf:NAME_OR_PATH of a vision-language model, or demo:small-llava")],
    images: Annotated[Path, typer.Option("--images", help="the picture")],
    prompt: Annotated[str, typer.Option("--prompt", help="the question")] = "Describe the image.",
    plan: options.PlanText = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 128,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Answer one question about an image, unpruned and pruned, greedily, with times and tokens."""
    from ...session import pruned
    from ..kinds import kind_of
    from ..records import environment
    from ..sources.items import Item
    from ..sources.photos import load_images

    if images.is_dir():
        raise ValueError(
            f"--images needs one picture here, {images} is a folder: give a file in it (saint view draws many)"
        )
    photos, bad = load_images(images, 1)
    if bad:
        raise ValueError(f"{bad[0].name}: {bad[0].reason}")
    subject = how.load(kind_of(model, "answers"), model)
    inputs = subject.inputs([Item.photo(photos[0].name, photos[0].image, prompt)], [photos[0].image])
    chosen = make_plan(subject.plans["connector"], plan, None, None)
    with err.status("answering"):
        _answer(subject, inputs, 1)  # the first run of a process pays for what later ones find ready
        answers = {"unpruned": _answer(subject, inputs, max_new_tokens)}
        with pruned(subject.model, chosen) as session:
            _answer(subject, inputs, 1)
            answers["pruned"] = _answer(subject, inputs, max_new_tokens)
            memory = session.kv_memory
    bytes_ = {"unpruned": getattr(memory, "unpruned", None), "pruned": getattr(memory, "kept", None)}
    for name, value in bytes_.items():
        answers[name]["kv_bytes"] = value

    out.print(f"[bold]{model}[/]  {describe(chosen)}", highlight=False)
    out.print(f"{prompt!r}, {inputs['input_ids'].shape[1]} prompt tokens\n", highlight=False, markup=False)
    for name, answer in answers.items():
        out.print(f"[bold]{name}[/]")
        out.print(answer["text"] or "(no text)", markup=False, highlight=False)
        out.print()
    table = Table("", "first token ms", "total ms", "new tokens", "KV MiB")
    for name, answer in answers.items():
        kv = "-" if answer["kv_bytes"] is None else f"{answer['kv_bytes'] / 2**20:.2f}"
        table.add_row(name, f"{answer['first_ms']:.1f}", f"{answer['total_ms']:.1f}", str(answer["new_tokens"]), kv)
    out.print(table)
    out.print("one run each: saint bench gives times with their spread", highlight=False)
    if json is not None:
        facts = {
            "kind": "chat",
            "model": model,
            "pretrained": how.pretrained,
            "image": photos[0].name,
            "prompt": prompt,
            "plan": chosen.to_dict(),
            "answers": answers,
            "environment": environment(subject.device),
        }
        save(json, facts)


def _answer(subject: "Subject", inputs: dict[str, Any], length: int) -> dict[str, Any]:
    said = subject.answer(inputs, length)
    return {
        "text": said.text,
        "new_tokens": len(said.times.tokens),
        "first_ms": said.times.first_ms,
        "total_ms": said.times.total_ms,
    }
