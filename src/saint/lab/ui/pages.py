"""Answers as HTML, in the same words and pictures as `saint report`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plans import Plan
from ..bench.timing import Spread
from ..images import data_uri
from ..kinds.agreement import Agreement, agreement, answer
from ..kinds.subject import Answered
from ..report.charts import Line, line_chart
from ..report.figure import figure
from ..report.kept import pictures_of
from ..report.markup import Cell, Markup, interval, join, number, table, tag
from ..report.section import plan_text
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


def page(shown: Shown) -> Markup:
    """What stays, both answers, times, and the plan."""
    steps, bench = shown.facts["layers"], shown.bench
    texts = [shown.base.text, shown.short.text]
    found = None if texts[0] is not None else agreement(shown.base.output, shown.short.output)
    said: list[Markup] = []
    if found is None:
        same = "the same answer" if texts[0] == texts[1] else "another answer"
        both = zip(("unpruned", "pruned"), texts, strict=True)
        quotes = [tag("div", tag("h3", name), tag("blockquote", text or "(no text)")) for name, text in both]
        said = [tag("p", f"“{shown.question}”", class_="asked"), tag("div", *quotes, class_="pair")]
    else:
        same = f"{found.measure} of the two outputs {number(found.values[0], 4)}"
    parts = [_lead(steps, same, bench.gain, shown.facts.get("visual_tokens")), *said]
    drawn = [
        figure(name, uri, grid, stayed, f"ui-{i}", SIDE)
        for i, (name, uri, grid, stayed) in enumerate(pictures_of(shown.facts, shown.grid))
    ]
    parts += [tag("h3", "What stays"), tag("div", *drawn, _tokens(steps), class_="gallery")]
    if found is not None:
        parts += [tag("h3", "Outputs"), _outputs(found, shown)]
    rows = [[*_time(line), *([] if line.kv_bytes is None else [line.kv_bytes / 2**20])] for line in bench.lines]
    parts += [tag("h3", "Times"), table(["", *bench.heads], rows, bench.caption, sortable=False)]
    parts.append(_timed(bench.gain, bench.flops_bound, bench.conditions))
    command = f"saint demo {shlex.quote(shown.spec)}"
    if shown.question:
        command = f"saint chat {shlex.quote(shown.spec)} --images FILE --prompt {shlex.quote(shown.question)}"
    parts += _plan(command, shown.plan)
    return tag("div", tag("h2", shown.title), *parts)


def _lead(steps: Sequence[dict[str, Any]], same: str, speedup: Spread, total: int | None = None) -> Markup:
    left = "every token stays"
    if steps:
        last = (steps[-1].get("stage"), steps[-1]["layer"])
        kept = sum(s["tokens_out"] for s in steps if (s.get("stage"), s["layer"]) == last)
        total = steps[0]["tokens_in"] if total is None else total
        left = f"{kept} of {total} tokens are left ({kept / total:.0%})"
    return tag("p", f"On this picture {left}; {same}; {_spread(speedup)} times as fast.", class_="verdict")


def _tokens(steps: Sequence[dict[str, Any]]) -> Markup:
    rows = []
    for step in steps:
        where = f"layer {step['layer']}" if step.get("stage") != "connector" else ""
        name = " ".join(part for part in (step.get("stage"), where) if part)
        rows.append([name, step["tokens_in"], step["tokens_out"]])
    made = table(["drop point", "tokens in", "tokens out"], rows, "Tokens", sortable=False)
    stages = {step.get("stage") for step in steps}
    if len(steps) < 2 or len(stages) > 1:
        return tag("div", made)
    line = Line("tokens left", [s["tokens_out"] for s in steps], x=[s["layer"] for s in steps])
    return tag("div", line_chart("Tokens left", [line], y="tokens"), made)


def _outputs(found: Agreement, shown: Shown) -> Markup:
    outputs, classes, known = (shown.base.output, shown.short.output), shown.classes, shown.known
    values = [answer(output)[1][0].detach().float().cpu() for output in outputs]
    same = tag(
        "p",
        f"{found.measure.capitalize()} of the pruned and the unpruned {found.answer}: {number(found.values[0], 6)}.",
    )
    if values[0].ndim == 3:  # a map [1, H, W]
        side = (SIDE, round(SIDE * values[0].shape[-2] / values[0].shape[-1]))
        maps = [
            tag(
                "figure",
                tag("img", src=data_uri(heatmap(v[0], side), SIDE, 60_000), alt=f"{name} map"),
                tag("figcaption", name),
            )
            for name, v in zip(("unpruned", "pruned"), values, strict=True)
        ]
        return join([same, tag("div", *maps, class_="pair"), tag("p", "Dark is 0, light is 1.", class_="asked")])
    if found.answer == "logits" or classes is not None:
        return join([same, *(_tops(name, v, classes) for name, v in zip(("unpruned", "pruned"), values, strict=True))])
    if not known:
        return same
    return join([same, *(_nearest(name, v, known) for name, v in zip(("unpruned", "pruned"), values, strict=True))])


def _nearest(name: str, vector: torch.Tensor, known: Mapping[str, torch.Tensor]) -> Markup:
    found = {other: torch.cosine_similarity(vector, theirs, 0).item() for other, theirs in known.items()}
    nearest = sorted(found, key=lambda other: -found[other])[:_TOPS]
    rows = [[other.replace("_", " "), Cell(number(found[other], 4), found[other])] for other in nearest]
    return table(["photograph", "cosine"], rows, f"Nearest of {len(known)} photographs, {name}", sortable=False)


def _tops(name: str, logits: torch.Tensor, classes: Sequence[str] | None) -> Markup:
    shares, which = logits.softmax(-1).topk(min(_TOPS, logits.numel()))
    named = classes is not None and len(classes) == logits.numel()
    rows = [
        [classes[i] if named and classes is not None else f"class {i}", Cell(f"{share:.1%}", share)]
        for share, i in zip(shares.tolist(), which.tolist(), strict=True)
    ]
    return table(["class", "probability"], rows, name, sortable=False)


def _time(line: Any) -> list[Any]:
    return [line.name, Cell(_spread(line.time), line.time.median), line.flops / 1e9]


def _timed(speedup: Spread, bound: float, conditions: dict[str, Any]) -> Markup:
    text = (
        f"{_spread(speedup)} times as fast; FLOPs would allow {number(bound, 2)}. One picture on this machine ("
        f"{conditions['device']}, {conditions['threads']} thread(s), {conditions['dtype']}), {speedup.n} interleaved pairs: "
        "saint bench measures with more."
    )
    return tag("p", text)


def _plan(command: str, plan: Plan) -> list[Markup]:
    text = json.dumps(plan.to_dict(), separators=(",", ":"))
    line = f"{command} --plan {shlex.quote(text)}"
    return [tag("h3", "Plan"), tag("p", plan_text(plan.to_dict())), tag("pre", line, tabindex="0", class_="line")]


def _spread(spread: Spread) -> str:
    return interval(spread.median, spread.p20, spread.p80, 2)
