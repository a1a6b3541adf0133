"""Records as `saint` commands write them, read from files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import VERSION

KINDS = {  # of record -> the command that writes it
    "analyze": "saint analyze",
    "bench/encoder": "saint bench",
    "bench/generation": "saint bench",
    "compare": "saint compare",
    "demo": "saint demo",
    "eval/images": "saint eval images",
    "eval/vqa": "saint eval vqa",
    "advise": "saint advise",
    "tune": "saint tune",
    "view": "saint view",
}
_ELSEWHERE = ("evidence/", "benchmarks/", "headline", "matching", "again")  # kinds that scripts of the repository write
_LARGEST = 200_000_000  # bytes; the largest records (kept indices of many photographs) are a few MB


@dataclass(frozen=True)
class Record:
    """What a command has written.

    Attributes:
        name: of the file, without its folder.
        folder: where pictures lie that the record names.
        data: its contents.
    """

    name: str
    folder: Path
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return str(self.data["kind"])


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """The records in ``paths``, in this order.

    Raises:
        ValueError: no JSON, no record, a kind that a report does not know, or a later format; the message names the file.
        OSError: it cannot be read.
    """
    return [_read(Path(path)) for path in paths]


def _read(path: Path) -> Record:
    known = f"a record is expected: JSON of {_listed(sorted(set(KINDS.values())))} (--json FILE)"
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; {known}")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} has {size / 1e6:.0f} MB; {known}, of at most {_LARGEST // 1_000_000} MB")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is no JSON ({what}); {known}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; {known}")
    kind = data.get("kind")
    if kind not in KINDS:
        came = f"the kind {kind!r:.60}" if "kind" in data else f"no kind, and the fields {_listed(list(data)[:8])}"
        if "kind" not in data and {"vision", "connector", "language"} & data.keys():
            came = "a plan, which is not a record: saint tune --json FILE and --frontier FILE write what a plan was tuned on"
        elif str(kind).startswith(_ELSEWHERE):
            came += ", what a script of evidence/ or benchmarks/ measured, which docs/ shows as tables"
        raise ValueError(f"{path}: a report takes records of the kinds {_listed(list(KINDS))}; this file has {came}")
    version = data.get("version")
    if version != VERSION:
        raise ValueError(
            f"{path}: a record of format {VERSION} is expected, got {version!r:.20}: write it again, or update saint"
        )
    return Record(path.name, path.parent, data)


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def place(step: Mapping[str, Any]) -> int:
    """Return where a drop point lies on an axis of layers: behind a layer, or in front of the first one (-1)."""
    return int(step["layer"]) - (step.get("placement") == "input")


def point(step: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """Return what tells a drop point from the others: samples and tiles of one forward share it."""
    stage, placement = str(step.get("stage", "vision")), str(step.get("placement"))
    return stage, placement, place(step), int(step.get("group", 0))


def behind(step: Mapping[str, Any]) -> str:
    """A drop point in words."""
    if step.get("placement") == "input" and step["layer"] == 0:
        return "in front of the layers"
    return f"after layer {place(step)}"


def mark_of(step: Mapping[str, Any]) -> str:
    """A drop point as the mark of a tile."""
    return str(place(step)) if place(step) >= 0 else "in"
