"""What every part of a report begins with: what was asked, the verdict, the conditions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .markup import Markup, details, facts, join, number, tag
from .reading import Record

_METHOD, _SHOWN = "method", ("layers", "placement", "output")
_NAMED = 5  # files that were left out, for each reason
_PLAIN = {"output": "survivors"}  # values that say nothing new


@dataclass(frozen=True)
class Section:
    """One record, ready for the page.

    Attributes:
        title: of the part.
        asked: what the command did, in a sentence.
        verdict: the answer, in a sentence.
        conditions: what the numbers depend on.
        body: charts, tables, pictures.
    """

    title: str
    asked: str
    verdict: str
    conditions: Markup
    body: Markup


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan's dict in a line, e.g. "vision: saint (threshold 0.75, neighbors 5), first-half layers"."""
    slots = []
    for slot in ("vision", "connector", "language"):
        for stage in _stages(plan, slot):
            method = dict(stage["method"])
            name = method.pop(_METHOD)
            settings = ", ".join(
                f"{key} {value:g}" if _is_number(value) else f"{key} {value}" for key, value in method.items()
            )
            more = [f"{key} {stage[key]}" for key in _SHOWN if stage.get(key) not in (None, _PLAIN.get(key))]
            slots.append(f"{slot}: {name} ({settings})" + "".join(f", {text}" for text in more))
    return "; ".join(slots) or "nothing is dropped"


def _stages(plan: Mapping[str, Any], slot: str) -> list[Any]:
    """The stages of a slot, which may be written as one or as a list."""
    entry = plan.get(slot, [])
    return entry if isinstance(entry, list) else [entry]


def plan_method(plan: Mapping[str, Any]) -> str:
    """Names of the methods of a plan, e.g. "saint + fastv"."""
    names = []
    for slot in ("vision", "connector", "language"):
        names += [str(stage["method"][_METHOD]) for stage in _stages(plan, slot)]
    return " + ".join(dict.fromkeys(names)) or "none"


def plan_box(plan: Mapping[str, Any], line: str | None = None) -> Markup:
    """A plan in words, as the text that ``--plan`` takes, and as the line of Python that makes it, if a record has one."""
    text = json.dumps(plan, separators=(",", ":"))
    pasted = [details("the plan, to paste behind --plan", tag("pre", text, tabindex="0"))]
    if line is not None:
        pasted.append(details("the plan in Python", tag("pre", line, tabindex="0")))
    return tag("div", tag("p", plan_text(plan)), *pasted)


def conditions(record: Record, **more: Any) -> Markup:
    """Model, pictures, device, versions, date and seed, as far as the record has them.

    Args:
        record: any.
        more: further names and values; underscores become spaces.
    """
    data = record.data
    env = data.get("environment") or {}
    given = data.get("conditions") or {}
    settings = data.get("settings") or {}
    seed = next((place["seed"] for place in (data, settings, given) if place.get("seed") is not None), None)
    versions = ", ".join(
        f"{name} {env[name]}"
        for name in ("torch", "timm", "transformers", "open_clip", "numpy", "pillow", "python")
        if env.get(name)
    )
    threads = given.get("threads", env.get("threads"))
    device = env.get("device_name") or env.get("device")
    pretrained = data.get("pretrained", given.get("pretrained"))
    return facts(
        [
            ("model", data.get("model", given.get("model"))),
            (
                "weights",
                "random (--no-pretrained): numbers about accuracy mean nothing" if pretrained is False else None,
            ),
            *((name.replace("_", " "), value) for name, value in more.items()),
            ("device", f"{device}{f', {threads} thread(s)' if threads is not None else ''}" if device else None),
            ("data type", given.get("dtype")),
            ("seed", seed),
            ("date", data.get("date")),
            ("versions", f"saint {data.get('saint')}{f', {versions}' if versions else ''}"),
            ("record", record.name),
        ]
    )


def skipped(record: Record) -> Markup | None:
    """Return what could not be read or was left out, with reasons."""
    entries, left = record.data.get("skipped") or [], record.data.get("left_out") or []
    if not entries and not left:
        return None
    items = [tag("li", f"{name}: {why}") for name, why in entries]
    for entry in left:
        some = ", ".join(map(str, entry["names"][:_NAMED])) + (", ..." if entry["count"] > _NAMED else "")
        items.append(tag("li", f"{entry['count']} left out ({entry['reason']}): {some}"))
    count = len(entries) + sum(int(entry["count"]) for entry in left)
    return tag("div", tag("h3", f"Not used: {count}"), tag("ul", *items))


def names(values: list[str], most: int = 6) -> str:
    """A few of them, and how many there are."""
    different = list(dict.fromkeys(map(str, values)))
    shown = ", ".join(different[:most]) + (", ..." if len(different) > most else "")
    return f"{len(values)} ({shown})" if values else "0"


def load_note(record: Record, given: Mapping[str, Any]) -> Markup | None:
    """Says when the machine was busy before a timing, whose conditions are ``given``."""
    load, cores = given.get("load_average"), (record.data.get("environment") or {}).get("cores")
    if load is None or not cores or load <= 0.5 * cores:
        return None
    return tag(
        "p", f"The machine was busy before the timing (load average {number(load, 1)} on {cores} cores).", class_="warn"
    )


def charts(*figures: Markup | None) -> Markup:
    """Figures side by side where there is room."""
    return tag("div", join(figures), class_="charts")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
