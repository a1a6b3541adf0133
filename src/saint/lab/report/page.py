"""The page: one file, nothing fetched, readable without JavaScript."""

import base64
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources

from .kept import demo_section, view_section
from .layers import analyze_section
from .markup import Markup, tag
from .measured import encoder_section, eval_section, generation_section
from .reading import Record
from .section import Section
from .trade import trade_section
from .tuned import tune_section

LIMIT = 5_000_000  # bytes of a report
_SIDES = (320, 240, 160, 96)  # pixels of a picture, tried in this order until the page is small enough
_STRUCTURE = (
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    ValueError,
    ArithmeticError,
)  # what a field of another shape raises


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


def _page(records: Sequence[Record], side: int) -> str:
    sections = [_section(record, f"r{i}", side) for i, record in enumerate(records)]
    with _named(*records):
        trade = trade_section(records)
    style, script = _file("page.css"), _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    titles = [section.title for section in sections]
    sections = [
        dataclasses.replace(section, title=f"{section.title} ({record.name})")
        if titles.count(section.title) > 1
        else section
        for section, record in zip(sections, records, strict=True)
    ]
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} records"
    verdicts = [
        tag("li", tag("a", section.title, href=f"#r{i}"), ": ", section.verdict) for i, section in enumerate(sections)
    ]
    if trade is not None:
        verdicts.append(tag("li", tag("a", "Accuracy against speed", href="#trade"), ": ", trade[0]))
    lead = (
        tag("p", sections[0].verdict, class_="verdict")
        if len(verdicts) == 1
        else tag("ul", *verdicts, class_="verdicts")
    )
    parts = [tag("h1", f"saint report: {title}"), lead]
    if trade is not None:
        heading = tag("h2", "Accuracy against speed", id="trade-title")
        parts.append(
            tag(
                "section",
                heading,
                tag("p", trade[0], class_="verdict"),
                trade[1],
                id="trade",
                aria_labelledby="trade-title",
            )
        )
    parts += [_shown(section, f"r{i}", repeat=len(verdicts) > 1) for i, section in enumerate(sections)]
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


def _section(record: Record, prefix: str, side: int) -> Section:
    with _named(record):
        match record.kind:
            case "analyze":
                return analyze_section(record, prefix, side)
            case "view":
                return view_section(record, prefix, side)
            case "tune":
                return tune_section(record)
            case "demo":
                return demo_section(record, prefix, side)
            case "bench/encoder":
                return encoder_section(record)
            case "bench/generation":
                return generation_section(record)
            case _:
                return eval_section(record)


@contextlib.contextmanager
def _named(*records: Record) -> Iterator[None]:
    """Says of an error about fields in which records it was found."""
    try:
        yield
    except _STRUCTURE as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        files = ", ".join(record.name for record in records)
        kinds = ", ".join(dict.fromkeys(record.kind for record in records))
        raise ValueError(
            f"{files}: not what a record of the kind {kinds} holds ({what}): write it again with this version of saint"
        ) from error


def _shown(section: Section, name: str, *, repeat: bool) -> Markup:
    return tag(
        "section",
        tag("h2", section.title, id=f"{name}-title"),
        tag("p", section.asked, class_="asked"),
        tag("p", section.verdict, class_="verdict") if repeat else None,
        section.conditions,
        section.body,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
