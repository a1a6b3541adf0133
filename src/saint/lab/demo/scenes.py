"""Generated scenes with questions: several objects, clutter, a rendered word, photographs behind. Everything from a seed.

The pictures need small details and several places at once, so that dropping the wrong visual tokens costs answers.
"""

import dataclasses
import functools
import io
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from ...files import write_whole
from .pictures import photos

SIDE = 224  # pixels
HELD_OUT = 1_000_000  # the small LLaVA was trained on scenes of other seeds than those from here on
COLOURS = {
    "red": (215, 35, 35),
    "green": (25, 150, 60),
    "blue": (40, 75, 220),
    "yellow": (250, 220, 40),
    "purple": (140, 45, 170),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
WORDS = (
    "apple", "bank", "book", "cafe", "dance", "door", "east", "exit", "farm", "fish", "gold", "hotel",
    "jazz", "king", "lamp", "milk", "moon", "north", "open", "park", "pizza", "queen", "river", "sale",
    "stop", "taxi", "tea", "tiger", "west", "wood", "yoga", "zoo",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
CATEGORIES = ("colour", "shape", "count", "position", "relation", "exists", "word")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene; ``answer`` is one or two words of the vocabulary."""

    text: str
    answer: str
    category: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects, the word on the plate and its centre, and the seed all of it comes from."""

    seed: int
    things: tuple[Thing, ...]
    word: str
    plate: tuple[float, float]

    def image(self) -> Image.Image:
        """RGB, 224 x 224."""
        return _draw(self)

    def questions(self, per_category: int = 1, draw: int = 0) -> list[Question]:
        """At most ``per_category`` questions of each category, in random order.

        The answer is drawn first, from those the scene allows, so that a guess from the question alone stays a guess.

        Args:
            draw: another number gives other questions about the same scene.
        """
        rng = random.Random(f"questions {self.seed} {draw}")
        chosen: list[Question] = []
        for category in CATEGORIES:
            by_answer: dict[str, list[Question]] = {}
            for question in sorted(set(_ASK[category](self)), key=lambda q: q.text):
                by_answer.setdefault(question.answer, []).append(question)
            for _ in range(per_category):
                if not by_answer:
                    break
                answer = rng.choice(sorted(by_answer))
                chosen.append(by_answer[answer].pop(rng.randrange(len(by_answer[answer]))))
                if not by_answer[answer]:
                    del by_answer[answer]
        rng.shuffle(chosen)
        return chosen


def scene(seed: int) -> Scene:
    """The scene of ``seed``: 3 to 7 objects that do not touch, and one word."""
    rng = random.Random(f"scene {seed}")
    plate = (rng.uniform(40, SIDE - 40), rng.uniform(20, SIDE - 20))
    things: list[Thing] = []
    # a colour or a shape twice now and then: otherwise nothing is to be counted
    shapes = rng.sample(SHAPES, rng.randint(3, len(SHAPES)))
    colours = rng.sample(sorted(COLOURS), rng.randint(3, 6))
    wanted = rng.randint(3, 7)
    for _ in range(400):
        if len(things) == wanted:
            break
        radius = rng.uniform(13, 26)
        x, y = (rng.uniform(radius + 3, SIDE - radius - 3) for _ in range(2))
        clear = all((x - t.x) ** 2 + (y - t.y) ** 2 > (radius + t.radius + 5) ** 2 for t in things)
        if clear and (abs(x - plate[0]) > 42 + radius or abs(y - plate[1]) > 18 + radius):
            things.append(Thing(rng.choice(shapes), rng.choice(colours), x, y, radius))
    return Scene(seed, tuple(things), rng.choice(WORDS), plate)


def save(folder: Path, count: int, first: int = HELD_OUT) -> Path:
    """Write the scenes of ``count`` seeds as pictures and a question file for ``saint eval vqa``.

    Args:
        folder: made if it is not there; ``<seed>.png`` and ``questions.jsonl`` go into it.
        count: scenes.
        first: their first seed.

    Returns:
        The question file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(first, first + count):
        made = scene(seed)
        png = io.BytesIO()
        made.image().save(png, "PNG")
        write_whole(folder / f"{seed}.png", png.getvalue())
        for number, asked in enumerate(made.questions()):
            facts = {"id": f"{seed}-{number}", "image": f"{seed}.png", "question": asked.text}
            lines.append(json.dumps(facts | {"answer": asked.answer, "category": asked.category}))
    file = folder / "questions.jsonl"
    write_whole(file, ("\n".join(lines) + "\n").encode())
    return file


# -- questions ------------------------------------------------------------------------------------------------------------


def _only(things: tuple[Thing, ...], **facts: str) -> list[Thing]:
    return [t for t in things if all(getattr(t, name) == value for name, value in facts.items())]


def _unique(s: Scene, *names: str) -> Iterator[Thing]:
    for thing in s.things:
        if len(_only(s.things, **{name: getattr(thing, name) for name in names})) == 1:
            yield thing


def _colour(s: Scene) -> Iterator[Question]:
    for t in _unique(s, "shape"):
        yield Question(f"what color is the {t.shape}", t.colour, "colour")


def _shape(s: Scene) -> Iterator[Question]:
    for t in _unique(s, "colour"):
        yield Question(f"what shape is the thing in {t.colour}", t.shape, "shape")


def _count(s: Scene) -> Iterator[Question]:
    for shape in SHAPES:
        yield Question(f"how many things have the shape {shape}", NUMBERS[len(_only(s.things, shape=shape))], "count")
    for colour in COLOURS:
        yield Question(f"how many things are {colour}", NUMBERS[len(_only(s.things, colour=colour))], "count")


def _position(s: Scene) -> Iterator[Question]:
    for t in _unique(s, "shape", "colour"):
        if abs(t.x - SIDE / 2) > 12 and abs(t.y - SIDE / 2) > 12:  # near the middle no quadrant is certain
            rows, columns = ("top", "bottom"), ("left", "right")
            where = f"{rows[t.y > SIDE / 2]} {columns[t.x > SIDE / 2]}"
            yield Question(f"where is the {t.colour} {t.shape}", where, "position")


def _relation(s: Scene) -> Iterator[Question]:
    things = list(_unique(s, "shape", "colour"))
    for a in things:
        for b in things:
            if a is b:
                continue
            for word, gap in (("left of", b.x - a.x), ("above", b.y - a.y)):
                if abs(gap) > 24:
                    text = f"is the {a.colour} {a.shape} {word} the {b.colour} {b.shape}"
                    yield Question(text, "yes" if gap > 0 else "no", "relation")


def _exists(s: Scene) -> Iterator[Question]:
    present = {(t.colour, t.shape) for t in s.things}
    shapes, colours = {t.shape for t in s.things}, {t.colour for t in s.things}
    for colour in colours:
        for shape in shapes:  # the absent ones are made of what is there: only the binding decides
            answer = "yes" if (colour, shape) in present else "no"
            yield Question(f"is there any {colour} {shape}", answer, "exists")


def _word(s: Scene) -> Iterator[Question]:
    yield Question("what word is written", s.word, "word")


_ASK = {
    "colour": _colour, "shape": _shape, "count": _count, "position": _position, "relation": _relation,
    "exists": _exists, "word": _word,
}  # fmt: skip


# -- pictures -------------------------------------------------------------------------------------------------------------


@functools.cache
def _backgrounds() -> list[Image.Image]:
    images = [image for _, image in photos()]
    for image in images:
        image.thumbnail((700, 700), Image.Resampling.LANCZOS)
    return images


def _background(rng: random.Random) -> Image.Image:
    """A pale crop of a photograph, so that every colour of an object can be told from it."""
    photo = rng.choice(_backgrounds())
    side = rng.uniform(0.4, 1.0) * min(photo.size)
    x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((SIDE * 2, SIDE * 2), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    crop = ImageEnhance.Color(crop).enhance(0.5)
    return Image.blend(crop, Image.new("RGB", crop.size, (150, 150, 150)), 0.55)


def _draw(s: Scene) -> Image.Image:
    rng = random.Random(f"picture {s.seed}")
    image = _background(rng)  # twice the size, for smooth edges
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 12)):  # clutter: thin lines and dots
        x, y = rng.uniform(0, 2 * SIDE), rng.uniform(0, 2 * SIDE)
        colour = rng.choice(list(COLOURS.values()))
        if rng.random() < 0.5:
            draw.line([x, y, x + rng.uniform(-90, 90), y + rng.uniform(-90, 90)], colour, 3)
        else:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
    for thing in s.things:
        _draw_thing(draw, thing)
    font = ImageFont.load_default(44)
    x, y = (2 * value for value in s.plate)
    left, top, right, bottom = draw.textbbox((x, y), s.word, font, "mm")
    draw.rectangle([left - 10, top - 7, right + 10, bottom + 7], (255, 255, 255), (60, 60, 60), 3)
    draw.text((x, y), s.word, (20, 20, 20), font, "mm")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _draw_thing(draw: ImageDraw.ImageDraw, t: Thing) -> None:
    x, y, r = 2 * t.x, 2 * t.y, 2 * t.radius
    fill = COLOURS[t.colour]
    edge = (240, 240, 240) if t.colour in ("black", "blue", "purple") else (40, 40, 40)
    if t.shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill, edge, 3)
    elif t.shape == "ring":
        draw.ellipse([x - r, y - r, x + r, y + r], None, edge, round(r * 0.4) + 3)
        inner = r - 2
        draw.ellipse([x - inner, y - inner, x + inner, y + inner], None, fill, round(r * 0.4))
    elif t.shape == "square":
        s = r * 0.85
        draw.rectangle([x - s, y - s, x + s, y + s], fill, edge, 3)
    else:
        draw.polygon([(x + r * a, y + r * b) for a, b in _OUTLINES[t.shape]], fill, edge, 3)


def _star() -> list[tuple[float, float]]:
    turns = [(size, math.pi * i / 5) for i, size in enumerate((1.05, 0.45) * 5)]
    return [(size * math.sin(turn), -size * math.cos(turn)) for size, turn in turns]


_OUTLINES = {
    "triangle": [(0.0, -1.0), (0.92, 0.75), (-0.92, 0.75)],
    "star": _star(),
    "cross": [
        (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
        (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
    ],
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """``python -m saint.lab.demo.scenes FOLDER COUNT``: :func:`save` from a shell."""
    if len(arguments) != 2 or not arguments[1].isdigit() or not int(arguments[1]):
        raise SystemExit("usage: python -m saint.lab.demo.scenes FOLDER COUNT (pictures, at least 1)")
    print(save(Path(arguments[0]), int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
