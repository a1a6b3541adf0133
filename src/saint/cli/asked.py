"""The images of ``--images`` and the questions of ``--questions``, for commands that take both kinds of models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from .common import err, load, load_generator

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


class Subject(NamedTuple):
    """A loaded model of either kind.

    Attributes:
        model: the network.
        device: of it.
        plan: that suits an encoder; None of a vision-language model.
        inputs: keyword arguments of ``model.forward`` for an item of :func:`gather` and its image.
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


def finish_asked(left_out: Sequence[Sequence[str]], what: str) -> None:
    """Name items that were left out, each with the reason, and end with exit status 1 where there are any."""
    if left_out:
        for where, reason in left_out[:20]:
            err.print(f"[yellow]skipped[/] {where}: {reason}", highlight=False)
        err.print(f"[yellow]{len(left_out)} image(s) could not be {what}[/]")
        raise typer.Exit(1)


def check_asked(model: str, generates: bool, questions: Path | None, prompt: str | None) -> None:
    """Raise ``ValueError`` where ``--questions`` and ``--prompt`` do not fit the model or each other."""
    if not generates and (questions is not None or prompt is not None):
        raise ValueError(f"--questions and --prompt are for vision-language models, {model} is none")
    if questions is not None and prompt is not None:
        raise ValueError("give --questions or --prompt, not both")


def gather(
    images: Path, questions: Path | None, prompt: str | None, limit: int | None
) -> tuple[list[Any], list[tuple[str, str]]]:
    """What there is to look at, :class:`saint.analysis.run.Asked`, at most ``limit``, evenly spaced.

    Args:
        images: an image, or a folder of them.
        questions: JSON lines about images of the folder.
        prompt: what is asked of every image without ``questions``; None: to describe it.
        limit: None means all.

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
    samples = find_samples(str(images.parent if images.is_file() else images))
    found = [s for s in samples.items if not images.is_file() or s.where == images.name]
    if not found:
        raise ValueError(f"{images} is not an image that Pillow reads")
    text = "Describe the image." if prompt is None else prompt
    return [Asked.of(sample, text) for sample in evenly(found, limit)], []


def evenly(items: list[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` of ``items``, evenly spaced."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
