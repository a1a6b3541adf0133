"""Questions about images, as JSON lines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..answers import LETTERS, right_choices
from ..images import as_rgb, mark, read_image
from .items import Failure, Item
from .listing import printable

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        image: a file, or the image itself.
        question: what is asked.
        answers: right answers, any of which will do; empty: only agreement is measured.
        category: scores are also given within each.
        choices: options of a multiple-choice question; ``answers`` are then letters or texts of choices.
        id: unique; empty means its place in the list.
        where: file and line, for messages.
    """

    image: "str | Path | Image.Image"
    question: str
    answers: tuple[str, ...] = ()
    category: str = ""
    choices: tuple[str, ...] = ()
    id: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        if not self.question:
            raise ValueError("the question is empty")
        if len(self.choices) > len(LETTERS) or len(self.choices) == 1:
            raise ValueError(f"a multiple-choice question has 2 to {len(LETTERS)} choices, got {len(self.choices)}")
        if self.choices and self.answers:
            right_choices(self.answers, self.choices)

    def item(self, prompt: str) -> Item:
        """Return what a model is to look at: the image, and the question as ``prompt`` puts it."""
        image = self.image
        if isinstance(image, Image.Image):
            return Item(self.id, self.where, lambda: as_rgb(image), prompt, mark(image))
        return Item(self.id, self.where, lambda: read_image(Path(image)), prompt, mark(Path(image)))


KEYS = {"image", "question", "answer", "category", "choices", "id"}  # of a line of questions


def read_questions(path: str | Path, images: str | Path) -> tuple[list[Question], list[Failure]]:
    """Questions of a JSON Lines file: ``{"image": "file", "question": "...", "answer": "..." or [...], ...}``.

    Args:
        path: the file. ``category``, ``choices`` and ``id`` may be there too; blank lines are passed over.
        images: folder that the image names start from.

    Returns:
        The questions, and the lines that are none with the reason.

    Raises:
        OSError: the file cannot be read, or there is no such folder.
        ValueError: not a single question in it.
    """
    path, images = Path(path), Path(images)
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder of images: {images}")
    good: list[Question] = []
    bad: list[Failure] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        where = f"{printable(path.name)}, line {number}"
        name = f"line {number}"
        try:
            fields = json.loads(raw)
            if not isinstance(fields, dict):
                raise ValueError(f"a line is an object like {{...}}, got {type(fields).__name__}")
            unknown = sorted(fields.keys() - KEYS)
            if unknown:
                raise ValueError(f"unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}")
            if "id" in fields:
                name = str(fields["id"])
            if name in seen:
                raise ValueError(f"the id {name!r} is taken by line {seen[name]}")
            image, asked = images / _text(fields, "image"), _text(fields, "question")
            answers, choices = _texts(fields, "answer"), _texts(fields, "choices")
            good.append(
                Question(
                    image,
                    asked,
                    answers,
                    str("" if fields.get("category") is None else fields["category"]),
                    choices,
                    name,
                    where,
                )
            )
            seen[name] = number
        except ValueError as error:
            prefix = "not JSON: " if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else ""
            bad.append(Failure(f"line {number}", where, f"{prefix}{error}"))
    if not good:
        reasons = "; ".join(f"{f.where}: {f.reason}" for f in bad[:3])
        raise ValueError(f"no question in {path}" + (f" ({reasons})" if reasons else ""))
    return good, bad


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f'the field "{name}" is missing')
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f'the field "{name}" must be a text, got {value!r}')
    return value


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in values):
        raise ValueError(f'the field "{name}" must be a text or a list of texts, got {value!r}')
    return tuple(str(v) for v in values)


def default_prompt(question: Question) -> str:
    """The question, its choices with letters, and LLaVA's request for a short answer."""
    return fill("{question}\n{choices}\n" + _LETTER if question.choices else "{question}\n" + _SHORT, question)


def fill(template: str, question: Question) -> str:
    """A template with ``{question}`` and ``{choices}`` (one per line, with letters; nothing without choices) filled in.

    Raises:
        ValueError: the template leaves the question out.
    """
    if "{question}" not in template:
        raise ValueError(f"a prompt needs {{question}} in it, got {template!r}")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
    return template.replace("{choices}", listed).replace("{question}", question.question)
