"""easy-VQA (Victor Zhou 2019, MIT): one shape on a small picture, questions about it. Read out of its wheel on PyPI."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from .scenes import Question
from .weights import Wheel, wheel_file

_WHEEL = Wheel(
    "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", "easy_vqa/data/{split}"
)
CATEGORIES = ("colour", "shape", "exists")
WORDS = ("image", "contain", "does", "a", "not", "present", "rectangle", "gray", "teal", "brown")
_SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa(split: str, count: int) -> list[tuple[Image.Image, list[Question]]]:
    """The first ``count`` pictures of a split with all their questions, in lower case and without question marks.

    Args:
        split: "train" (4,000 pictures) or "test" (1,000).
        count: pictures.

    Raises:
        DemoUnavailableError: the wheel cannot be had.
    """
    root = _WHEEL.member.format(split=split)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel_file(_WHEEL, Path(folder))) as archive:
        asked: list[list[Question]] = [[] for _ in range(count)]
        for text, answer, picture in json.loads(archive.read(f"{root}/questions.json")):
            if picture < count:
                category = "exists" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "colour"
                asked[picture].append(Question(text.lower().replace("?", ""), answer, category))
        return [
            (Image.open(io.BytesIO(archive.read(f"{root}/images/{i}.png"))).convert("RGB"), questions)
            for i, questions in enumerate(asked)
        ]
