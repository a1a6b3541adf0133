"""The images of ``--images`` and the questions of ``--questions``, for commands that take both kinds of models."""

from pathlib import Path
from typing import Any


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
