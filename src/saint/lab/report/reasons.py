"""Why patches were dropped, drawn over a picture: the layer that did, what stands for each, and the votes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .charts import cividis
from .markup import Markup, join, tag
from .words import number

UNIT = 10  # side of a patch in the drawing
_NUMBERED = 28  # columns up to which the layer's number on a patch can be read
_MANY = 80  # lines from which they are drawn thin
_LEVELS = 24  # colours of the scale
_BAR = 320  # width of the scale, in pixels of its drawing
# Okabe and Ito's colours in an order from light blue to violet; between them mixtures. The number on a patch says the layer, too
_LAYERS = [(86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)]


@dataclass(frozen=True)
class Why:
    """Why tokens were dropped at a drop point.

    Attributes:
        gone: indices into the grid of what was dropped.
        into: of each the index of what it is part of, or what stands for it; None: on another picture.
        merged: whether it became part of it.
        degree: neighbours by index of each source of a voting graph; empty where nothing votes.
        neighbors: degree from which a source votes to go.
        threshold: cosine from which two tokens are neighbours.
    """

    gone: Sequence[int]
    into: Sequence[int | None]
    merged: bool = False
    degree: Mapping[int, int] = field(default_factory=dict)
    neighbors: int = 0
    threshold: float = 0.0

    @staticmethod
    def of(step: Mapping[str, Any], first: int, count: int) -> "Why | None":
        """Of a step of a record; None where it says nothing.

        Args:
            step: of a drop point.
            first: index of the first token that lies on this grid.
            count: tokens of the grid.

        Raises:
            ValueError: lists that do not belong together.
        """
        why = step.get("why")
        if why is None:
            return None
        gone, into = [int(n) for n in why["gone"]], [int(n) for n in why["into"]]
        if len(gone) != len(into):
            raise ValueError(f"{len(gone)} tokens were dropped, and {len(into)} stand for them")
        here = range(first, first + count)
        pairs = [(n - first, to - first if to in here else None) for n, to in zip(gone, into, strict=True) if n in here]
        degree = [int(n) for n in why.get("degree") or []]
        sources = sorted([*map(int, step["kept"]), *gone])[0::2] if degree else []
        if len(sources) != len(degree):
            raise ValueError(f"{len(sources)} sources have {len(degree)} degrees")
        found = {n - first: d for n, d in zip(sources, degree, strict=True) if n in here}
        return Why([n for n, _ in pairs], [to for _, to in pairs], bool(why.get("merged")), found,
                   int(why.get("neighbors", 0)), float(why.get("threshold", 0)))  # fmt: skip

    def moved(self, cell: Mapping[int, int]) -> "Why":
        """The same on another grid: ``cell`` says for each index of this one which it is there."""
        into = [None if to is None else cell[to] for to in self.into]
        degree = {cell[n]: found for n, found in self.degree.items()}
        return replace(self, gone=[cell[n] for n in self.gone], into=into, degree=degree)


@dataclass(frozen=True)
class Leaving:
    """Patches that were dropped at one drop point.

    Attributes:
        place: of the drop point among those of the slider, from 1.
        mark: short name of the layer, e.g. "3".
        name: its name.
        gone: indices into the grid.
        why: None where it is not known.
    """

    place: int
    mark: str
    name: str
    gone: Sequence[int]
    why: Why | None


def colours(count: int) -> list[tuple[int, int, int]]:
    """One for each of the layers that drop patches, first to last."""
    made = []
    for i in range(count):
        at = i * (len(_LAYERS) - 1) / max(1, count - 1)
        low = min(int(at), len(_LAYERS) - 2)
        a, b = _LAYERS[low], _LAYERS[low + 1]
        red, green, blue = (round(x + (y - x) * (at - low)) for x, y in zip(a, b, strict=True))
        made.append((red, green, blue))
    return made


def dropped(leaving: Sequence[Leaving], columns: int) -> Markup:
    """A group per drop point: patches in its colour with its number, and lines to what stands for them."""
    made = []
    last = len(leaving) - 1
    for i, (step, colour) in enumerate(zip(leaving, colours(len(leaving)), strict=True)):
        cells = [divmod(n, columns) for n in step.gone]
        area = "".join(f"M{c * UNIT} {r * UNIT}h{UNIT}v{UNIT}h-{UNIT}z" for r, c in cells)
        parts = [tag("path", d=area, fill=f"rgb{colour}", class_="tint")]
        if step.why is not None:
            ends = [(divmod(n, columns), divmod(to, columns)) for n, to in
                    zip(step.why.gone, step.why.into, strict=True) if to is not None]  # fmt: skip
            lines = "".join(f"M{_middle(a)}L{_middle(b)}" for a, b in ends)
            dots = "".join(f"M{_middle(b)}h0" for b in sorted({b for _, b in ends}))
            shapes = ((lines, "to shade"), (dots, "to dot shade"), (lines, "to"), (dots, "to dot"))
            parts += [tag("path", d=d, class_=name) for d, name in shapes] if lines else []
            if len(ends) > _MANY:
                parts[1:] = [tag("g", *parts[1:], class_="many")]
        if columns <= _NUMBERED:
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
            ink = "light" if dark else "ink"
            marks = (
                tag("text", step.mark, x=c * UNIT + UNIT // 2, y=r * UNIT + 7, text_anchor="middle") for r, c in cells
            )
            parts.append(tag("g", *marks, class_=f"marks {ink}{' long' if len(step.mark) > 2 else ''}"))
        made.append(tag("g", *parts, class_="gone now" if i == last else "gone", data_from=step.place))
    return join(made)


def _middle(cell: tuple[int, int]) -> str:
    return f"{cell[1] * UNIT + UNIT // 2} {cell[0] * UNIT + UNIT // 2}"


def legend(leaving: Sequence[Leaving]) -> Markup:
    """Colour, number and count of each layer that dropped patches."""
    items = []
    for step, colour in zip(leaving, colours(len(leaving)), strict=True):
        box = tag("rect", width=14, height=14, fill=f"rgb{colour}")
        chip = tag("svg", box, viewBox="0 0 14 14", class_="dot", aria_hidden="true")
        items.append(tag("li", chip, f"{step.name}: {len(step.gone)} dropped"))
    return tag("ul", *items, class_="legend")


def votes(shown: Sequence[Why | None], names: Sequence[str], rows: int, columns: int, photo: str) -> Markup | None:
    """The heat map of degrees, a group per place of the slider, with its scale; None where nothing votes.

    Args:
        shown: of each place of the slider.
        names: of the places.
        rows, columns: of the grid.
        photo: id of the picture that it lies on.
    """
    top = max((d for why in shown if why is not None for d in why.degree.values()), default=None)
    if top is None:
        return None
    voting = [why for why in shown if why is not None and why.degree]
    groups = []
    for i, (why, name) in enumerate(zip(shown, names, strict=True)):
        at: list[Markup] = []
        if why is not None and why.degree:
            same: dict[int, list[int]] = {}
            for n, degree in why.degree.items():
                same.setdefault(degree, []).append(n)
            for degree, cells in sorted(same.items()):
                area = "".join(_cell(n, columns, 0) for n in cells)
                at.append(tag("path", d=area, fill=cividis(_share(degree, top))))
            voters = [n for n, degree in why.degree.items() if degree >= why.neighbors]
            frames = "".join(_cell(n, columns, 1) for n in voters)
            at += [tag("path", d=frames, class_="vote shade"), tag("path", d=frames, class_="vote")] if voters else []
        last = i == len(shown) - 1
        groups.append(tag("g", *at, class_="heat" if last else "heat off", data_label=_counted(why, name)))
    wide, high = columns * UNIT, rows * UNIT
    paper = tag("rect", width=wide, height=high, fill="#fff")
    pale = tag("g", tag("use", href=f"#{photo}"), class_="pale")
    about = "neighbours of each source; framed ones vote to go"
    picture = tag(
        "svg", paper, pale, *groups, viewBox=f"0 0 {wide} {high}", role="img", aria_label=about, class_="field"
    )
    said = tag("p", _counted(shown[-1], names[-1]), class_="counted")
    title = tag("p", tag("b", "Neighbours of each source"), " at that layer")
    return tag("div", title, picture, _scale(top, voting), said, class_="votes")


def _counted(why: Why | None, name: str) -> str:
    if why is None or not why.degree:
        return f"{name}: no vote"
    voters = sum(degree >= why.neighbors for degree in why.degree.values())
    return f"{name}: {voters} of {len(why.degree)} sources have {why.neighbors} or more, a vote to go"


def _share(degree: int, top: int) -> float:
    """Place on the scale, 0 to 1. By the square root: most degrees are small, and whether 5 are reached is what matters."""
    return math.sqrt(degree / top) if top else 0.0


def _cell(n: int, columns: int, inset: int) -> str:
    row, column = divmod(n, columns)
    side = UNIT - 2 * inset
    return f"M{column * UNIT + inset} {row * UNIT + inset}h{side}v{side}h-{side}z"


def _scale(top: int, voting: Sequence[Why]) -> Markup:
    """The colours with their numbers, and what the marks mean."""
    wide = _BAR / _LEVELS
    boxes = [tag("rect", x=i * wide, y=0, width=wide + 0.5, height=12, fill=cividis(i / (_LEVELS - 1)))
             for i in range(_LEVELS)]  # fmt: skip
    needed = sorted({why.neighbors for why in voting})
    cosines = " or ".join(number(threshold, 2) for threshold in sorted({why.threshold for why in voting}))
    ticks = [tag("text", "0", x=0, y=26), tag("text", number(top), x=_BAR, y=26, text_anchor="end")]
    for count in needed:
        at = _share(count, top) * _BAR
        if 0.1 * _BAR < at < 0.9 * _BAR:
            ticks.append(tag("path", d=f"M{at:.0f} 0v15", class_="tick"))
            ticks.append(tag("text", number(count), x=round(at), y=26, text_anchor="middle"))
    said = f"colours from 0 to {number(top)} neighbours"
    bar = tag("svg", *boxes, *ticks, viewBox=f"0 0 {_BAR} 30", class_="scale", role="img", aria_label=said)
    inner = "M3 3h8v8h-8z"
    frame = tag("svg", tag("rect", width=14, height=14, fill=cividis(0.2)), tag("path", d=inner, class_="vote shade"),
                tag("path", d=inner, class_="vote"), viewBox="0 0 14 14", class_="dot", aria_hidden="true")  # fmt: skip
    what = f"neighbours: other tokens with a cosine of keys of at least {cosines}"
    items = [tag("li", what), tag("li", frame, f"{' or '.join(map(str, needed))} or more: votes to go"),
             tag("li", "pale: no source, or gone before")]  # fmt: skip
    return join([bar, tag("ul", *items, class_="legend")])


def told(leaving: Sequence[Leaving], shown: Sequence[Why | None], rows: int, columns: int) -> str:
    """Say what the page's script tells of a patch, as JSON: ``rows``, ``columns``; ``gone`` (by patch: the place that dropped it,
    what stands for it, whether it became part of it); ``degrees`` (by place: sources, degrees, neighbours of a vote); ``names``.
    """
    gone: dict[int, list[Any]] = {}
    for step in leaving:
        into = {} if step.why is None else dict(zip(step.why.gone, step.why.into, strict=True))
        for n in step.gone:
            gone[n] = [step.place, into.get(n), int(step.why is not None and step.why.merged)]
    degrees = [
        [list(why.degree), list(why.degree.values()), why.neighbors] if why is not None and why.degree else None
        for why in shown
    ]
    names = {step.place: step.name for step in leaving}
    data = {"rows": rows, "columns": columns, "gone": gone, "degrees": degrees, "names": names}
    return json.dumps(data, separators=(",", ":"))
