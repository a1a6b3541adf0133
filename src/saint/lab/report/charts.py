"""Curves, heat maps and scatter plots as SVG, made from numbers alone.

Drawn 420 units wide, so that text stays legible in a column of that many pixels; colours are classes of ``page.css``, which has a
light and a dark set. A line is told by its dashes and markers too, never by its colour alone.
"""

import math
from collections.abc import Sequence

from .blocks import Boundary, Curves, Line, Matrix, Plot, Table, Values, front
from .markup import Markup, details, join, table, tag
from .words import interval, number

STYLES = 7  # colours of the style sheet, each with its own dashes and marker
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 4", "4 2 1 2", "1 2")
_WIDE, _HIGH = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 12, 42


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class _Axes:
    """Where numbers lie on the paper."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1 = x
        self.y0, self.y1 = y

    def across(self, x: float) -> float:
        return _LEFT + (x - self.x0) / (self.x1 - self.x0 or 1) * (_WIDE - _LEFT - _RIGHT)

    def up(self, y: float) -> float:
        return _HIGH - _BOTTOM - (y - self.y0) / (self.y1 - self.y0 or 1) * (_HIGH - _TOP - _BOTTOM)

    def frame(self, x_name: str, y_name: str, *, whole: bool) -> Markup:
        parts = []
        for y in ticks(self.y0, self.y1, 6):
            at = self.up(y)
            parts.append(tag("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=_n(at), y2=_n(at), class_="grid"))
            parts.append(tag("text", _tick(y), x=_LEFT - 6, y=_n(at + 4), text_anchor="end"))
        for x in ticks(self.x0, self.x1, 7):
            if whole and not float(x).is_integer():
                continue
            at = self.across(x)
            parts.append(tag("line", x1=_n(at), x2=_n(at), y1=_HIGH - _BOTTOM, y2=_HIGH - _BOTTOM + 4, class_="axis"))
            parts.append(tag("text", mark(x_name, x, _tick(x)), x=_n(at), y=_HIGH - _BOTTOM + 16, text_anchor="middle"))
        base = _HIGH - _BOTTOM
        parts.append(tag("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=base, y2=base, class_="axis"))
        middle = (_LEFT + _WIDE - _RIGHT) / 2
        parts.append(tag("text", x_name, x=_n(middle), y=_HIGH - 8, text_anchor="middle", class_="name"))
        centre = _n((_TOP + _HIGH - _BOTTOM) / 2)
        turned = f"rotate(-90 12 {centre})"
        parts.append(tag("text", y_name, x=12, y=centre, text_anchor="middle", transform=turned, class_="name"))
        return join(parts)


def line_chart(curves: Curves) -> Markup:
    """Curves with a legend, and the numbers below; the first ``STYLES`` are drawn, all are in the table."""
    title, lines, x, y = curves.title, curves.lines, curves.x, curves.y
    drawn = lines[:STYLES]
    finite = [float(v) for line in drawn for v in (*line.mean, *line.low, *line.high) if v is not None]
    places = [place for line in drawn for place in line.places()]
    if not finite:
        return tag("figure", tag("figcaption", tag("b", title)), tag("p", "no value at any layer"), class_="chart")
    whole = all(place.is_integer() for place in places)
    axes = _Axes(_spread(places), _heights(curves, finite))
    parts = [axes.frame(x, y, whole=whole)]
    if curves.whole is not None:
        name, level = curves.whole
        at = _n(axes.up(level))
        parts.append(tag("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=at, y2=at, class_="front"))
        parts.append(tag("text", f"{name} {number(level)}", x=_WIDE - _RIGHT - 2, y=_n(axes.up(level) - 4),
                         text_anchor="end", class_="name"))  # fmt: skip
    for edge in curves.boundaries:
        left, right = axes.across(edge.low - 0.5), axes.across(edge.high - 0.5)
        parts.append(_rect(left, _TOP, right - left, _HIGH - _TOP - _BOTTOM, "edges"))
        at = _n(axes.across(edge.at - 0.5))
        mark = tag("line", x1=at, x2=at, y1=_TOP, y2=_HIGH - _BOTTOM, class_="edge")
        parts.append(
            tag(
                "g",
                mark,
                tag("title", f"in front of layer {number(edge.at)}, {number(edge.low)} to {number(edge.high)}"),
            )
        )
    parts += [_curve(axes, line, i, x) for i, line in enumerate(drawn)]
    picture = tag("svg", *parts, viewBox=f"0 0 {_WIDE} {_HIGH}", role="img", aria_label=_spoken(title, drawn, x))
    left_out = f" ({len(lines) - STYLES} more in the table)" if len(lines) > STYLES else ""
    caption = tag(
        "figcaption", tag("b", title), tag("span", f" {curves.note}{left_out}") if curves.note or left_out else None
    )
    return tag("figure", caption, picture, _legend(drawn, curves.boundaries), _numbers(title, lines, x), class_="chart")


def _curve(axes: _Axes, line: Line, style: int, axis: str) -> Markup:
    points = [
        (axes.across(x), None if y is None else axes.up(float(y)))
        for x, y in zip(line.places(), line.mean, strict=True)
    ]
    parts = []
    if line.low and line.high:
        for run in _runs([a is not None and b is not None for a, b in zip(line.low, line.high, strict=True)]):
            top = [(points[i][0], axes.up(float(line.high[i] or 0))) for i in run]
            bottom = [(points[i][0], axes.up(float(line.low[i] or 0))) for i in reversed(run)]
            parts.append(tag("path", d=f"M{_path(top + bottom)}Z", class_=f"band f{style}"))
    for run in _runs([y is not None for _, y in points]):
        parts.append(
            tag(
                "path",
                d=f"M{_path([(points[i][0], points[i][1] or 0.0) for i in run])}",
                class_=f"curve c{style}",
                stroke_dasharray=_DASHES[style] or None,
            )
        )
    for i, (at, y) in enumerate(points):
        if y is not None:
            value = interval(line.mean[i], _at(line.low, i), _at(line.high, i))
            said = f"{line.name}, {mark(axis, line.places()[i], number(line.places()[i]))}: {value}"
            parts.append(tag("g", marker(style, at, y), tag("title", said), data_tip=said))
    return join(parts)


def marker(style: int, x: float, y: float, size: float = 3.4) -> Markup:
    """The shape of a style, around a point."""
    kind, s = style % STYLES, size
    if kind == 0:
        return tag("circle", cx=_n(x), cy=_n(y), r=s, class_=f"mark f{kind}")
    corners = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -s * 1.3), (s * 1.2, s), (-s * 1.2, s)],
        3: [(0, -s * 1.4), (s * 1.4, 0), (0, s * 1.4), (-s * 1.4, 0)],
        4: [(0, s * 1.3), (s * 1.2, -s), (-s * 1.2, -s)],
        5: [(-s * 1.3, -s * 0.5), (s * 1.3, -s * 0.5), (s * 1.3, s * 0.5), (-s * 1.3, s * 0.5)],
        6: [(-s * 0.5, -s * 1.4), (s * 0.5, -s * 1.4), (s * 0.5, s * 1.4), (-s * 0.5, s * 1.4)],
    }[kind]
    return tag("path", d=f"M{_path([(x + dx, y + dy) for dx, dy in corners])}Z", class_=f"mark f{kind}")


def _legend(lines: Sequence[Line], boundaries: Sequence[Boundary]) -> Markup:
    items = []
    for i, line in enumerate(lines if len(lines) > 1 else ()):  # one alone is what the title says
        stroke = tag("path", d="M1 7L35 7", class_=f"curve c{i}", stroke_dasharray=_DASHES[i] or None)
        sample = tag("svg", stroke, marker(i, 18, 7), viewBox="0 0 36 14", class_="sample", aria_hidden="true")
        items.append(tag("li", sample, line.name))
    if boundaries:
        stroke = tag("path", d="M18 0L18 14", class_="edge")
        items.append(
            tag("li", tag("svg", stroke, viewBox="0 0 36 14", class_="sample", aria_hidden="true"), "boundary")
        )
    return tag("ul", *items, class_="legend")


def mark(axis: str, place: float, text: str) -> str:
    """Name a place of an axis: tokens that are dropped in front of the first layer are dropped at the input."""
    return "input" if axis == "layer" and place == -1 else text


def _numbers(title: str, lines: Sequence[Line], x: str) -> Markup:
    at = sorted({place for line in lines for place in line.places()})
    rows = [[mark(x, place, number(place)), *(interval(*line.at(place)) for line in lines)] for place in at]
    return details("numbers", table(Table([x, *(line.name for line in lines)], rows, title, sortable=False)))


def heat_map(matrix: Matrix) -> Markup:
    """A square of cells, dark blue to yellow (cividis: the same order for every eye, and in grey)."""
    title, values, unit, axis = matrix.title, matrix.values, matrix.unit, "layer"
    finite = [float(v) for row in values for v in row if v is not None]
    if not finite:
        return tag("figure", tag("figcaption", tag("b", title)), tag("p", "no value"), class_="chart")
    low, high = min(finite), max(finite)
    rows, columns = len(values), max(map(len, values))
    side = (_WIDE - _LEFT - _RIGHT) / max(rows, columns)
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            share = None if value is None else (float(value) - low) / (high - low or 1)
            colour = "#888888" if share is None else cividis(share)
            said = f"{axis} {i}, {axis} {j}: {number(value)}"
            box = tag("rect", tag("title", said), x=_n(_LEFT + j * side), y=_n(_TOP + i * side), width=_n(side + 0.3),
                      height=_n(side + 0.3), fill=colour, data_tip=said)  # fmt: skip
            parts.append(box)
    every = max(1, math.ceil(max(rows, columns) / 12))
    bottom = _TOP + rows * side
    for i in range(0, rows, every):
        parts.append(tag("text", str(i), x=_LEFT - 6, y=_n(_TOP + (i + 0.5) * side + 4), text_anchor="end"))
    for j in range(0, columns, every):
        parts.append(tag("text", str(j), x=_n(_LEFT + (j + 0.5) * side), y=_n(bottom + 15), text_anchor="middle"))
    middle = _n((_LEFT + _WIDE - _RIGHT) / 2)
    parts.append(tag("text", axis, x=middle, y=_n(bottom + 32), text_anchor="middle", class_="name"))
    centre = _n(_TOP + rows * side / 2)
    parts.append(
        tag("text", axis, x=12, y=centre, text_anchor="middle", transform=f"rotate(-90 12 {centre})", class_="name")
    )
    steps = 24
    wide = (_WIDE - _LEFT - _RIGHT) / steps
    for k in range(steps):
        place = {"x": _n(_LEFT + k * wide), "y": _n(bottom + 44), "width": _n(wide + 0.3), "height": 10}
        parts.append(tag("rect", **place, fill=cividis(k / (steps - 1))))
    parts.append(tag("text", number(low), x=_LEFT, y=_n(bottom + 68)))
    parts.append(tag("text", unit, x=middle, y=_n(bottom + 68), text_anchor="middle"))
    parts.append(tag("text", number(high), x=_WIDE - _RIGHT, y=_n(bottom + 68), text_anchor="end"))
    said = f"{title}: {rows} by {columns}, from {number(low)} to {number(high)}"
    picture = tag("svg", *parts, viewBox=f"0 0 {_WIDE} {_n(bottom + 76)}", role="img", aria_label=said)
    body = [[str(i), *(number(v) for v in row)] for i, row in enumerate(values)]
    numbers = details("numbers", table(Table([axis, *map(str, range(columns))], body, title, sortable=False)))
    return tag("figure", tag("figcaption", tag("b", title)), picture, numbers, class_="chart")


def scatter(plot: Plot) -> Markup:
    """The points; each can be reached by the keyboard."""
    title, points, x, y, note = plot.title, plot.points, plot.x, plot.y, plot.note
    groups = list(dict.fromkeys(point.group for point in points))
    wide = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    high = [v for p in points for v in (p.y, p.y_low, p.y_high) if v is not None]
    axes = _Axes(_padded(wide), _padded(high))
    parts = [axes.frame(x, plot.axis, whole=False)]
    best = front(points, least=plot.least)
    if len(best) > 1:
        stairs = [(axes.across(p.x), axes.up(p.y)) for p in best]
        parts.append(tag("path", d=f"M{_path(stairs)}", class_="front"))
    taken = [(axes.across(p.x), axes.up(p.y)) for p in points]
    for i, point in enumerate(points, 1):
        style = groups.index(point.group) % STYLES
        across, up = axes.across(point.x), axes.up(point.y)
        where = (
            f"{x} {interval(point.x, point.x_low, point.x_high)}; {y} {interval(point.y, point.y_low, point.y_high)}"
        )
        said = f"{i}: {point.name}; {where}"
        inside: list[Markup | None] = []
        if point.x_low is not None and point.x_high is not None:
            a, b = _n(axes.across(point.x_low)), _n(axes.across(point.x_high))
            inside.append(tag("path", d=f"M{a} {_n(up)}L{b} {_n(up)}", class_=f"whisker c{style}"))
        if point.y_low is not None and point.y_high is not None:
            a, b = _n(axes.up(point.y_low)), _n(axes.up(point.y_high))
            inside.append(tag("path", d=f"M{_n(across)} {a}L{_n(across)} {b}", class_=f"whisker c{style}"))
        spot = _free(across, up, taken)
        label = None
        if spot is not None:
            taken.append(spot)
            label = tag("text", str(i), x=_n(spot[0]), y=_n(spot[1] + 4), text_anchor="middle")
        inside += [marker(style, across, up, 5), label, tag("title", said)]
        parts.append(tag("g", *inside, tabindex="0", role="img", aria_label=said, data_tip=said, class_="point"))
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {_WIDE} {_HIGH}", role="group", aria_label=f"{title}: {len(points)} points"
    )
    items = []
    for i, group in enumerate(groups):
        sample = tag("svg", marker(i % STYLES, 7, 7, 5), viewBox="0 0 14 14", class_="dot", aria_hidden="true")
        items.append(tag("li", sample, group))
    caption = tag("figcaption", tag("b", title), tag("span", f" {note}") if note else None)
    legend = tag("ul", *items, class_="legend")
    return tag("figure", caption, picture, legend, class_="chart wide" if plot.wide else "chart")


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Middle of a place for a number beside a point that is on no other number or point; None where there is none."""
    for dx, dy in ((12, -9), (12, 9), (-12, -9), (-12, 9), (0, -15), (0, 15)):
        spot = x + dx, y + dy
        if spot[0] < _WIDE - 8 and all(abs(spot[0] - a) > 11 or abs(spot[1] - b) > 9 for a, b in taken):
            return spot
    return None


_CIVIDIS = [(0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (166, 157, 117)]
_CIVIDIS += [(195, 181, 107), (225, 207, 88), (254, 232, 56)]


def cividis(share: float) -> str:
    """Colour of a share in [0, 1], as "#rrggbb" (anchors of matplotlib's "cividis")."""
    at = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    i = min(int(at), len(_CIVIDIS) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(_CIVIDIS[i], _CIVIDIS[i + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _spoken(title: str, lines: Sequence[Line], x: str) -> str:
    """Say what a screen reader says: each curve's first and last value."""
    said = []
    for line in lines:
        known = [(place, y) for place, y in zip(line.places(), line.mean, strict=True) if y is not None]
        if known:
            (a, first), (b, last) = known[0], known[-1]
            said.append(f"{line.name} from {number(first)} at {x} {number(a)} to {number(last)} at {x} {number(b)}")
    return f"{title}: {'; '.join(said)}"


def _runs(there: Sequence[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, here in enumerate(there):
        if here:
            if i and there[i - 1]:
                runs[-1].append(i)
            else:
                runs.append([i])
    return runs


def _at(values: Values, i: int) -> float | None:
    return values[i] if values else None


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _heights(curves: Curves, drawn: Sequence[float]) -> tuple[float, float]:
    """Ends of the y axis."""
    level = [] if curves.whole is None else [curves.whole[1]]
    low, high = _padded([*drawn, *level])
    # a level at the top needs room for its name above it
    high = max(high, 1.12 * level[0]) if level and level[0] > 0 else high
    return (min(0.0, low) if curves.zero and min(drawn) < 0 else 0.0 if curves.zero else low), high


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
    return low - room, high + room


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _rect(x: float, y: float, width: float, height: float, name: str) -> Markup:
    return tag("rect", x=_n(x), y=_n(y), width=_n(max(width, 1)), height=_n(height), class_=name)


def _n(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def _tick(value: float) -> str:
    return f"{value:.6g}"
