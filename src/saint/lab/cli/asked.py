"""The images of ``--images``, questions of ``--questions`` and prompts of ``--prompts``, for commands that take several kinds of
models.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .common import err, load, load_generator

if TYPE_CHECKING:
    from ..loading.listing import Left

Questions = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        help='vision-language models, JSON lines: {"image": "file", "question": "..."} [default: --prompt of every image]',
    ),
]
Prompt = Annotated[
    str | None, typer.Option(help="vision-language models, without --questions [default: Describe the image.]")
]


Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help='language models without images, instead of --images: a prompt per line, or .jsonl {"prompt": "..."}',
    ),
]


class Subject(NamedTuple):
    """A loaded model of any kind.

    Attributes:
        model: the network.
        device: of it.
        plan: that suits an encoder; None of a language model.
        inputs: keyword arguments of ``model.forward`` for an item and its image, if it has one.
        loaded: what the loader gave, with pictures and grids.
    """

    model: Any
    device: Any
    plan: Any
    inputs: Callable[[Any, Any], Any]
    loaded: Any


def load_subject(
    model: str, device: str, *, generates: bool, size: int | None, threads: int | None, pretrained: bool, dtype: Any
) -> Subject:
    """Load ``model``, a vision-language model where it ``generates``; ``dtype`` None is the checkpoint's.

    Raises:
        ValueError: ``size`` of a vision-language model.
    """
    if generates:
        if size is not None:
            raise ValueError("--size is for encoders: the processor of a vision-language model chooses the size")
        vlm = load_generator(model, device, threads=threads, pretrained=pretrained, dtype=dtype)
        return Subject(vlm.model, vlm.device, None, lambda item, image: vlm.inputs([item.prompt], [image]), vlm)
    loaded = load(model, device, size=size, threads=threads, pretrained=pretrained)
    network = loaded.model if dtype is None else loaded.model.to(dtype)
    return Subject(network, loaded.device, loaded.plan, lambda item, image: loaded.inputs([image]), loaded)


def load_text_subject(model: str, device: str, *, threads: int | None, pretrained: bool, dtype: Any) -> Subject:
    """The same for a language model without images."""
    import torch

    from ..loading.text import load_text

    if threads is not None:
        torch.set_num_threads(threads)
    with err.status(f"loading {model}"):
        loaded = load_text(model, device, pretrained, dtype)
    return Subject(loaded.model, loaded.device, None, lambda item, _: loaded.inputs(item.prompt), loaded)


def finish_asked(left_out: Sequence[Sequence[str]], what: str, things: str = "image(s)") -> None:
    """Name items that were left out, each with the reason, and end with exit status 1 where there are any."""
    if left_out:
        for where, reason in left_out[:20]:
            err.print(f"[yellow]skipped[/] {where}: {reason}", highlight=False)
        err.print(f"[yellow]{len(left_out)} {things} could not be {what}[/]")
        raise typer.Exit(1)


def check_asked(model: str, generates: bool, questions: Path | None, prompt: str | None) -> None:
    """Raise ``ValueError`` where ``--questions`` and ``--prompt`` do not fit the model or each other."""
    if not generates and (questions is not None or prompt is not None):
        raise ValueError(f"--questions and --prompt are for vision-language models, {model} is none")
    if questions is not None and prompt is not None:
        raise ValueError("give --questions or --prompt, not both")


def read_prompts(path: Path, limit: int | None) -> tuple[list[Any], list[tuple[str, str]]]:
    """Prompts without images, :class:`saint.lab.analysis.run.Asked`, at most ``limit``, evenly spaced.

    Args:
        path: a prompt per line; where its name ends in .jsonl, JSON lines ``{"prompt": "..."}``. Blank lines are passed over.
        limit: None means all.

    Returns:
        The items; where and why lines could not be read.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a single prompt in it.
    """
    from ..analysis.run import Asked
    from ..loading.listing import printable

    good: list[Any] = []
    bad: list[tuple[str, str]] = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        where = f"{printable(path.name)}, line {number}"
        try:
            prompt = raw.decode() if path.suffix != ".jsonl" else json.loads(raw)["prompt"]
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f'"prompt" must be a text, got {prompt!r}')
            good.append(Asked.text(f"line {number}", where, prompt))
        except (ValueError, TypeError, KeyError) as error:
            told = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
            bad.append((where, str(error) if told else 'a line is an object like {"prompt": "..."}'))
    if not good:
        raise ValueError(f"no prompt in {path}" + "".join(f" ({where}: {reason})" for where, reason in bad[:1]))
    return evenly(good, limit), bad


def gather(
    images: Path, questions: Path | None, prompt: str | None, limit: int | None, left: "Left"
) -> tuple[list[Any], list[tuple[str, str]]]:
    """What there is to look at, :class:`saint.lab.analysis.run.Asked`, at most ``limit``, evenly spaced.

    Args:
        images: an image, or a folder of them.
        questions: JSON lines about images of the folder.
        prompt: what is asked of every image without ``questions``; None: to describe it.
        limit: None means all.
        left: gets what is left out of the folder: reason -> names.

    Returns:
        The items; where and why questions could not be read.

    Raises:
        ValueError: no image.
    """
    from ..analysis.run import Asked
    from ..eval.data import find_samples
    from ..eval.vqa import default_prompt, read_questions

    if questions is not None:
        asked, unreadable = read_questions(questions, images)
        some = [Asked.question(question, default_prompt(question)) for question in evenly(asked, limit)]
        return some, [(failure.where, failure.reason) for failure in unreadable]
    found = find_samples(str(images), labels=False)
    left.update(found.left_out)
    text = "Describe the image." if prompt is None else prompt
    return [Asked.of(sample, text) for sample in evenly(found.items, limit)], []


def evenly(items: list[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` of ``items``, evenly spaced."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
