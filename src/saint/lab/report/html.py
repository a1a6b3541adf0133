"""Sheets as HTML."""

import json
from collections.abc import Iterable, Iterator

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
from .words import plan_text

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
            facts(sheet.conditions),
            self.all(sheet.blocks),
            id=self.prefix,
            aria_labelledby=f"{self.prefix}-title",
        )

    def alone(self, sheet: Sheet) -> Markup:
        """The same where a page shows it alone: verdict and blocks."""
        verdict = tag("p", sheet.verdict, class_="verdict")
        return tag("div", tag("h2", sheet.title), verdict, self.all(sheet.blocks))

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


def _plan(box: PlanBox) -> Markup:
    said = tag("p", f"{box.name}: {plan_text(box.plan)}" if box.name else plan_text(box.plan))
    if box.shell is not None:
        return join([said, tag("pre", box.shell, tabindex="0", class_="line")])
    text = json.dumps(box.plan, separators=(",", ":"))
    pasted = [details("the plan, to paste behind --plan", tag("pre", text, tabindex="0"))]
    if box.python is not None:
        pasted.append(details("the plan in Python", tag("pre", box.python, tabindex="0")))
    return tag("div", said, *pasted)
