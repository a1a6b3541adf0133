"""Tables of benchmarks/headline.py for docs/results.md: images per second of a large ViT, times of answers, and who is ahead."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saint.lab.report.markdown import table

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "headline-shapes-cpu.json"
SIZES = {"7b": "7B", "13b": "13B"}
UNPRUNED = "unpruned"


def record() -> dict[str, Any]:
    """Return what was measured so far."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def missing(*parts: str) -> str:
    """Say how parts are measured."""
    commands = ", ".join(f"`python benchmarks/headline.py {part}`" for part in parts)
    return (
        f"Not measured yet: {commands} {'writes' if len(parts) == 1 else 'write'} the record, `make tables` this table."
    )


# -- the encoder ------------------------------------------------------------------------------------------------------


def encoder_table() -> str:
    """Make the table of the ViT: unpruned and pruned to half of the FLOPs."""
    part = record().get("vit-h")
    if part is None:
        return missing("vit-h")
    derived, rows = part["derived"], []
    for name, gain in derived["gains"].items():
        batch, setting = name.split("/")
        number = part["variants"][name]["batch"]
        rates = [1e3 * number / derived["times"][one]["first"]["median"] for one in (gain["over"], name)]
        rows.append(
            [
                batch.removeprefix("batch "),
                setting,
                f"{1 / gain['bounds']['first']:.3f}",
                f"{rates[0]:.3f} -> {rates[1]:.3f}",
                _faster(gain["first"]),
                f"x{gain['bounds']['first']:.2f}",
                f"{gain['of_the_bound']:.2f}",
            ]
        )
    head = ["batch", "plan", "FLOPs left", "images/s", "speed-up [p20, p80]", "bound", "of the bound"]
    shape = part["conditions"]["shape"]
    said = (
        f"ViT-H/14 at 224 pixels, {shape['depth']} layers of width {shape['embed_dim']}. "
        f"{_conditions(part)}; *plan_for*: `saint.plan_for(model, keep=0.5)`; *votes*: SAINT's votes in the first half of the "
        "layers, with the fixed budget that leaves half of the counted FLOPs."
    )
    return f"{table(head, rows)}\n\n{said}"


# -- answers ----------------------------------------------------------------------------------------------------------


def answers_table() -> str:
    """Make the table of times of answers: every setting in every way of generating, with the reason where one does not run."""
    parts = _answers()
    if not parts:
        return missing(*SIZES)
    lengths = next(iter(parts.values()))["conditions"]["marks"][1:]
    head = ["shape", "tokens leave in", "way", "KV left", "first token, ms"]
    head += [f"ms per token of {mark}" for mark in lengths] + [f"answer of {mark}, s" for mark in lengths]
    head += ["speed-up of the first token (bound)", *(f"of an answer of {mark}" for mark in lengths)]
    rows = []
    for size, part in parts.items():
        for name, variant in part["variants"].items():
            _, setting, way = name.split("/")
            where = [SIZES[size], "none" if setting == UNPRUNED else setting, way]
            outcome = next((why for why in ("refused", "failed") if why in variant), None)
            if outcome is not None:
                reason = variant[outcome].partition(": use ")[0].replace("|", "/")
                rows.append([*where, f"{outcome}: {reason}", *[""] * (len(head) - len(where) - 1)])
            elif (times := part["derived"]["times"].get(name)) is not None:
                gains = _gains(part["derived"]["gains"].get(name), lengths)
                rows.append([*where, f"{variant['kv_share']:.0%}", *_times(times, lengths), *gains])
    return f"{table(head, rows)}\n\n{_shapes(parts)}"


def ahead_table() -> str:
    """Make the table of lengths from which, or up to which, one variant's answer is there before another's."""
    parts = _answers()
    if not parts:
        return missing(*SIZES)
    rows, said = [], []
    for size, part in parts.items():
        most = part["conditions"]["marks"][-1]
        for pair in part["derived"].get("ahead", []):
            _, setting, way = pair["name"].split("/")
            _, other, than = pair["than"].split("/")
            against = f"unpruned, {than}" if other == UNPRUNED and setting != UNPRUNED else than
            where = "none" if setting == UNPRUNED else setting
            rows.append([SIZES[size], where, way, against, _length(pair, most), f"{pair['alike']} of {pair['rounds']}"])
        for group in part["derived"].get("fastest", []):
            order = "; ".join(
                f"from {entry['from']} {'token' if entry['from'] == 1 else 'tokens'} on {_spoken(entry['variant'])}"
                for entry in group["order"]
            )
            ways = ", ".join(dict.fromkeys(name.split("/")[2] for name in group["among"]))
            took = f"{len(group['among'])} that took turns ({ways})"
            said.append(f"Fastest in the {SIZES[size]} shape among the {took}: {order}.")
        off = max(part["derived"].get("misfit", {"": 0.0}).values())
        said.append(
            f"{SIZES[size]}: total times are those of time to first token and time per token over {most} tokens, which miss "
            f"the measured totals by at most {off:.1%}; lengths are looked for up to {most} tokens."
        )
    head = ["shape", "tokens leave in", "way", "ahead of", "for answers of", "rounds that say so"]
    return f"{table(head, rows)}\n\n" + "\n".join(said)


def both_table() -> str:
    """Make the table of the larger shape pruned beside the smaller one unpruned."""
    part = record().get("llava", {}).get("both")
    if part is None:
        return missing("both")
    lengths = part["conditions"]["marks"][1:]
    rows = [
        [*name.split("/")[:2], _share(gain["first"]), *(_share(gain["total"][str(mark)]) for mark in lengths)]
        for name, gain in part["derived"]["gains"].items()
    ]
    head = ["shape", "tokens leave in", "time to first token", *(f"answer of {mark}" for mark in lengths)]
    said = f"Times as shares of those of the unpruned 7B shape, dynamic caches, eager. {_conditions(part)}."
    return f"{table(head, rows)}\n\n{said}"


def _answers() -> dict[str, Any]:
    parts = record().get("llava", {})
    return {size: parts[size] for size in SIZES if size in parts}


def _times(times: Mapping[str, Any], lengths: list[int]) -> list[str]:
    steps = [f"{times['per_token'][str(mark)]['median']:.1f}" for mark in lengths]
    totals = [f"{times['total'][str(mark)]['median'] / 1e3:.2f}" for mark in lengths]
    return [f"{times['first']['median']:.0f}", *steps, *totals]


def _gains(gain: Mapping[str, Any] | None, lengths: list[int]) -> list[str]:
    if gain is None:
        return [""] * (1 + len(lengths))
    first = f"{_faster(gain['first'])} (x{gain['bounds']['first']:.2f})"
    return [first, *(_faster(gain["total"][str(mark)]) for mark in lengths)]


def _faster(speed: Mapping[str, Any]) -> str:
    spread = speed["rounds"]
    return f"x{speed['of_medians']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}]"


def _share(speed: Mapping[str, Any]) -> str:
    """A speed-up as the share of the time that is left."""
    spread = speed["rounds"]
    return f"{1 / speed['of_medians']:.2f} [{1 / spread['p80']:.2f}, {1 / spread['p20']:.2f}]"


def _length(pair: Mapping[str, Any], most: int) -> str:
    kind, tokens = pair["found"]["ahead"], pair["found"]["tokens"]
    if kind in ("always", "never"):
        return f"every length up to {most}" if kind == "always" else f"no length up to {most}"
    among = "" if pair["low"] is None else f" [{pair['low']}, {pair['high']}]"
    return f"up to {tokens}{among} tokens" if kind == "until" else f"{tokens}{among} tokens or more"


def _spoken(variant: str) -> str:
    _, setting, way = variant.split("/")
    return f"{setting}, {way}"


def _shapes(parts: Mapping[str, Any]) -> str:
    """Say what was measured."""
    made = []
    for size, part in parts.items():
        shape, real = (part["conditions"][name][size] for name in ("shapes", "real"))
        layers, width = ("num_hidden_layers", "hidden_size")
        made.append(f"{SIZES[size]}: {shape[layers]} of {real[layers]} layers, width {shape[width]} of {real[width]}")
    conditions = next(iter(parts.values()))["conditions"]
    ready = [v["ready_s"] for one in parts.values() for v in one["variants"].values() if "ready_s" in v]
    took = f"{min(ready):.0f} to {max(ready):.0f} s per variant" if ready else ""
    compiling = f"Compiling ({took}, less where torch's cache on disk has a graph) is in no time. " if ready else ""
    measured = "; ".join(f"{SIZES[size]}: {_conditions(part)}" for size, part in parts.items())
    return (
        f"Language models in the proportions of LLaVA-1.5's ({'; '.join(made)}), random weights, behind a tower of "
        f"{conditions['tower']['num_hidden_layers']} tiny layers; {conditions['visual']} visual and {conditions['text']} text "
        "tokens; greedy. *connector*: 25 % of the visual tokens enter the language model; *language*: 25 % stay behind its "
        "second layer; *hybrid*: half enters, and half of that stays behind the second layer. *KV left*: of the prompt's keys "
        "and values. A static cache has room for the longest answer. Speed-ups are over unpruned in the same way: of medians, "
        f"in brackets the 20 to 80 % range over rounds; bounds are those of counted FLOPs. {compiling}{measured}."
    )


def _conditions(part: Mapping[str, Any]) -> str:
    """Say what the times of a part depend on."""
    where, conditions = part["conditions"]["environment"], part["conditions"]
    threads = f"{where['threads']} {'thread' if where['threads'] == 1 else 'threads'}"
    counts = [times["first"]["n"] for times in part["derived"]["times"].values()]
    rounds = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    calls = f" in {len(part['calls'])} calls" if len(part["calls"]) > 1 else ""
    loads = [call["load_average"] for call in part["calls"] if call["load_average"] is not None]
    load = f", load average before them at most {max(loads):.1f}" if loads else ""
    return (
        f"{where['cpu']}, {threads}, {conditions['dtype']}, torch {where['torch']}, transformers {where['transformers']}, timm "
        f"{where['timm']}, {rounds} interleaved rounds{calls}{load}, {part['calls'][-1]['date'][:10]}"
    )
