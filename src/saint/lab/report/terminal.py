"""Sheets on a terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
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
_SHORT = 9  # letters of a heading, whose column is not broken
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
            _print(console, block.caption, block.head, [[text_of(value) for value in row] for row in block.rows])
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
            console.print(escape(plan_line(block.plan)), highlight=False)
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
        _print(console, title, [x, *(line.short or line.name for line in lines)], rows, breaks)
    if legend:
        console.print(escape(legend), highlight=False, style="dim")


def _value(line: Line, place: float, few: bool) -> str:
    value, low, high = line.at(place)
    if value is None:
        return "-"
    if few and low is not None and high is not None:
        return interval(value, low, high)
    return f"{value:.{line.digits}f}" if line.short else number(value)


def _print(
    console: Console, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], breaks: Iterable[int] = ()
) -> None:
    made = Printed(
        box=SIMPLE_HEAD,
        padding=(0, int(len(head) <= _MANY), 0, 0),
        pad_edge=False,
        title=escape(caption) or None,
        title_justify="left",
    )
    for i, name in enumerate(head):
        made.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=len(name) <= _SHORT)
    for i, row in enumerate(rows):
        if i in breaks:
            made.add_section()
        made.add_row(*map(escape, row))
    console.print(made)
