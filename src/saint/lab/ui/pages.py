"""Answers as sheets, in the same words and pictures as `saint report`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plans import Plan
from ..bench.timing import Line as Timed
from ..bench.timing import Spread
from ..images import data_uri
from ..kinds.agreement import Agreement, agreement, answer
from ..kinds.subject import Answered
from ..report.blocks import (
    Block,
    Cell,
    Curves,
    Figure,
    Gallery,
    Group,
    Heading,
    Line,
    Picture,
    PlanBox,
    Quotes,
    Sheet,
    Table,
    Text,
)
from ..report.kept import pictures_of
from ..report.words import interval, number
from ..view import heatmap

SIDE = 448  # pixels of a picture at most
_TOPS = 5


@dataclass(frozen=True)
class Shown:
    """What one picture made of a model.

    Attributes:
        spec: what the user types for it.
        title: of the model.
        question: that was asked; "" of a model that is asked nothing.
        plan: under which it ran.
        facts: what stays, as `saint view` writes it of a photograph.
        grid: of every picture; None where each has its own.
        base: what the unpruned model answers.
        short: what the pruned one does.
        bench: of the picture.
        classes: names of a classifier's outputs, where they are known.
        known: embeddings [C] of other pictures by name, where the model gives embeddings.
    """

    spec: str
    title: str
    question: str
    plan: Plan
    facts: Mapping[str, Any]
    grid: Sequence[int] | None
    base: Answered
    short: Answered
    bench: Any
    classes: Sequence[str] | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)


def page(shown: Shown) -> Sheet:
    """Show what stays, both answers, times, and the plan."""
    steps, bench = shown.facts["layers"], shown.bench
    texts = [shown.base.text, shown.short.text]
    found = None if texts[0] is not None else agreement(shown.base.output, shown.short.output)
    blocks: list[Block] = []
    if found is None:
        same = "the same answer" if texts[0] == texts[1] else "another answer"
        both = zip(("unpruned", "pruned"), texts, strict=True)
        blocks.append(Quotes(shown.question, [(name, text or "(no text)") for name, text in both]))
    else:
        same = f"{found.measure} of the two outputs {number(found.values[0], 4)}"
    drawn = [Figure(name, uri, grid, stayed) for name, uri, grid, stayed in pictures_of(shown.facts, shown.grid)]
    blocks += [Heading("What stays"), Gallery([*drawn, _tokens(steps)])]
    if found is not None:
        blocks += [Heading("Outputs"), *_outputs(found, shown)]
    rows = [[*_time(line), *([] if line.kv_bytes is None else [line.kv_bytes / 2**20])] for line in bench.lines]
    blocks += [Heading("Times"), Table(["", *bench.heads], rows, bench.caption, sortable=False)]
    blocks.append(_timed(bench.gain, bench.flops_bound, bench.conditions))
    command = f"saint demo {shlex.quote(shown.spec)}"
    if shown.question:
        command = f"saint chat {shlex.quote(shown.spec)} --images FILE --prompt {shlex.quote(shown.question)}"
    plan = shown.plan.to_dict()
    line = f"{command} --plan {shlex.quote(json.dumps(plan, separators=(',', ':')))}"
    blocks += [Heading("Plan"), PlanBox(plan, shell=line)]
    verdict = _lead(steps, same, bench.gain, shown.facts.get("visual_tokens"))
    return Sheet(shown.title, "", verdict, [], blocks)


def _lead(steps: Sequence[dict[str, Any]], same: str, speedup: Spread, total: int | None = None) -> str:
    left = "every token stays"
    if steps:
        last = (steps[-1].get("stage"), steps[-1]["layer"])
        kept = sum(s["tokens_out"] for s in steps if (s.get("stage"), s["layer"]) == last)
        total = steps[0]["tokens_in"] if total is None else total
        left = f"{kept} of {total} tokens are left ({kept / total:.0%})"
    return f"On this picture {left}; {same}; {_spread(speedup)} times as fast."


def _tokens(steps: Sequence[dict[str, Any]]) -> Group:
    rows = []
    for step in steps:
        where = f"layer {step['layer']}" if step.get("stage") != "connector" else ""
        name = " ".join(part for part in (step.get("stage"), where) if part)
        rows.append([name, step["tokens_in"], step["tokens_out"]])
    made = Table(["drop point", "tokens in", "tokens out"], rows, "Tokens", sortable=False)
    stages = {step.get("stage") for step in steps}
    if len(steps) < 2 or len(stages) > 1:
        return Group([made], box=True)
    line = Line("tokens left", [s["tokens_out"] for s in steps], x=[s["layer"] for s in steps])
    return Group([Curves("Tokens left", [line], y="tokens"), made], box=True)


def _outputs(found: Agreement, shown: Shown) -> list[Block]:
    outputs, classes, known = (shown.base.output, shown.short.output), shown.classes, shown.known
    both = [
        (name, answer(output)[1][0].detach().float().cpu())
        for name, output in zip(("unpruned", "pruned"), outputs, strict=True)
    ]
    same = Text(
        f"{found.measure.capitalize()} of the pruned and the unpruned {found.answer}: {number(found.values[0], 6)}."
    )
    if both[0][1].ndim == 3:  # a map [1, H, W]
        high, wide = both[0][1].shape[-2:]
        side = (SIDE, round(SIDE * high / wide))
        maps = [Picture(f"{name} map", name, data_uri(heatmap(v[0], side), SIDE, 60_000)) for name, v in both]
        return [same, Gallery(maps, pair=True), Text("Dark is 0, light is 1.", aside=True)]
    if found.answer == "logits" or classes is not None:
        return [same, *(_tops(name, v, classes) for name, v in both)]
    return [same, *(_nearest(name, v, known) for name, v in both)] if known else [same]


def _nearest(name: str, vector: torch.Tensor, known: Mapping[str, torch.Tensor]) -> Table:
    found = {other: torch.cosine_similarity(vector, theirs, 0).item() for other, theirs in known.items()}
    nearest = sorted(found, key=lambda other: -found[other])[:_TOPS]
    rows = [[other.replace("_", " "), Cell(number(found[other], 4), found[other])] for other in nearest]
    return Table(["photograph", "cosine"], rows, f"Nearest of {len(known)} photographs, {name}", sortable=False)


def _tops(name: str, logits: torch.Tensor, classes: Sequence[str] | None) -> Table:
    shares, which = logits.softmax(-1).topk(min(_TOPS, logits.numel()))
    named = classes is not None and len(classes) == logits.numel()
    rows = [
        [classes[i] if named and classes is not None else f"class {i}", Cell(f"{share:.1%}", share)]
        for share, i in zip(shares.tolist(), which.tolist(), strict=True)
    ]
    return Table(["class", "probability"], rows, name, sortable=False)


def _time(line: Timed) -> list[Any]:
    return [line.name, Cell(_spread(line.time), line.time.median), line.flops / 1e9]


def _timed(speedup: Spread, bound: float, conditions: dict[str, Any]) -> Text:
    return Text(
        f"{_spread(speedup)} times as fast; FLOPs would allow {number(bound, 2)}. One picture on this machine ("
        f"{conditions['device']}, {conditions['threads']} thread(s), {conditions['dtype']}), {speedup.n} interleaved pairs: "
        "saint bench measures with more."
    )


def _spread(spread: Spread) -> str:
    return interval(spread.median, spread.p20, spread.p80, 2)
