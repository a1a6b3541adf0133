"""What a sheet is made of: plain data, which ``html``, ``terminal`` and ``markdown`` render.

What is ``page_only`` is not shown on a terminal: it is about pictures, is said there in another way, or would fill it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .words import number

Values = Sequence[float | None]


@dataclass(frozen=True)
class Sheet:
    """A record, ready to be shown.

    Attributes:
        title: of it.
        asked: what the command did, in a sentence.
        verdict: the answer, in a sentence.
        conditions: what the numbers depend on: names and values; a value that is None is left out.
        blocks: tables, charts, pictures; None is nothing.
        highlights: the few numbers that the verdict is about; a page shows them large, a terminal has the verdict.
    """

    title: str
    asked: str
    verdict: str
    conditions: Sequence[tuple[str, Any]]
    blocks: "Sequence[Block | None]"
    highlights: "Sequence[Highlight]" = ()


@dataclass(frozen=True)
class Highlight:
    """A number that is shown large.

    Attributes:
        name: of it, one word.
        value: as people read it, with its unit.
        note: what it is a number of, and what it depends on.
        warning: what may spoil it.
    """

    name: str
    value: str
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell that is sorted by ``key`` and shows ``text``."""

    text: Any
    key: float | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: text, numbers, or a :class:`Cell` per column; the first column heads its row.
        caption: what the table holds.
        sortable: for tables of more than one row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str
    sortable: bool = True


@dataclass(frozen=True)
class Heading:
    """The heading of what follows."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: of it.
        warning: it says what may spoil the numbers.
        lead: what stands out in front of it.
        aside: it may be read over.
        page_only: see above.
    """

    text: str
    warning: bool = False
    lead: str = ""
    aside: bool = False
    page_only: bool = False


@dataclass(frozen=True)
class Listing:
    """Items: texts, or a name and what it is."""

    items: Sequence[str | tuple[str, str]]
    lead: str = ""


@dataclass(frozen=True)
class Quotes:
    """A question and what was answered to it, by name."""

    question: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PlanBox:
    """A plan: in a line, as lines of Python and of a shell that use it, and as the text that ``--plan`` takes.

    Attributes:
        plan: as :meth:`saint.Plan.to_dict` writes it.
        python: what applies it.
        shell: what uses it on the command line.
        name: of the plan, where it has one.
        file: name under which a page hands the plan out as a file; "" where it does not.
    """

    plan: dict[str, Any]
    python: str | None = None
    shell: str | None = None
    name: str = ""
    file: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be read or copied as it is."""

    text: str


@dataclass(frozen=True)
class More:
    """What is shown on demand; left out on a terminal."""

    summary: str
    blocks: "Sequence[Block]"


@dataclass(frozen=True)
class Line:
    """A curve over x = 0, 1, ..., or over ``x``.

    Attributes:
        name: for the legend.
        mean: heights; None is a gap.
        low, high: ends of the interval around each; empty where there is none.
        x: places of the points.
        short: name of a narrow column; "" means ``name``.
        digits: behind the point, in a narrow column.
    """

    name: str
    mean: Values
    low: Values = ()
    high: Values = ()
    x: Sequence[float] = field(default=())
    short: str = ""
    digits: int = 3

    def places(self) -> list[float]:
        """x of each point."""
        return [float(x) for x in self.x] or [float(i) for i in range(len(self.mean))]

    def at(self, place: float) -> "tuple[float | None, float | None, float | None]":
        """Return mean, low and high at a place; None where the curve has none."""
        where = self.places()
        if place not in where:
            return None, None, None
        i = where.index(place)
        return self.mean[i], self.low[i] if self.low else None, self.high[i] if self.high else None


@dataclass(frozen=True)
class Boundary:
    """A vertical line with its interval, in front of layer ``at``."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """Curves with their bands.

    Attributes:
        title: what they show.
        lines: at least one.
        x, y: names of the axes, y with its unit.
        boundaries: vertical lines.
        note: below the title.
        zero: the y axis begins at 0: of counts and shares, whose height is read as a part of the whole.
        whole: y of the unpruned model, with its name, drawn as a level; None where there is none.
    """

    title: str
    lines: Sequence[Line]
    x: str = "layer"
    y: str = ""
    boundaries: Sequence[Boundary] = ()
    note: str = ""
    zero: bool = False
    whole: tuple[str, float] | None = None


@dataclass(frozen=True)
class Matrix:
    """A heat map of rows of equal length; None is missing."""

    title: str
    values: Sequence[Values]
    unit: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot with its intervals."""

    name: str
    group: str  # gives colour and shape
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None


@dataclass(frozen=True)
class Plot:
    """Numbered points with the line of those that none beats.

    Attributes:
        title: what it shows.
        points: of it.
        x: name of the axis; more is better.
        y: whole name of the measure.
        axis: the short one beside the axis.
        note: below the title.
        least: a smaller y is better.
        wide: it is what its sheet is about, and gets the room of two.
    """

    title: str
    points: Sequence[Point]
    x: str
    y: str
    axis: str
    note: str = ""
    least: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room; on a terminal curves over the same layers are columns of one table.

    Attributes:
        charts: of them.
        legend: what the short names of lines mean; with it, lines without one are left to the page.
        page_only: see above.
    """

    charts: Sequence[Curves | Matrix | Plot]
    legend: str = ""
    page_only: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with the patches that were dropped, under a slider over drop points.

    Attributes:
        name: of the picture.
        uri: "data:image/...;base64,..."; None draws on grey.
        grid: rows and columns.
        steps: drop points in order, :class:`saint.lab.report.figure.Step`.
        whole: rows and columns that the picture had before it got smaller; None: it stays as it is.
    """

    name: str
    uri: str | None
    grid: Sequence[int]
    steps: Sequence[Any]
    whole: Sequence[int] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture as it is.

    Attributes:
        alt: what it shows, for those who do not see it.
        caption: below it.
        uri: "data:image/...;base64,..."; "" where there is a file.
        file: contents of one, which is scaled down.
        wide: it needs the room of several.
    """

    alt: str
    caption: str
    uri: str = ""
    file: bytes = b""
    wide: bool = False


@dataclass(frozen=True)
class Gallery:
    """Pictures beside one another, with tables and curves among them; on a terminal these alone are shown.

    ``pair``: two that are compared.
    """

    pictures: "Sequence[Figure | Picture | Group]"
    pair: bool = False


@dataclass(frozen=True)
class Group:
    """Blocks that belong together; ``box``: and stay so on a page; ``page_only``: see above."""

    blocks: "Sequence[Block | None]"
    box: bool = False
    page_only: bool = False


Block = Table | Heading | Text | Listing | Quotes | PlanBox | Code | More | Curves | Charts | Gallery | Group


def text_of(value: Any) -> str:
    """Return what a cell shows: text as it is, a number as people read it."""
    value = value.text if isinstance(value, Cell) else value
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number(value) if plain else str(value)


def front(points: Sequence[Point], *, least: bool = False) -> list[Point]:
    """Those that no other beats in x without losing in y, from left to right; ``least``: a smaller y is better."""
    best: list[Point] = []
    sign = -1 if least else 1
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    return best[::-1]
