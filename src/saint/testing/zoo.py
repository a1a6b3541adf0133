"""The contracts on every image-text model type of transformers, on small random twins.

    python -m saint.testing.zoo vlm                  # a quarter of an hour; continues where it stopped
    python -m saint.testing.zoo vlm --only qwen3_5   # some
    python -m saint.testing.zoo vlm --names          # seconds: types of this release that the table does not have

Writes one row per type into ``--table``, and what was proved into ``--proved`` (the table that ships with the package).
"""

import argparse
import csv
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..admission import key, prove
from ..errors import UnsupportedModelError
from ..files import write_whole
from ..upstream.versions import installed
from ..vlm.locate import find, refuse_second
from .shrink import shrunken
from .twins import grown

STAGES = ("connector", "language", "vision")
LIMIT = 180  # seconds for one type

# what default configurations leave to checkpoints
SETTINGS: Mapping[str, dict[str, Any]] = {
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}},
    "granite4_vision": {
        "deepstack_layer_map": [[-4, 0], [-1, 2]], "spatial_target_layers": [1, 2], "downsample_rate": "4/8",
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        }
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Outcome of one type.

    Attributes:
        type: of its configuration.
        cls: the class that merges features into text; of types without one the class that generates.
        family: "written" (a spec), "derived" (read off) or "" where it is not understood.
        connector: "holds", or why not: "refused: ..." by a plan, "not tried: ..." where no twin was had.
        language: likewise.
        vision: likewise.
        release: of transformers.
    """

    type: str
    cls: str
    family: str
    connector: str
    language: str
    vision: str
    release: str


def types() -> dict[str, str]:
    """Image-text model types of the installed transformers, and the classes that generate."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return {name: cls if isinstance(cls, str) else cls[0] for name, cls in NAMES.items()}


def build(name: str) -> nn.Module:
    """A small random model of a type: of its default configuration, shrunken."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**SETTINGS.get(name, {}))
    return grown(getattr(transformers, types()[name]), shrunken(config))


def attempt(name: str) -> tuple[Record, dict[str, dict[str, str]]]:
    """Try one type: its row, and what was proved, by the key under which it is remembered."""
    release = str(installed("transformers"))
    try:
        with _limited(LIMIT):
            model = build(name)
    except Exception as error:
        why = f"not tried: no small model of its default configuration ({type(error).__name__}: {_line(error)})"
        return Record(name, types()[name], "", why, why, why, release), {}
    found = find(model)
    if found is None:
        why = "refused: it has no method that says where features go in a prompt"
        return Record(name, types()[name], "", why, why, why, release), {}
    path, vlm, spec = found
    try:
        refuse_second(model, path)
        with _limited(LIMIT):
            verdict = dict(prove(model, spec))
    except (TimeoutError, UnsupportedModelError) as error:
        verdict = dict.fromkeys(STAGES, str(error))
    rows = {stage: _row(verdict.get(stage, "no twin: no picture goes through the tower of one")) for stage in STAGES}
    record = Record(name, type(vlm).__name__, "derived" if spec.derived else "written", **rows, release=release)
    return record, {key(vlm, spec): verdict} if spec.derived else {}


def _row(reason: str | None) -> str:
    if not reason:
        return "holds"
    return f"not tried: {_line(reason)}" if reason.startswith("no twin") else f"refused: {_line(reason)}"


def _line(text: object) -> str:
    """One line of at most 200 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(table: Path) -> dict[str, Record]:
    """The rows of a table by type; none where there is no file."""
    if not table.is_file():
        return {}
    return {row["type"]: Record(**row) for row in csv.DictReader(table.read_text().splitlines())}


def _write(table: Path, records: Mapping[str, Record]) -> None:
    lines = [
        [field.name for field in fields(Record)],
        *(list(asdict(records[name]).values()) for name in sorted(records)),
    ]
    from io import StringIO

    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_whole(table, text.getvalue().encode())


def sweep(table: Path, proved: Path, only: list[str]) -> None:
    """Try every type that the table does not have of this release, and write both files behind each."""
    records = read(table)
    verdicts: dict[str, Any] = json.loads(proved.read_text()) if proved.is_file() else {}
    release = str(installed("transformers"))
    for name in only or types():
        if not only and name in records and records[name].release == release:
            continue
        start = time.perf_counter()
        records[name], new = attempt(name)
        verdicts |= new
        _write(table, records)
        write_whole(proved, (json.dumps(verdicts, indent=1, sort_keys=True) + "\n").encode())
        row = records[name]
        print(
            f"{name}: {time.perf_counter() - start:.0f} s; " + "; ".join(f"{s} {getattr(row, s)}" for s in STAGES),
            flush=True,
        )


def missing(table: Path) -> list[str]:
    """Types of the installed transformers that the table does not have."""
    return sorted(set(types()) - set(read(table)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 where ``--names`` finds types that are missing."""
    parser = argparse.ArgumentParser(prog="python -m saint.testing.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["vlm"])
    parser.add_argument("--table", type=Path, default=Path("docs/vlms.csv"))
    parser.add_argument("--proved", type=Path, default=Path("src/saint/upstream/admitted.json"))
    parser.add_argument("--only", nargs="*", default=[], metavar="TYPE")
    parser.add_argument("--names", action="store_true")
    given = parser.parse_args(arguments)
    if given.names:
        absent = missing(given.table)
        for name in absent:
            print(name)
        return int(bool(absent))
    if unknown := [name for name in given.only if name not in types()]:
        parser.error(f"this transformers has no image-text type {', '.join(unknown)}")
    sweep(given.table, given.proved, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
