"""Sheets on a terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from .blocks import (
    Block,
    Charts,
    Code,
    Curves,
    Gallery,
    Group,
    Heading,
    Line,
    Listing,
    More,
    PlanBox,
    Quotes,
    Sheet,
    Table,
    Text,
    text_of,
)
from .charts import mark
from .words import interval, number, plan_line

_ELSEWHERE = {"model", "record", "versions", "date"}  # conditions that the command's own line, or its record, says
_UNBROKEN = 24  # letters of a cell up to which it stays in one line
_MANY = 10  # columns from which there is less room between them
_FEW = 3  # lines up to which intervals are shown beside their means


def show(console: Console, sheet: Sheet) -> None:
    """Print a sheet: its verdict and conditions, then its tables and curves as tables.

    Args:
        console: to print on.
        sheet: what to print.
    """
    console.print(f"[bold]{escape(sheet.title)}[/]", highlight=False)
    console.print(escape(sheet.verdict), highlight=False)
    facts = [f"{name} {value}" for name, value in sheet.conditions if value is not None and name not in _ELSEWHERE]
    console.print(f"[dim]{escape('; '.join(facts))}[/]\n", highlight=False)
    _all(console, sheet.blocks)


def _all(console: Console, blocks: Iterable[Block | None]) -> None:
    for block in blocks:
        if block is not None and not getattr(block, "page_only", False):
            _block(console, block)


def _block(console: Console, block: Block) -> None:
    match block:
        case Table():
            print_table(console, block.caption, block.head, [[text_of(value) for value in row] for row in block.rows])
        case Heading():
            console.print(f"[bold]{escape(block.text)}[/]", highlight=False)
        case Text():
            lead = f"[bold]{escape(block.lead)}[/]" if block.lead else ""
            style = "yellow" if block.warning else "dim" if block.aside else ""
            console.print(f"{lead}{escape(block.text)}", highlight=False, style=style)
        case Listing():
            for item in block.items:
                text = escape(item) if isinstance(item, str) else f"[bold]{escape(item[0])}[/]: {escape(item[1])}"
                console.print(f"  {text}", highlight=False)
        case Quotes():
            for name, text in block.answers:
                console.print(f"[bold]{escape(name)}[/]\n{escape(text)}\n", highlight=False)
        case PlanBox():
            lead = f"[bold]{escape(block.name)}[/]: " if block.name else ""
            console.print(f"{lead}{escape(plan_line(block.plan))}", highlight=False)
            if block.python is not None:
                console.print(escape(block.python), highlight=False, soft_wrap=True)
        case Code():
            console.print(escape(block.text), highlight=False, soft_wrap=True)
        case Curves():
            _curves(console, [block], "")
        case Charts():
            _curves(console, [chart for chart in block.charts if isinstance(chart, Curves)], block.legend)
        case Gallery():
            _all(console, [picture for picture in block.pictures if isinstance(picture, Group)])
        case Group():
            _all(console, block.blocks)
        case More():
            pass


def _curves(console: Console, curves: Sequence[Curves], legend: str) -> None:
    """A table per axis: curves over the same places are its columns."""
    for x in dict.fromkeys(curve.x for curve in curves):
        own = [curve for curve in curves if curve.x == x]
        lines = [line for curve in own for line in curve.lines if line.short or not legend]
        places = sorted({place for line in lines for place in line.places()})
        starts = {edge.at for curve in own for edge in curve.boundaries}
        few = len(lines) <= _FEW
        rows = [[mark(x, place, number(place)), *(_value(line, place, few) for line in lines)] for place in places]
        title = "" if legend else "; ".join(curve.title for curve in own)
        breaks = {i for i, place in enumerate(places) if place in starts}
        print_table(console, title, [x, *(line.short or line.name for line in lines)], rows, breaks)
    if legend:
        console.print(escape(legend), highlight=False, style="dim")


def _value(line: Line, place: float, few: bool) -> str:
    value, low, high = line.at(place)
    if value is None:
        return "-"
    if few and low is not None and high is not None:
        return interval(value, low, high)
    return f"{value:.{line.digits}f}" if line.short else number(value)


def print_table(
    console: Console,
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    breaks: Iterable[int] = (),
    *,
    numbers: bool = True,
) -> None:
    """Print a table whole: where it is wider than the console, long texts are broken, then columns follow in tables of their own.

    Args:
        console: to print on.
        caption: what the table holds; "" for nothing.
        head: names of the columns.
        rows: a text per column.
        breaks: rows in front of which a line is drawn.
        numbers: columns behind the first are numbers, and stand at the right.
    """
    pad = int(len(head) <= _MANY)
    for place, part in enumerate(_parts(head, rows, console.width, pad, numbers)):
        title = f"{caption}, continued" if caption and place else caption
        made = Printed(
            box=SIMPLE_HEAD, padding=(0, pad, 0, 0), pad_edge=False, title=escape(title) or None, title_justify="left",
        )  # fmt: skip
        for column, width in part:
            right = numbers and column > 0
            made.add_column(escape(head[column]), justify="right" if right else "left", width=width, overflow="fold")
        for i, row in enumerate(rows):
            if i in breaks:
                made.add_section()
            made.add_row(*(escape(row[column]) for column, _ in part))
        console.print(made)


def _parts(
    head: Sequence[str], rows: Sequence[Sequence[str]], room: int, pad: int, numbers: bool
) -> Iterable[Sequence[tuple[int, int]]]:
    """Columns and their widths of each table that is printed: all in one where there is room, else with the first repeated."""
    columns = [[row[i] for row in rows] for i in range(len(head))]
    whole = [max(map(cell_len, cells), default=0) for cells in columns]
    most = _UNBROKEN if numbers else 0
    least = [
        max(
            _word(name),
            *(cell_len(text) if cell_len(text) <= most else min(_word(text), room // 2) for text in cells),
            1,
        )
        for name, cells in zip(head, columns, strict=True)
    ]
    between = pad + 1
    groups: list[list[int]] = [[]]
    for column in range(len(head)):
        if groups[-1] and sum(least[i] + between for i in [*groups[-1], column]) > room:
            groups.append([0])
        groups[-1].append(column)
    for group in groups:
        free = room - sum(least[i] + between for i in group)
        widths = []
        for i in sorted(group, key=lambda i: max(whole[i], cell_len(head[i])) - least[i]):  # short wishes first
            more = min(max(whole[i], cell_len(head[i]) if free > room // 4 else 0) - least[i], max(0, free))
            free -= max(0, more)
            widths.append((i, least[i] + max(0, more)))
        yield sorted(widths, key=lambda entry: group.index(entry[0]))


def _word(text: str) -> int:
    """Cells that the longest word of a text takes."""
    return max(map(cell_len, text.split()), default=0)
