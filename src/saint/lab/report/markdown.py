"""Sheets as Markdown, for pages of documentation and for issues."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .blocks import (
    Block,
    Charts,
    Code,
    Curves,
    Group,
    Heading,
    Listing,
    More,
    PlanBox,
    Quotes,
    Sheet,
    Table,
    Text,
    text_of,
)
from .words import interval, number, plan_line

_NUMBER = re.compile(r"[x+-]?\d|-?$")  # what a cell of a column of numbers begins with; or it is empty, or a dash


def sheet(made: Sheet) -> str:
    """Title, verdict, conditions and all that is no picture; ends with a line break."""
    facts = [f"- {name}: {value}" for name, value in made.conditions if value is not None]
    parts = [f"## {made.title}", made.verdict, "\n".join(facts), *_all(made.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of text, numbers or cells; columns of numbers are aligned to the right."""
    texts = [[text_of(value) for value in row] for row in rows]
    numeric = [all(_NUMBER.match(text) for text in column) for column in zip(*texts, strict=True)] or [False] * len(
        head
    )
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(map(_row, [head, rule, *texts]))


def _all(blocks: Iterable[Block | None]) -> Iterator[str]:
    for block in blocks:
        if block is not None:
            yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Table():
            yield f"{block.caption}:"
            yield table(block.head, block.rows)
        case Heading():
            yield f"### {block.text}"
        case Text():
            if not block.page_only:
                yield f"**{block.lead}**{block.text}" if block.lead else block.text
        case Listing():
            yield "\n".join(
                f"- {item}" if isinstance(item, str) else f"- **{item[0]}**: {item[1]}" for item in block.items
            )
        case Quotes():
            yield from (f"{name}:\n\n> {text}" for name, text in block.answers)
        case PlanBox():
            yield f"**{block.name}**: {plan_line(block.plan)}" if block.name else plan_line(block.plan)
        case Code():
            yield f"```\n{block.text}\n```"
        case Curves():
            yield from _curves(block)
        case Charts():
            for chart in block.charts:
                if isinstance(chart, Curves):
                    yield from _curves(chart)
        case Group() | More():
            yield from _all(block.blocks)
        case _:
            return  # pictures


def _curves(curves: Curves) -> Iterator[str]:
    places = sorted({place for line in curves.lines for place in line.places()})
    rows = [[number(place), *(interval(*line.at(place)) for line in curves.lines)] for place in places]
    yield f"{curves.title}:"
    yield table([curves.x, *(line.name for line in curves.lines)], rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
