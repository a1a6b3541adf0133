"""The page: one file, nothing fetched, readable without JavaScript."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from . import markdown
from .blocks import Sheet
from .html import Renderer
from .markup import Markup, tag
from .reading import Record
from .sheets import named, sheet_of
from .trade import trade_blocks

LIMIT = 5_000_000  # bytes of a report
_SIDES = (320, 240, 160, 96)  # pixels of a picture, tried in this order until the page is small enough


def make_report(records: Sequence[Record], limit: int = LIMIT) -> str:
    """One HTML page about all records.

    Args:
        records: at least one.
        limit: bytes of the page; pictures are scaled down as far as that needs.

    Raises:
        ValueError: a record does not have the fields of its kind, or the page would be larger than ``limit`` with the smallest
            pictures.
    """
    if not records:
        raise ValueError("a report needs at least one record")
    page, size = "", 0
    for side in _SIDES:
        page = _page(records, side)
        size = len(page.encode())
        if size <= limit:
            return page
    raise ValueError(
        f"the report would have {size / 1e6:.1f} MB with the smallest pictures, and at most {limit / 1e6:.1f} MB are written: "
        f"give fewer records than these {len(records)}, or make them with --limit"
    )


def make_markdown(records: Sequence[Record]) -> str:
    """The same as Markdown, without pictures.

    Raises:
        ValueError: a record does not have the fields of its kind.
    """
    if not records:
        raise ValueError("a report needs at least one record")
    records = _distinct(records)
    with named(*records):
        trade = trade_blocks(records)
    parts = [markdown.sheet(sheet_of(record)) for record in records]
    if trade is not None:
        said, blocks = trade
        parts.insert(0, markdown.sheet(Sheet("Accuracy against speed", "", said, [], blocks)))
    return "\n".join(parts)


def _distinct(records: Sequence[Record]) -> list[Record]:
    """Records without those that another one holds in full: `saint tune` writes one with --json and again with --frontier."""

    def without(record: Record) -> dict[str, Any]:
        return {name: value for name, value in record.data.items() if name not in ("frontier", "date")}

    made: list[Record] = []
    for record in records:
        twin = next(
            (i for i, other in enumerate(made) if record.kind == "tune" and without(other) == without(record)), None
        )
        if twin is None:
            made.append(record)
        elif record.data.get("frontier") and not made[twin].data.get("frontier"):
            made[twin] = record
    return made


def _page(records: Sequence[Record], side: int) -> str:
    records = _distinct(records)
    sheets = [sheet_of(record) for record in records]
    with named(*records):
        trade = trade_blocks(records)
    style, script = _file("page.css"), _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    titles = [sheet.title for sheet in sheets]
    sheets = [
        replace(sheet, title=f"{sheet.title} ({record.name})") if titles.count(sheet.title) > 1 else sheet
        for sheet, record in zip(sheets, records, strict=True)
    ]
    title = sheets[0].title if len(sheets) == 1 else f"{len(sheets)} records"
    verdicts = [tag("li", tag("a", sheet.title, href=f"#r{i}"), ": ", sheet.verdict) for i, sheet in enumerate(sheets)]
    if trade is not None:
        verdicts.append(tag("li", tag("a", "Accuracy against speed", href="#trade"), ": ", trade[0]))
    lead = (
        tag("p", sheets[0].verdict, class_="verdict") if len(verdicts) == 1 else tag("ul", *verdicts, class_="verdicts")
    )
    parts = [tag("h1", f"saint report: {title}"), lead]
    if trade is not None:
        heading = tag("h2", "Accuracy against speed", id="trade-title")
        said, blocks = trade
        body = Renderer("trade", side).all(blocks)
        verdict = tag("p", said, class_="verdict")
        parts.append(tag("section", heading, verdict, body, id="trade", aria_labelledby="trade-title"))
    for i, (sheet, record) in enumerate(zip(sheets, records, strict=True)):
        with named(record):
            parts.append(Renderer(f"r{i}", side).sheet(sheet, verdict=len(verdicts) > 1))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"saint report: {title}"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body", tag("main", *parts), tag("div", id="tip", role="status", hidden=True), tag("script", Markup(script))
    )
    return f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n'


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
