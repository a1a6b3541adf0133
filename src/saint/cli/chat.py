"""`saint chat`: one question, answered unpruned and pruned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .common import (
    Device,
    Json,
    OldModel,
    PlanText,
    Pretrained,
    Threads,
    describe,
    dtype_of,
    err,
    given_model,
    load_generator,
    make_plan,
    out,
    save,
)

if TYPE_CHECKING:
    from ..loading.vlm import LoadedVLM


def chat(
    image: Annotated[Path, typer.Option("--image", help="the picture")],
    model: Annotated[
        str | None,
        typer.Argument(help="hf:NAME_OR_PATH of a vision-language model, or demo:small-llava", show_default=False),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="the question")] = "Describe the image.",
    plan: PlanText = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 128,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    pretrained: Pretrained = True,
    json: Json = None,
    old_model: OldModel = None,
) -> None:
    """Answer one question about an image, unpruned and pruned, greedily, with times and tokens."""
    from ..loading import load_images
    from ..records import environment
    from ..session import pruned

    model = given_model("chat", model, old_model)
    if image.is_dir():
        raise ValueError(f"--image needs one picture, {image} is a folder: give a file in it (saint view draws many)")
    photos, bad = load_images(image, 1)
    if bad:
        raise ValueError(f"{bad[0].name}: {bad[0].reason}")
    number = None if dtype == "auto" else dtype_of(dtype)
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


def modes(model: Any) -> dict[str, Any]:
    """A plan per mode that fits any depth, for models without a recipe of their own: about a third of the tokens stays.

    A mode that the family cannot do is left out.
    """
    from ..methods.saint import Saint
    from ..methods.saint_full_graph import SaintFullGraph
    from ..plan import Plan, Stage
    from ..vision.locate import locate_tower
    from ..vlm.locate import locate

    _, vlm, spec = locate(model, "language")
    depth = len(list(vlm.get_submodule(spec.decoder).get_submodule("layers").children()))
    layers = range(depth // 5, min(depth, depth // 5 + max(3, depth * 3 // 10)))  # each can drop at most half
    language = Stage(Saint(threshold=0.83, budget=0.15), layers=layers)
    made = {
        "connector": Plan(connector=SaintFullGraph(keep=0.33)),
        "language": Plan(language=language),
    }
    if spec.no_vision is None:
        _, tower, tower_spec = locate_tower(vlm.get_submodule(spec.tower))
        blocks = len(list(tower.get_submodule(tower_spec.blocks).children()))
        used = spec.feature_layer(vlm, blocks)
        if used is not None:
            at = [max(0, min(blocks * 4 // 5, used - 1))]
            made["vision"] = Plan(vision=Stage(SaintFullGraph(keep=0.33), layers=at))
            half = Stage(Saint(threshold=0.83, budget=0.5), layers=layers)
            made["hybrid"] = Plan(vision=Stage(SaintFullGraph(keep=0.5), layers=at), language=half)
    return made


def _answer(loaded: "LoadedVLM", inputs: dict[str, Any], length: int) -> dict[str, Any]:
    import torch

    from ..bench.generation import Clock

    clock = Clock(loaded.device)
    clock.start()
    with torch.no_grad():
        ids = loaded.model.generate(
            **inputs, max_new_tokens=length, do_sample=False, num_beams=1, stopping_criteria=[clock]
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {
        "text": loaded.decode(new),
        "new_tokens": len(new),
        "first_ms": 1e3 * clock.stamps[0],
        "total_ms": 1e3 * clock.stamps[-1],
    }
