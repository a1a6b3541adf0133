"""`saint chat`: one question, answered unpruned and pruned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .common import (
    Device,
    DType,
    Json,
    PlanText,
    Pretrained,
    Threads,
    describe,
    dtype_of,
    err,
    load_generator,
    make_plan,
    out,
    save,
)

if TYPE_CHECKING:
    from ..loading.vlm import LoadedVLM


def chat(
    model: Annotated[str, typer.Argument(help="hf:NAME_OR_PATH of a vision-language model, or demo:small-llava")],
    image: Annotated[Path, typer.Option("--image", help="the picture")],
    prompt: Annotated[str, typer.Option("--prompt", help="the question")] = "Describe the image.",
    plan: PlanText = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 128,
    threads: Threads = None,
    device: Device = "auto",
    dtype: DType = "auto",
    pretrained: Pretrained = True,
    json: Json = None,
) -> None:
    """Answer one question about an image, unpruned and pruned, greedily, with times and tokens."""
    from ...session import pruned
    from ..loading import load_images
    from ..loading.modes import modes
    from ..records import environment

    if image.is_dir():
        raise ValueError(f"--image needs one picture, {image} is a folder: give a file in it (saint view draws many)")
    photos, bad = load_images(image, 1)
    if bad:
        raise ValueError(f"{bad[0].name}: {bad[0].reason}")
    number = dtype_of(dtype)
    loaded = load_generator(model, device, threads=threads, pretrained=pretrained, dtype=number)
    inputs = loaded.inputs([prompt], [photos[0].image])
    chosen = make_plan(modes(loaded.model)["connector"], plan, None, None)
    with err.status("answering"):
        _answer(loaded, inputs, 1)  # the first run of a process pays for what later ones find ready
        answers = {"unpruned": _answer(loaded, inputs, max_new_tokens)}
        with pruned(loaded.model, chosen) as session:
            _answer(loaded, inputs, 1)
            answers["pruned"] = _answer(loaded, inputs, max_new_tokens)
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
            "pretrained": pretrained,
            "image": photos[0].name,
            "prompt": prompt,
            "plan": chosen.to_dict(),
            "answers": answers,
            "environment": environment(loaded.device),
        }
        save(json, facts)


def _answer(loaded: "LoadedVLM", inputs: dict[str, Any], length: int) -> dict[str, Any]:
    from ..bench.generation import timed_answer

    answer = timed_answer(loaded.model, inputs, length, loaded.device)
    return {
        "text": loaded.decode(answer.tokens),
        "new_tokens": len(answer.tokens),
        "first_ms": answer.first_ms,
        "total_ms": answer.total_ms,
    }
