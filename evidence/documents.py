"""Rendered documents: pages of text, tables and receipts of random words, for the rows that say what happens to text."""

import random
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

_WORDS = [
    "amount", "invoice", "total", "delivery", "account", "number", "date", "street", "payment", "order",
    "customer", "price", "unit", "tax", "balance", "report", "section", "figure", "table", "result", "method",
    "value", "mean", "error", "sample", "model", "measure", "between", "however", "because", "through", "under",
    "within", "several",
]  # fmt: skip
_PAPER = [((255, 255, 255), (10, 10, 10)), ((248, 244, 232), (40, 32, 24)), ((24, 26, 32), (230, 230, 235))]


def documents(count: int, side: int = 448) -> Iterator[Image.Image]:
    """``count`` pictures of ``side`` pixels, the same in every run: text in one or two columns, a table, a receipt."""
    for number in range(count):
        rng = random.Random(number)
        paper, ink = _PAPER[rng.randrange(len(_PAPER))]
        page = Image.new("RGB", (side, side), paper)
        draw, size = ImageDraw.Draw(page), rng.choice([10, 12, 15, 18, 24])
        font = ImageFont.load_default(size)
        kind = ("text", "columns", "table", "receipt")[number % 4]
        if kind == "table":
            _table(draw, rng, font, size, side, ink)
        else:
            width = {"text": side - 24, "columns": side // 2 - 18, "receipt": side // 2}[kind]
            for left in {"text": [12], "columns": [12, side // 2 + 6], "receipt": [side // 4]}[kind]:
                y = 10
                while y < side - size - 8:
                    draw.text((left, y), _line(draw, rng, font, width), fill=ink, font=font)
                    y += round(size * 1.35)
                    if rng.random() < 0.08:
                        y += size
        yield page


def _line(draw: ImageDraw.ImageDraw, rng: random.Random, font: ImageFont.FreeTypeFont, width: int) -> str:
    line = rng.choice(_WORDS)
    while True:
        word = rng.choice(_WORDS) if rng.random() < 0.8 else f"{rng.randrange(10_000) / 100:.2f}"
        if draw.textlength(f"{line} {word}", font=font) > width:
            return line
        line = f"{line} {word}"


def _table(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    font: ImageFont.FreeTypeFont,
    size: int,
    side: int,
    ink: tuple[int, ...],
) -> None:
    columns, step = rng.choice([3, 4]), round(size * 1.8)
    cell = (side - 20) // columns
    for y in range(10, side - step, step):
        for column in range(columns):
            x = 10 + column * cell
            draw.rectangle((x, y, x + cell, y + step), outline=ink)
            text = _line(draw, rng, font, cell - 8) if column == 0 else f"{rng.randrange(100_000) / 100:.2f}"
            draw.text((x + 4, y + 3), text, fill=ink, font=font)
