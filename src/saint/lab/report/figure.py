"""One picture with the patches that were dropped under a slider over layers; when and why, on demand."""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..images import data_uri, read_untrusted
from .blocks import Figure
from .markup import Markup, details, tag
from .reading import behind, mark_of
from .reasons import UNIT, Leaving, Why, dropped, legend, told, votes


@dataclass(frozen=True)
class Step:
    """What stays behind a drop point.

    Attributes:
        name: of the drop point.
        kept: indices into the grid.
        tokens_in: what came in.
        mark: short name of the drop point, for the patches that were dropped there.
        why: what stands for them, and how they voted; None where it is not known.
    """

    name: str
    kept: Sequence[int]
    tokens_in: int
    mark: str = ""
    why: Why | None = None


def embedded(uri: str, side: int = 320, shares: tuple[float, float] = (1.0, 1.0)) -> str:
    """A picture of a record, decoded safely and written anew as a small JPEG.

    Args:
        uri: "data:image/...;base64,...".
        side: of the result at most, pixels.
        shares: of its width and height that are left of it.

    Raises:
        ValueError: no such picture.
    """
    head, comma, body = str(uri).partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(f'a picture is "data:image/...;base64,...", got {str(uri)[:40]!r}')
    try:
        data = base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError("a picture is no base64") from error
    picture = read_untrusted(data)
    if shares != (1.0, 1.0):
        picture.thumbnail((side, side))  # what it would be without the shares
        picture = picture.resize([max(1, round(n * share)) for n, share in zip(picture.size, shares, strict=True)])
    return data_uri(picture, side)


def figure(drawn: Figure, number_: str, side: int) -> Markup:
    """One picture with the patches that were dropped darkened and hatched. The last layer shows without JavaScript.

    On demand it is shown again, with the colour and number of the layer that dropped each patch. Where reasons are known, lines
    go from what a layer drops to what stands for it, and a heat map beside the picture shows the votes.

    Args:
        drawn: the picture.
        number_: makes ids unique.
        side: pixels of the picture at most.

    Raises:
        ValueError: an index beyond the grid.
    """
    name, uri, grid, steps = drawn.name, drawn.uri, drawn.grid, drawn.steps
    rows, columns = (int(side_) for side_ in grid)
    total = rows * columns
    if not 0 < total <= 100_000:
        raise ValueError(f"a grid of {rows} x {columns} patches cannot be drawn")
    high, wide = rows * UNIT, columns * UNIT
    hatch = f"hatch{number_}"
    pattern = tag(
        "pattern",
        tag("path", d="M-2 12L12 -2M-2 2L2 -2M8 12L12 8"),
        id=hatch,
        width=10,
        height=10,
        patternUnits="userSpaceOnUse",
    )
    photo = f"photo{number_}"
    parts = [tag("defs", pattern)]
    count, first, shares, sharp = total, "before the first drop point", (1.0, 1.0), None
    if drawn.whole is not None:  # as sharp as the model sees it
        count = int(drawn.whole[0]) * int(drawn.whole[1])
        first = f"smaller picture, {rows} x {columns} patches"
        shares, sharp = (columns / int(drawn.whole[1]), rows / int(drawn.whole[0])), "pixelated"
    parts.append(
        tag(
            "image",
            href=embedded(uri, side, shares),
            width=wide,
            height=high,
            preserveAspectRatio="none",
            id=photo,
            image_rendering=sharp,
        )
        if uri is not None
        else tag("rect", width=wide, height=high, fill="#8a8f98", id=photo)
    )
    shown = [Step(first, range(total), total), *steps]
    gone_before, leaving, labels = [False] * total, [], []
    for i, step in enumerate(shown):
        hidden = _dropped(step.kept, total)
        left = total - sum(hidden)
        labels.append(f"{step.name}: {left} of {count} kept ({left / count:.0%})")
        area, edge = _outline(hidden, rows, columns)
        layer = [
            tag("path", d=area, class_="dark"),
            tag("path", d=area, fill=f"url(#{hatch})"),
            tag("path", d=edge, class_="rim"),
        ]
        last = i == len(shown) - 1
        parts.append(tag("g", *(layer if area else []), class_="step" if last else "step off", data_label=labels[-1]))
        gone = [n for n in range(total) if hidden[n] and not gone_before[n]]
        if gone:
            leaving.append(Leaving(i, step.mark, step.name, gone, step.why))
        gone_before = hidden
    reasons = [step.why for step in shown]
    _check_reasons(leaving, reasons, total)
    box = f"0 0 {wide} {high}"
    picture = tag(
        "svg", *parts, viewBox=box, role="img", aria_label=f"{name}; hatched patches were dropped", class_="seen"
    )
    said = tag("output", labels[-1], id=f"said{number_}", aria_live="polite")
    slider = tag(
        "label",
        tag("span", f"layer, {name}", class_="hidden-label"),
        tag(
            "input",
            type="range",
            min=0,
            max=len(shown) - 1,
            value=len(shown) - 1,
            step=1,
            aria_describedby=f"said{number_}",
        ),
        class_="slider",
        hidden=True,
    )
    shows = [tag("figcaption", tag("b", name)), picture, slider, said]
    explained = any(why is not None for why in reasons)
    if not leaving or not (explained or len(leaving) > 1):
        return tag("figure", *shows, class_="kept")
    about = f"{name}; the number on a patch is that of the layer that dropped it"
    when = tag("svg", tag("use", href=f"#{photo}"), dropped(leaving, columns), viewBox=box, role="img", aria_label=about,
               class_="map")  # fmt: skip
    if not explained:
        return tag("figure", *shows, details("when each patch was dropped", when, legend(leaving)), class_="kept")
    merged = any(why is not None and why.merged for why in reasons)
    lines = f" (lines: {'became part of' if merged else 'most similar survivor'})"
    patch = tag("output", class_="patch", aria_live="polite", hidden=True)
    panel = tag("div", tag("p", tag("b", "What was dropped"), lines), when, legend(leaving), patch, class_="panel")
    heat = votes(reasons, [step.name for step in shown], rows, columns, photo)
    why = details("when and why each patch was dropped", tag("div", panel, heat, class_="panels"))
    return tag("figure", *shows, why, class_="kept why", data_why=told(leaving, reasons, rows, columns))


def _check_reasons(leaving: Sequence[Leaving], reasons: Sequence[Why | None], total: int) -> None:
    for step in leaving:
        if step.why is not None and sorted(step.why.gone) != list(step.gone):
            raise ValueError(f"{step.name}: the reasons are of other patches than those that were dropped")
    for why in reasons:
        for n in () if why is None else (*(to for to in why.into if to is not None), *why.degree):
            if not 0 <= n < total:
                raise ValueError(f"a patch of the reasons is in 0..{total - 1}, got {n}")


def _dropped(kept: Sequence[int], total: int) -> list[bool]:
    dropped = [True] * total
    for index in kept:
        if not 0 <= int(index) < total:
            raise ValueError(f"a kept patch is in 0..{total - 1}, got {index!r:.20}")
        dropped[int(index)] = False
    return dropped


def _outline(dropped: Sequence[bool], rows: int, columns: int) -> tuple[str, str]:
    """Path of the dropped cells, a rectangle per run of a row; and of the edges they share with kept ones."""
    area, edge = [], []
    for row in range(rows):
        line = dropped[row * columns : (row + 1) * columns]
        start = None
        for column in range(columns + 1):
            inside = column < columns and line[column]
            if inside and start is None:
                start = column
            elif not inside and start is not None:
                wide = (column - start) * UNIT
                area.append(f"M{start * UNIT} {row * UNIT}h{wide}v{UNIT}h-{wide}z")
                start = None
            if 0 < column < columns and line[column - 1] != line[column]:
                edge.append(f"M{column * UNIT} {row * UNIT}v{UNIT}")
        if row:
            above = dropped[(row - 1) * columns : row * columns]
            start = None
            for column in range(columns + 1):
                inside = column < columns and line[column] != above[column]
                if inside and start is None:
                    start = column
                elif not inside and start is not None:
                    edge.append(f"M{start * UNIT} {row * UNIT}h{(column - start) * UNIT}")
                    start = None
    return "".join(area), "".join(edge)


def standing(into: Sequence[int], grid: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Rows and columns of a grid at which the patches of a smaller picture stand; None where tokens merged in another way.

    Args:
        into: for each patch of the grid the one that shows it, whose row follows from the patch's row and whose column from its
            column.
        grid: rows and columns.
    """
    rows, columns = (int(side) for side in grid)
    if len(into) != rows * columns or not all(0 <= int(to) < rows * columns for to in into):
        return None
    down, across = [int(to) // columns for to in into[::columns]], [int(to) % columns for to in into[:columns]]
    if any(int(to) != down[n // columns] * columns + across[n % columns] for n, to in enumerate(into)):
        return None
    return sorted(set(down)), sorted(set(across))


def drawn_as_seen(
    name: str, uri: str | None, grid: Sequence[int], layers: Sequence[Mapping[str, Any]], steps: list[Step]
) -> Figure:
    """The figure of a picture, on the grid of a smaller one where the model sees that.

    Args:
        name: of the picture.
        uri: see :class:`Figure`.
        grid: rows and columns.
        layers: of a record, those of this picture.
        steps: made of them, in the same order.
    """
    found = standing(layers[0]["into"], grid) if layers and "into" in layers[0] else None
    if found is None or len(steps) != len(layers):
        return Figure(name, uri, grid, steps)
    rows, columns = found
    cell = {r * int(grid[1]) + c: i * len(columns) + j for i, r in enumerate(rows) for j, c in enumerate(columns)}
    moved = [
        replace(step, kept=[cell[int(n)] for n in step.kept], why=None if step.why is None else step.why.moved(cell))
        for step in steps[1:]
    ]
    return Figure(name, uri, (len(rows), len(columns)), moved, grid)


def steps_on_grid(layers: Iterable[Mapping[str, Any]], count: int) -> list[Step]:
    """The drop points of an encoder's photograph on a grid of ``count`` patches."""
    return [Step(behind(s), s["kept"], s.get("tokens_in", 0), mark_of(s), Why.of(s, 0, count)) for s in layers]
