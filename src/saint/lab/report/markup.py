"""HTML from plain values: whatever is not markup already is escaped, so no text of a record can become markup."""

import html
from collections.abc import Iterable
from typing import Any

from .blocks import Cell, Table
from .words import number


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


EMPTY = frozenset({"img", "link", "input", "meta", "br", "rect", "line", "path", "use", "circle", "stop"})


def escape(value: Any) -> Markup:
    """``value`` as text of an element or of an attribute."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: Markup as it is, anything else as escaped text; None is nothing.
        attributes: underscores become hyphens, one at the end is dropped (``class_``, ``for_``); True is an attribute without a
            value, False and None leave it out.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        spelled = key.removesuffix("_").replace("_", "-")
        given.append(f" {spelled}" if value is True else f' {spelled}="{html.escape(str(value))}"')
    opened = f"<{name}{''.join(given)}"
    if name in EMPTY and not children:
        return Markup(f"{opened}/>")
    return Markup(f"{opened}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def table(made: Table) -> Markup:
    """A table; ``page.js`` makes the heads of a sortable one buttons."""
    body = []
    for row in made.rows:
        cells = []
        for i, value in enumerate(row):
            cell = value if isinstance(value, Cell) else Cell(value)
            key, text = cell.key, cell.text
            if isinstance(text, (int, float)) and not isinstance(text, bool):
                key, text = float(text), number(text)
            numeric = "n" if key is not None else None
            more = {"scope": "row"} if i == 0 else {}
            cells.append(tag("th" if i == 0 else "td", text, class_=numeric, data_key=key, **more))
        body.append(tag("tr", *cells))
    heads = [tag("th", name, scope="col") for name in made.head]
    drawn = tag(
        "table",
        tag("caption", made.caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_="sortable" if made.sortable and len(body) > 1 else None,
    )
    return tag("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=made.caption)


def details(summary: str, *children: Any) -> Markup:
    """Return what is shown on demand."""
    return tag("details", tag("summary", summary), *children)


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and values; a value that is None is left out."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *items, class_="facts")
