"""Rendered documents: pages of text, tables and receipts of random words, for the rows that say what happens to text."""

import random
from collections.abc import Iterator
from typing import NamedTuple

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


class Look(NamedTuple):
    """What things are drawn with: font and its size, side of the picture, colours."""

    font: ImageFont.FreeTypeFont
    size: int
    side: int
    ink: tuple[int, ...]
    bar: tuple[int, ...]


def screens(count: int, side: int = 448) -> Iterator[Image.Image]:
    """``count`` pictures of ``side`` pixels, the same in every run: an editor, a list of files, a chart, a form."""
    for number in range(count):
        rng = random.Random(10_000 + number)
        dark = rng.random() < 0.5
        back, ink, bar = (
            ((30, 32, 38), (220, 222, 226), (48, 52, 62)) if dark else ((250, 250, 252), (30, 34, 40), (226, 230, 238))
        )
        screen = Image.new("RGB", (side, side), back)
        draw, size = ImageDraw.Draw(screen), rng.choice([10, 11, 13])
        font = ImageFont.load_default(size)
        draw.rectangle((0, 0, side, 24), fill=bar)
        draw.text((8, 5), _line(draw, rng, font, side // 3), fill=ink, font=font)
        (_editor, _files, _chart, _form)[number % 4](draw, rng, Look(font, size, side, ink, bar))
        yield screen


def _editor(draw: ImageDraw.ImageDraw, rng: random.Random, look: "Look") -> None:
    font, size, side, ink, bar = look
    draw.rectangle((0, 24, side // 5, side), fill=bar)
    for number, y in enumerate(range(32, side - size - 4, round(size * 1.4))):
        draw.text((side // 5 + 6, y), str(number + 1), fill=bar, font=font)
        if rng.random() < 0.8:
            left = side // 5 + 34 + 16 * rng.randrange(4)
            draw.text((left, y), _line(draw, rng, font, max(60, rng.randrange(side - left))), fill=ink, font=font)


def _files(draw: ImageDraw.ImageDraw, rng: random.Random, look: "Look") -> None:
    font, size, side, ink, bar = look
    for y in range(36, rng.randrange(side // 2, side - 20), round(size * 2)):
        draw.rectangle((10, y, 10 + size, y + size), fill=bar)
        draw.text((30, y), _line(draw, rng, font, side // 3), fill=ink, font=font)
        draw.text((side * 2 // 3, y), f"{rng.randrange(9_000) / 10:.1f} kB", fill=ink, font=font)


def _chart(draw: ImageDraw.ImageDraw, rng: random.Random, look: "Look") -> None:
    font, _, side, ink, _ = look
    bottom, bars = side - 60, rng.randrange(4, 9)
    draw.line((40, 60, 40, bottom, side - 30, bottom), fill=ink)
    step = (side - 90) // bars
    for place in range(bars):
        left, high = 50 + place * step, rng.randrange(30, bottom - 70)
        draw.rectangle((left, bottom - high, left + step // 2, bottom - 1), fill=(70 + 20 * place % 150, 120, 200))
        draw.text((left, bottom + 6), rng.choice(_WORDS)[:6], fill=ink, font=font)


def _form(draw: ImageDraw.ImageDraw, rng: random.Random, look: "Look") -> None:
    font, _, side, ink, bar = look
    for place in range(rng.randrange(3, 7)):
        y = 50 + place * 52
        draw.text((side // 6, y), rng.choice(_WORDS), fill=ink, font=font)
        draw.rectangle((side // 6, y + 16, side * 5 // 6, y + 38), outline=ink, fill=bar)
        if rng.random() < 0.6:
            draw.text((side // 6 + 6, y + 20), _line(draw, rng, font, side // 2), fill=ink, font=font)
