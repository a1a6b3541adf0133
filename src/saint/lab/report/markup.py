"""HTML from plain values: whatever is not markup already is escaped, so no text of a record can become markup."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


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


def number(value: float | None, digits: int = 3) -> str:
    """For people: at most ``digits`` digits behind the point for small numbers, none for large ones; "-" for None."""
    if value is None:
        return "-"
    value = float(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits if abs(value) < 10 else max(1, digits - 1)}f}"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """ "0.42 [0.40, 0.45]"."""
    if low is None or high is None:
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


class Cell:
    """A cell that is sorted by ``key`` and shows ``text``."""

    def __init__(self, text: Any, key: float | None = None) -> None:
        self.text, self.key = text, key


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, *, sortable: bool = True) -> Markup:
    """A table; ``page.js`` makes the heads of a sortable one buttons.

    Args:
        head: names of the columns.
        rows: text, numbers, or a :class:`Cell` per column; the first column heads its row.
        caption: what the table holds.
        sortable: for tables of more than one row.
    """
    body = []
    for row in rows:
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
    heads = [tag("th", name, scope="col") for name in head]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_="sortable" if sortable and len(body) > 1 else None,
    )
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Any) -> Markup:
    """Return what is shown on demand."""
    return tag("details", tag("summary", summary), *children)


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and values; a value that is None is left out."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *items, class_="facts")
