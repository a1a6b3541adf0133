"""What every sheet begins and ends with: the conditions, what was left out, whether the machine was busy."""

from collections.abc import Mapping
from typing import Any

from .blocks import Group, Heading, Listing, Text
from .reading import Record
from .words import number

_NAMED = 5  # files that were left out, for each reason


def conditions(record: Record, **more: Any) -> list[tuple[str, Any]]:
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
    return [
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


def skipped(record: Record) -> Group | None:
    """List what could not be read or was left out, with reasons."""
    entries, left = record.data.get("skipped") or [], record.data.get("left_out") or []
    if not entries and not left:
        return None
    items = [f"{name}: {why}" for name, why in entries]
    for entry in left:
        some = ", ".join(map(str, entry["names"][:_NAMED])) + (", ..." if entry["count"] > _NAMED else "")
        items.append(f"{entry['count']} left out ({entry['reason']}): {some}")
    count = len(entries) + sum(int(entry["count"]) for entry in left)
    return Group([Heading(f"Not used: {count}"), Listing(items)], box=True, page_only=True)


def load_note(record: Record, given: Mapping[str, Any]) -> Text | None:
    """Says when the machine was busy before a timing, whose conditions are ``given``."""
    load, cores = given.get("load_average"), (record.data.get("environment") or {}).get("cores")
    if load is None or not cores or load <= 0.5 * cores:
        return None
    said = f"The machine was busy before the timing (load average {number(load, 1)} on {cores} cores)."
    return Text(said, warning=True, page_only=True)
