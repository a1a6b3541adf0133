"""Answers as HTML, in the same words and pictures as `saint report`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...plans import Plan
from ..bench import Agreement, EncoderBench, GenerationBench
from ..bench.agreement import answer
from ..bench.timing import Spread
from ..images import data_uri
from ..report.charts import Line, line_chart
from ..report.figure import figure, steps_on_grid
from ..report.kept import pictures_of
from ..report.markup import Cell, Markup, interval, join, number, table, tag
from ..report.section import plan_text
from ..view import heatmap
from ..view.tiles import Tile

_SIDE = 448  # pixels of a picture at most
_TOPS = 5


def encoder_page(
    *,
    spec: str,
    title: str,
    plan: Plan,
    picture: Image.Image | None,
    grid: tuple[int, int] | None,
    steps: Sequence[dict[str, Any]],
    agreement: Agreement,
    outputs: tuple[Any, Any],
    classes: Sequence[str] | None,
    known: Mapping[str, torch.Tensor],
    bench: EncoderBench,
) -> Markup:
    """Of one picture and one encoder: what stays, both outputs, times, the plan.

    ``classes`` are names of a classifier's outputs, ``known`` embeddings [C] of other pictures by name, where there are any.
    """
    parts = [_lead(steps, f"{agreement.measure} of the two outputs {number(agreement.values[0], 4)}", bench.speedup)]
    if picture is not None and grid is not None:
        shown = steps_on_grid(steps, grid[0] * grid[1])
        drawn = figure("the picture as the model sees it", data_uri(picture, _SIDE, 90_000), grid, shown, "ui", _SIDE)
        parts += [tag("h3", "What stays"), tag("div", drawn, _tokens(steps), class_="gallery")]
    else:
        parts += [tag("h3", "What stays"), _tokens(steps)]
    parts += [tag("h3", "Outputs"), _outputs(agreement, outputs, classes, known, picture)]
    rows = [
        _time("unpruned", bench.base, bench.costs["base"].flops),
        _time("pruned", bench.pruned, bench.costs["pruned"].flops),
    ]
    parts += [
        tag("h3", "Times"),
        table(["", "ms: median [p20, p80]", "GFLOPs"], rows, "Forward of one picture", sortable=False),
    ]
    parts.append(_timed(bench.speedup, bench.bound, bench.conditions))
    parts += _plan(f"saint demo {shlex.quote(spec)}", plan)
    return tag("div", tag("h2", title), *parts)


def answer_page(
    *,
    spec: str,
    question: str,
    plan: Plan,
    tiles: Sequence[Tile],
    total: int,
    steps: list[dict[str, Any]],
    answers: Sequence[str],
    bench: GenerationBench,
) -> Markup:
    """Of one picture, one question and one vision-language model."""
    gain = bench.gains["pruned"]
    agree = "the same answer" if answers[0] == answers[1] else "another answer"
    parts = [_lead(steps, agree, gain.first, total)]
    both = zip(("unpruned", "pruned"), answers, strict=True)
    quotes = [tag("div", tag("h3", name), tag("blockquote", text or "(no text)")) for name, text in both]
    parts += [tag("p", f"“{question}”", class_="asked"), tag("div", *quotes, class_="pair")]
    facts = {
        "name": "the picture as the model sees it",
        "visual_tokens": total,
        "tiles": [tile.grid for tile in tiles],
        "layers": steps,
    }
    facts["pictures"] = [data_uri(tile.picture, _SIDE, 90_000) for tile in tiles]
    drawn = [
        figure(name, uri, grid, shown, f"ui-{i}", _SIDE)
        for i, (name, uri, grid, shown) in enumerate(pictures_of(facts, None))
    ]
    parts += [tag("h3", "What stays"), tag("div", *drawn, _tokens(steps), class_="gallery")]
    rows = []
    for name, times in bench.times.items():
        row = _time("unpruned" if name == "base" else name, times.first, times.prefill.flops)
        rows.append([*row, times.kv_bytes / 2**20])
    head = ["", "first token, ms: median [p20, p80]", "prefill GFLOPs", "KV MiB"]
    parts += [tag("h3", "Times"), table(head, rows, "First token of one question", sortable=False)]
    parts.append(_timed(gain.first, gain.bound, bench.conditions))
    parts += _plan(f"saint chat {shlex.quote(spec)} --image FILE --prompt {shlex.quote(question)}", plan)
    return tag("div", tag("h2", spec), *parts)


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


def _outputs(
    found: Agreement,
    outputs: tuple[Any, Any],
    classes: Sequence[str] | None,
    known: Mapping[str, torch.Tensor],
    picture: Image.Image | None,
) -> Markup:
    values = [answer(output)[1][0].detach().float().cpu() for output in outputs]
    same = tag(
        "p",
        f"{found.measure.capitalize()} of the pruned and the unpruned {found.answer}: {number(found.values[0], 6)}.",
    )
    if values[0].ndim == 3:  # a map [1, H, W]
        side = picture.size if picture is not None else (_SIDE, _SIDE)
        maps = [
            tag(
                "figure",
                tag("img", src=data_uri(heatmap(v[0], side), _SIDE, 60_000), alt=f"{name} map"),
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


def _time(name: str, spread: Spread, flops: float) -> list[Any]:
    return [name, Cell(_spread(spread), spread.median), flops / 1e9]


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
