"""Rewrite the generated tables: what is supported and the speed in README.md, the load in docs/serving.md, from their records.

Only what this package brings is in them; `saint list` also shows plug-ins.
"""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

from saint.flops import left_out
from saint.upstream.names import VIDEOS
from saint.upstream.registry import ENCODERS, FAMILIES
from saint.upstream.specs import FamilySpec

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "docs" / "zoo.csv"
RECORD = ROOT / "benchmarks" / "results" / "encoders-cpu.json"
SERVING = [ROOT / "benchmarks" / "results" / f"serving-cpu{size}.json" for size in ("", "-200m")]


def support_table() -> str:
    lines = ["| library | encoders | class |", "|---|---|---|"]
    seen = {}
    for spec in ENCODERS:
        seen.setdefault((spec.library, spec.title), []).append(f"`{spec.encoder.rpartition('.')[2]}`")
    lines += [f"| {library} | {title} | {', '.join(classes)} |" for (library, title), classes in seen.items()]
    return "\n".join(lines)


def zoo_table() -> str:
    """How many names of each module hold, from the record of the sweep."""
    rows = list(csv.DictReader(ZOO.read_text().splitlines()))
    lines = ["| library | names of | hold | refused | not tried |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row["library"], row["module"]), []).append(row["outcome"])
    for (library, module), outcomes in groups.items():
        counts = " | ".join(str(outcomes.count(outcome) or "") for outcome in ("refused", "not tried"))
        lines.append(f"| {library} | {module} | {outcomes.count('holds')} of {len(outcomes)} | {counts} |")
    held = sum(row["outcome"] == "holds" for row in rows)
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    lines += ["", f"{held} of {len(rows)} names hold ({versions})."]
    return "\n".join(lines)


def vlm_table() -> str:
    """What works in which family; flash attention by what the installed transformers says of its class."""
    lines = [
        "| family | in the encoder (`vision`) | between (`connector`) | in the language model (`language`) | inputs "
        "| flash attention |",
        "|---|---|---|---|---|---|",
    ]
    every_patch = next(field.default for field in dataclasses.fields(FamilySpec) if field.name == "merge_size")
    for spec in FAMILIES:
        if spec.no_vision is not None:
            vision = f"refused: {spec.no_vision.partition(',')[0]}"
        elif spec.merge_size is every_patch:
            vision = "yes"
        else:
            sides = ", ".join(sorted({f"{tiny.merge_size} x {tiny.merge_size}" for tiny in spec.tiny}))
            vision = f"yes, by groups of patches (tested: {sides})"
        others = " | ".join("yes" if stage in spec.stages else "no" for stage in ("connector", "language"))
        inputs = "images, videos" if VIDEOS in spec.pixels else "images"
        module, _, name = spec.model.rpartition(".")
        flash = getattr(importlib.import_module(module), name)._supports_flash_attn
        lines.append(
            f"| {spec.title} | {vision} | {others} | {inputs} | {'yes' if flash else 'refused by transformers'} |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    record = json.loads(RECORD.read_text())
    lines = [
        "| model | pixels | batch | plan | FLOPs left | bound | measured speed-up [p20, p80] | of the bound "
        "| scoring + gathering |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        speed, share = row["speedup"], row["overhead"]["share"]["median"]
        lines.append(
            f"| {row['model']} | {row['pixels']} | {row['batch']} | {row['plan_name']} | {1 / row['bound']:.2f} "
            f"| x{row['bound']:.2f} | x{speed['median']:.2f} [{speed['p20']:.2f}, {speed['p80']:.2f}] "
            f"| {row['efficiency']:.2f} | {share:.1%} |"
        )
    missing = left_out(*(row["costs"][name]["uncounted"] for row in record["rows"] for name in ("base", "pruned")))
    where = record["environment"]
    conditions = record["rows"][0]["conditions"]
    lines += [
        "",
        f"{where['cpu']}, {conditions['threads']} threads, float32, torch {where['torch']}, "
        f"transformers {where['transformers']}, {conditions['repeats']} interleaved rounds after "
        f"{conditions['warmup']} of warm-up, {record['date'][:10]}."
        + (f" FLOPs and bound{missing}." if missing else ""),
    ]
    return "\n".join(lines)


def serving_table() -> str:
    """Load on vLLM, unpruned and pruned."""
    lines = [
        "| model | load | requests/s | ratio | time to first token | latency | KV blocks |",
        "|---|---|---|---|---|---|---|",
    ]
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
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: generated by make tables -->", f"<!-- end {name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no {begin} ... {end}")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def main() -> None:
    readme = ROOT / "README.md"
    text = replace(readme.read_text(), "support", support_table())
    text = replace(text, "zoo", zoo_table())
    text = replace(text, "families", vlm_table())
    if RECORD.exists():
        text = replace(text, "speed", speed_table())
    readme.write_text(text)
    serving = ROOT / "docs" / "serving.md"
    serving.write_text(replace(serving.read_text(), "serving", serving_table()))


if __name__ == "__main__":
    main()
