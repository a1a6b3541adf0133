"""Rewrite the generated parts of README.md and docs/: what is supported, from the specs; what was measured, from its records.

Only what this package brings is in them; `saint list` also shows plug-ins.
"""

import csv
import dataclasses
import importlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import answers
import compared
import costs
import ready
import shapes

from saint import methods
from saint.flops import left_out
from saint.lab.report.markdown import table
from saint.testing.zoo import Record, read
from saint.upstream.decoders import TEXT
from saint.upstream.names import VIDEOS
from saint.upstream.registry import ENCODERS, FAMILIES
from saint.upstream.specs import FamilySpec

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "docs" / "zoo.csv"
RECORD = ROOT / "benchmarks" / "results" / "encoders-cpu.json"
KEEP = ROOT / "benchmarks" / "results" / "keep-*.json"
SLOTS = ("vision", "connector", "language")
SELECTION = ROOT / "benchmarks" / "results" / "selection-cpu.json"
SERVING = [ROOT / "benchmarks" / "results" / f"serving-cpu{size}.json" for size in ("", "-200m")]


def zoo_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(ZOO.read_text().splitlines()))


def type_records() -> dict[str, Record]:
    """The record of the sweep over image-text types (`python -m saint.testing.zoo vlm`)."""
    return read(ROOT / "docs" / "vlms.csv")


def builtin_methods() -> list[type[methods.Method]]:
    """The methods that this package brings, the paper's own first."""
    found = [methods.get(name) for name in methods.names()]
    ours = [method for method in found if method.__module__.startswith("saint.")]
    return sorted(ours, key=lambda method: (not method.__name__.startswith("Saint"), method.__name__))


def counts() -> str:
    """Three lines of the README: how much of what works."""
    libraries: dict[str, int] = {}
    for library, _ in {(spec.library, spec.title) for spec in ENCODERS}:
        libraries[library] = libraries.get(library, 0) + 1
    rows = zoo_rows()
    held = sum(row["outcome"] == "holds" for row in rows)
    encoders = ", ".join(
        f"{libraries[name]} of {name}" for name in sorted(libraries, key=lambda name: -libraries[name])
    )
    return "\n".join(
        [
            f"- **{sum(libraries.values())} kinds of encoders** ({encoders}); by name {held} of {len(rows)} models hold every "
            "contract, and the others are refused with the reason.",
            f"- **Vision-language models**, with `generate` as ever: {held_types()}; what is not understood is refused with the "
            f"reason, and a model of a class that is not listed is proved on a small twin when a plan is applied. "
            f"{len(TEXT)} language models without images.",
            f"- **{len(builtin_methods())} methods**, the paper's two among them, in any combination of three places: encoder, "
            "connector, language model.",
        ]
    )


def methods_table() -> str:
    """Every method of the package: where it works, what it does, its paper."""
    rows = []
    for method in builtin_methods():
        where = ", ".join(slot for slot in SLOTS if slot in method.stages)
        about = " ".join((method.__doc__ or "").split("\n\n")[0].split())
        about = about.replace(":class:", "").replace("``", "`").rstrip(".")
        full = (
            f"saint.{method.__name__}"
            if method.name in ("saint", "saint_full_graph")
            else f"saint.methods.{method.__name__}"
        )
        paper = f"[{method.paper.rpartition('/')[2]}]({method.paper})"
        rows.append([f"[`{full}`](reference.md#{full})", where, about, paper])
    return table(["method", "where", "what it does", "paper"], rows)


TITLES = {"clip-b16": "CLIP ViT-B/16", "dinov2-s": "DINOv2 ViT-S/14, dense", "small-llava": "small LLaVA"}
HEADLINE = (("clip-b16", 0.7), ("clip-b16", 0.5), ("dinov2-s", 0.5), ("small-llava", 0.5))


def keep_records() -> list[dict[str, Any]]:
    """What benchmarks/keep.py wrote, a record per model."""
    return [json.loads(file.read_text()) for file in sorted(KEEP.parent.glob(KEEP.name))]


def headline_table() -> str:
    """Four rows for the first pages: what a share of the work gains, and what it costs."""
    return keep_table(HEADLINE)


def keep_table(among: Collection[tuple[str, float]] | None = None) -> str:
    """Speed and agreement by model and share, with the conditions below.

    Args:
        among: models and shares; None: all that were measured.
    """
    records = keep_records()
    rows = [
        row for record in records for row in record["rows"] if among is None or (row["model"], row["keep"]) in among
    ]
    if not rows:
        return "Not measured yet: `python benchmarks/keep.py MODEL` writes a record, `make tables` this table."
    head = [
        "model",
        "`keep`",
        "batch 1: speed-up (bound)",
        "batch 8: speed-up (bound)",
        "answers, against the unpruned model",
    ]
    lines = [
        [TITLES[row["model"]], f"{row['keep']:g}", _faster(row["speed"]["1"]), _faster(row["speed"]["8"]), _agrees(row)]
        for row in rows
    ]
    missing = left_out(*(speed["uncounted"] for row in rows for speed in row["speed"].values()))
    where, conditions = records[0]["environment"], rows[0]["conditions"]["1"]
    said = (
        f"{where['cpu']}, {conditions['threads']} threads, float32, torch {where['torch']}, {records[0]['date'][:10]}; in square "
        "brackets the 20 to 80 % range of interleaved rounds, and the 95 % interval over pictures or questions"
    )
    return f"{table(head, lines)}\n\n{said}." + (f" Bounds{missing}." if missing else "")


def _faster(speed: dict[str, Any]) -> str:
    spread = speed["speedup"]
    return f"x{spread['median']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}] (x{speed['bound']:.2f})"


def _agrees(row: dict[str, Any]) -> str:
    found = row["agreement"]
    if found["measure"] == "right answers":
        return (
            f"{found['pruned']:.1%} right of {found['n']} (unpruned {found['base']:.1%}): {100 * found['difference']:+.1f} "
            f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}] points"
        )
    return f"{found['measure']} {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}], {found['n']} photographs"


def support_table() -> str:
    seen = {}
    for spec in ENCODERS:
        given = ", ".join(
            [*(["pictures"] if spec.patch is not None else []), *(["rows of patches"] if spec.rows is not None else [])]
        )
        seen.setdefault((spec.library, spec.title, given), []).append(f"`{spec.encoder.rpartition('.')[2]}`")
    rows = [[library, title, ", ".join(classes), given] for (library, title, given), classes in seen.items()]
    return table(["library", "encoders", "class", "is given"], rows)


def zoo_table() -> str:
    """How many names of each module hold, from the record of the sweep."""
    rows = zoo_rows()
    lines: list[list[str]] = []
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row["library"], row["module"]), []).append(row["outcome"])
    for (library, module), outcomes in groups.items():
        counts = [str(outcomes.count(outcome) or "") for outcome in ("refused", "not tried")]
        lines.append([library, module, f"{outcomes.count('holds')} of {len(outcomes)}", *counts])
    held = sum(row["outcome"] == "holds" for row in rows)
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    made = table(["library", "names of", "hold", "refused", "not tried"], lines)
    return f"{made}\n\n{held} of {len(rows)} names hold ({versions})."


def vlm_table() -> str:
    """What works in which family; flash attention by what the installed transformers says of its class."""
    rows = []
    every_patch = next(field.default for field in dataclasses.fields(FamilySpec) if field.name == "merge_size")
    for spec in FAMILIES:
        if spec.no_vision is not None:
            vision = f"refused: {spec.no_vision.partition(',')[0]}"
        elif spec.merge_size is every_patch:
            vision = "yes"
        else:
            sides = ", ".join(sorted({f"{tiny.merge_size} x {tiny.merge_size}" for tiny in spec.tiny}))
            vision = f"yes, by groups of patches (tested: {sides})"
        others = ["yes" if stage in spec.stages else "no" for stage in ("connector", "language")]
        inputs = "images, videos" if VIDEOS in spec.pixels else "images"
        module, _, name = spec.model.rpartition(".")
        flash = getattr(importlib.import_module(module), name)._supports_flash_attn
        rows.append([spec.title, vision, *others, inputs, "yes" if flash else "refused by transformers"])
    where = ["in the encoder (`vision`)", "between (`connector`)", "in the language model (`language`)"]
    return table(["family", *where, "inputs", "flash attention"], rows)


def types_table() -> str:
    """What each image-text type of transformers gave, from the record of the sweep."""
    rows = [
        [record.type, f"`{record.cls}`", record.family, *(_short(getattr(record, stage)) for stage in SLOTS)]
        for record in type_records().values()
    ]
    made = table(["type", "class", "facts", "`vision`", "`connector`", "`language`"], rows)
    release = ", ".join(sorted({record.release for record in type_records().values()}))
    return f"{made}\n\n{held_types()} (transformers {release})."


def held_types() -> str:
    """How many types hold, by stage."""
    records = type_records().values()
    held = {stage: sum(getattr(record, stage) == "holds" for record in records) for stage in SLOTS}
    return (
        f"of the {len(records)} image-text types of transformers, {held['connector']} hold with tokens leaving in front of the "
        f"language model, {held['language']} in it, {held['vision']} in the encoder"
    )


def _short(outcome: str) -> str:
    """An outcome with the first part of its reason."""
    return outcome.partition("; use the ")[0].partition(". Drop tokens")[0].replace("|", "/")


def speed_table() -> str:
    record = json.loads(RECORD.read_text())
    rows = []
    for row in record["rows"]:
        speed, share = row["speedup"], row["overhead"]["share"]["median"]
        faster = f"x{speed['median']:.2f} [{speed['p20']:.2f}, {speed['p80']:.2f}]"
        what = [row["model"], str(row["pixels"]), str(row["batch"]), row["plan_name"]]
        rows.append(
            [
                *what,
                f"{1 / row['bound']:.2f}",
                f"x{row['bound']:.2f}",
                faster,
                f"{row['efficiency']:.2f}",
                f"{share:.1%}",
            ]
        )
    missing = left_out(*(row["costs"][name]["uncounted"] for row in record["rows"] for name in ("base", "pruned")))
    where = record["environment"]
    conditions = record["rows"][0]["conditions"]
    said = (
        f"{where['cpu']}, {conditions['threads']} threads, float32, torch {where['torch']}, "
        f"transformers {where['transformers']}, {conditions['repeats']} interleaved rounds after "
        f"{conditions['warmup']} of warm-up, {record['date'][:10]}."
        + (f" FLOPs and bound{missing}." if missing else "")
    )
    faster = ["FLOPs left", "bound", "measured speed-up [p20, p80]", "of the bound", "scoring + gathering"]
    return f"{table(['model', 'pixels', 'batch', 'plan', *faster], rows)}\n\n{said}"


def choosing_table() -> str:
    """What choosing takes, of the unpruned prefill: a row per method and slot, at the budget that takes most."""
    record = json.loads(SELECTION.read_text())
    places = [(part["shape"], part["visual"]) for part in record["parts"]]
    shares: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for place, part in zip(places, record["parts"], strict=True):
        for row in part["rows"]:
            setting = "" if row["setting"].startswith("keep") else row["setting"]
            cells = shares.setdefault((row["method"], setting, row["slot"]), {})
            cells[place] = max(cells.get(place, 0.0), row["share"]["median"])
    titles = {"wide": "7B shape", "narrow": "an eighth as wide"}
    head = ["method", "slot", *(f"{titles[shape]}, {visual:,} tokens" for shape, visual in places)]
    rows = [
        [f"`{name}`{setting and f', {setting}'}", slot, *(f"{cells[place]:.2%}" for place in places)]
        for (name, setting, slot), cells in shares.items()
    ]
    where, most = record["environment"], max(max(cells.values()) for cells in shares.values())
    said = f"{where['cpu']}, {record['threads']} thread, float32, torch {where['torch']}, {record['rounds']} interleaved rounds, "
    return f"{table(head, rows)}\n\nAt most {most:.1%}. {said}{record['date'][:10]}."


def serving_table() -> str:
    """Load on vLLM, unpruned and pruned."""
    rows = []
    for file in SERVING:
        record = json.loads(file.read_text())
        size = f"{sum(record['parameters'].values()) / 1e6:.0f} M"
        for row in record["rows"]:
            load = f"{row['rate']:.1f} requests/s" if row["rate"] else f"{row['in_flight']} in flight"
            before, after = row["unpruned"], row["pruned"]
            cells = [size, load, f"{before['requests_per_second']:.2f} -> {after['requests_per_second']:.2f}"]
            for name in ("throughput", "ttft", "latency", "kv"):
                ratio = row[f"{name}_ratio"]
                cells.append(f"x{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
            rows.append(cells)
    head = ["model", "load", "requests/s", "ratio", "time to first token", "latency", "KV blocks"]
    return table(head, rows)


def replace(text: str, name: str, made: str) -> str:
    begin, end = f"<!-- {name}: generated by make tables -->", f"<!-- end {name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no {begin} ... {end}")
    return f"{head}{begin}\n{made}\n{end}{tail}"


# every generated part, by its page and name
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": headline_table, "counts": counts},
    "docs/index.md": {"headline": headline_table},
    "docs/models.md": {
        "support": support_table,
        "zoo": zoo_table,
        "families": vlm_table,
        "types": types_table,
        "shapes": shapes.shapes_table,
    },
    "docs/methods.md": {
        "methods": methods_table,
        "scenes": compared.answers_table,
        "photographs": compared.embeddings_table,
        "missing": compared.missing_list,
        "costs": lambda: costs.costs_table(builtin_methods()),
        "choosing": choosing_table,
    },
    "docs/ready.md": {"ready": ready.ready_table},
    "docs/results.md": {
        "keep": keep_table,
        "speed": speed_table,
        "half": answers.encoder_table,
        "answers": answers.answers_table,
        "ahead": answers.ahead_table,
        "both": answers.both_table,
    },
    "docs/serving.md": {"serving": serving_table},
}


def main() -> None:
    for page, parts in PARTS.items():
        file = ROOT / page
        text = file.read_text()
        for name, made in parts.items():
            text = replace(text, name, made())
        file.write_text(text)


if __name__ == "__main__":
    main()
