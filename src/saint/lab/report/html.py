"""Sheets as HTML."""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence

from ..images import data_uri, read_untrusted
from .blocks import (
    Block,
    Charts,
    Code,
    Curves,
    Figure,
    Gallery,
    Group,
    Heading,
    Highlight,
    Listing,
    Matrix,
    More,
    Picture,
    PlanBox,
    Plot,
    Quotes,
    Sheet,
    Table,
    Text,
)
from .charts import heat_map, line_chart, scatter
from .figure import figure
from .markup import Markup, details, facts, join, table, tag
from .words import plan_line, plan_text

_SIDE, _SHEET = 320, 900  # pixels of a picture, and of a sheet that another command drew beside it


class Renderer:
    """Makes markup of blocks.

    Args:
        prefix: makes ids of the page unique.
        side: pixels of a picture at most.
    """

    def __init__(self, prefix: str, side: int) -> None:
        self.prefix, self.side = prefix, side
        self._figures = self._numbers()

    def _numbers(self) -> Iterator[str]:
        number = 0
        while True:
            yield f"{self.prefix}-{number}"
            number += 1

    def sheet(self, sheet: Sheet, *, verdict: bool) -> Markup:
        """One part of a page; ``verdict``: with it, which a page of one part has at its head."""
        return tag(
            "section",
            tag("h2", sheet.title, id=f"{self.prefix}-title"),
            tag("p", sheet.asked, class_="asked"),
            tag("p", sheet.verdict, class_="verdict") if verdict else None,
            highlights(sheet.highlights),
            facts(sheet.conditions),
            self.all(sheet.blocks),
            id=self.prefix,
            aria_labelledby=f"{self.prefix}-title",
        )

    def alone(self, sheet: Sheet) -> Markup:
        """The same where a page shows it alone: verdict, highlights and blocks."""
        verdict = tag("p", sheet.verdict, class_="verdict")
        return tag("div", tag("h2", sheet.title), verdict, highlights(sheet.highlights), self.all(sheet.blocks))

    def all(self, blocks: Iterable[Block | None]) -> Markup:
        """Blocks one below the other."""
        return join(self.block(block) for block in blocks if block is not None)

    def block(self, block: Block) -> Markup:
        """One of them."""
        match block:
            case Table():
                return table(block)
            case Heading():
                return tag("h3", block.text)
            case Text():
                lead = tag("b", block.lead) if block.lead else None
                return tag("p", lead, block.text, class_="warn" if block.warning else "asked" if block.aside else None)
            case Listing():
                items = [
                    tag("li", item) if isinstance(item, str) else tag("li", tag("b", item[0]), ": ", item[1])
                    for item in block.items
                ]
                return tag("ul", *items)
            case Quotes():
                quotes = [tag("div", tag("h3", name), tag("blockquote", text)) for name, text in block.answers]
                return join([tag("p", f"“{block.question}”", class_="asked"), tag("div", *quotes, class_="pair")])
            case PlanBox():
                return _plan(block)
            case Code():
                return tag("pre", block.text, tabindex="0")
            case More():
                return details(block.summary, self.all(block.blocks))
            case Curves():
                return line_chart(block)
            case Charts():
                return tag("div", *map(_chart, block.charts), class_="charts")
            case Gallery():
                return tag("div", *map(self._picture, block.pictures), class_="pair" if block.pair else "gallery")
            case Group():
                return tag("div", self.all(block.blocks)) if block.box else self.all(block.blocks)

    def _picture(self, picture: Figure | Picture | Group) -> Markup:
        if isinstance(picture, Group):
            return self.block(picture)
        if isinstance(picture, Figure):
            return figure(picture, next(self._figures), self.side)
        uri = picture.uri
        if picture.file:
            uri = data_uri(read_untrusted(picture.file), _SHEET * self.side // _SIDE, 150_000)
        about = tag("figcaption", picture.caption)
        return tag("figure", tag("img", src=uri, alt=picture.alt), about, class_="sheet" if picture.wide else None)


def _chart(chart: Curves | Matrix | Plot) -> Markup:
    match chart:
        case Curves():
            return line_chart(chart)
        case Matrix():
            return heat_map(chart)
        case Plot():
            return scatter(chart)


def highlights(found: Sequence[Highlight]) -> Markup | None:
    """Numbers that are shown large, side by side; None where there are none."""
    if not found:
        return None
    boxes = []
    for one in found:
        warned = tag("span", one.warning, class_="warn") if one.warning else None
        note = tag("span", one.note, class_="note") if one.note else None
        boxes.append(
            tag("li", tag("span", one.name, class_="note"), tag("strong", one.value, class_="large"), note, warned)
        )
    return tag("ul", *boxes, class_="highlights")


def _plan(box: PlanBox) -> Markup:
    short, full = plan_line(box.plan), plan_text(box.plan)
    text = json.dumps(box.plan, separators=(",", ":"))
    lines = (("Python", box.python), ("command line", box.shell))
    shown = [
        join([tag("p", name, class_="asked"), tag("pre", line, tabindex="0", class_="line")])
        for name, line in lines
        if line
    ]
    file = None
    if box.file:
        uri = f"data:application/json;base64,{base64.b64encode(json.dumps(box.plan, indent=2).encode()).decode()}"
        file = tag("p", tag("a", f"Download {box.file}", href=uri, download=box.file, class_="file"))
    whole = [tag("p", full)] if full != short else []
    return tag(
        "div",
        tag("p", tag("b", f"{box.name}: ") if box.name else None, short),
        *shown,
        file,
        details("the plan in full, to paste behind --plan", *whole, tag("pre", text, tabindex="0")),
        class_="plan",
    )
