"""Answers as sheets, in the same words and pictures as `saint report`."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import presets
from ...plans import Plan
from ..bench.timing import Line as Timed
from ..bench.timing import Spread, disturbances
from ..describe import as_python
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
    Highlight,
    Line,
    More,
    Picture,
    PlanBox,
    Quotes,
    Sheet,
    Table,
    Text,
)
from ..report.kept import pictures_of
from ..report.reading import behind, place, point
from ..report.words import interval, number
from ..view import heatmap

SIDE = 448  # pixels of a picture at most
_TOPS = 5
_LONG = 140  # letters of a plan from which a line uses a file of it
_FILE = "plan.json"


@dataclass(frozen=True)
class Run:
    """What one plan made of the picture.

    Attributes:
        name: of the plan, for people.
        plan: under which it ran.
        facts: what was kept, as `saint view` writes it of a photograph.
        short: what the pruned model answers.
        bench: of the picture.
        keep: share of the work that the plan was made for; None of another plan.
    """

    name: str
    plan: Plan
    facts: Mapping[str, Any]
    short: Answered
    bench: Any
    keep: float | None = None


@dataclass(frozen=True)
class Shown:
    """What one picture made of a model.

    Attributes:
        spec: what the user types for it.
        title: of the model.
        question: that was asked; "" of a model that is asked nothing.
        grid: of every picture; None where each has its own.
        base: what the unpruned model answers.
        runs: of the plan, and perhaps of one that it is compared with.
        classes: names of a classifier's outputs, where they are known.
        known: embeddings [C] of other pictures by name, where the model gives embeddings.
    """

    spec: str
    title: str
    question: str
    grid: Sequence[int] | None
    base: Answered
    runs: Sequence[Run]
    classes: Sequence[str] | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)


def page(shown: Shown) -> Sheet:
    """Show what was kept beside the unpruned picture, both answers, the plan, and, on demand, times and drop points."""
    run, several = shown.runs[0], len(shown.runs) > 1
    blocks: list[Block | None] = [
        _compared(shown) if several else None,
        Gallery([*_unpruned(run, shown.grid), *(figure for one in shown.runs for figure in _figures(one, shown.grid))]),
        *_answers(shown),
        Heading("Plan"),
        _box(run, shown),
        More(
            "times, and tokens at each drop point", [block for one in shown.runs for block in _measured(one, several)]
        ),
    ]
    return Sheet(shown.title, "", _lead(run, shown), [], blocks, _highlights(run, shown))


def _kept(run: Run) -> tuple[int, int]:
    """Tokens behind the last drop point, and unpruned; both are 0 where nothing is dropped."""
    steps, total = run.facts["layers"], run.facts.get("visual_tokens")
    if not steps:
        return 0, 0
    kept = sum(s["tokens_out"] for s in steps if point(s) == point(steps[-1]))
    return kept, steps[0]["tokens_in"] if total is None else total


def _found(run: Run, shown: Shown) -> Agreement | None:
    """Compare the outputs; None of a model that writes."""
    return agreement(shown.base.output, run.short.output) if shown.base.text is None else None


def _busy(run: Run) -> str:
    """Say why its times may not mean much; "" where nothing disturbed them."""
    return " ".join(disturbances(run.bench.conditions["load_average"], run.bench.spreads))


def _lead(run: Run, shown: Shown) -> str:
    kept, total = _kept(run)
    tokens = f"{kept} of {total} tokens are kept to the end ({kept / total:.0%})" if total else "every token is kept"
    work = f"{100 / run.bench.flops_bound:.0f} % of the FLOPs are used"
    found = _found(run, shown)
    if found is None:
        same = "the answer is the same" if run.short.text == shown.base.text else "the answer changes"
    elif shown.classes is not None:
        tops = [int(answer(output)[1][0].argmax()) for output in (shown.base.output, run.short.output)]
        same = "the top class is the same" if tops[0] == tops[1] else "the top class is another"
    else:
        same = f"the output agrees with the unpruned one to {number(found.values[0], 3)} ({found.measure})"
    return f"{_capital(run.name)}: on this picture {tokens}, {work}, and {same}."


def _highlights(run: Run, shown: Shown) -> list[Highlight]:
    kept, total = _kept(run)
    found = _found(run, shown)
    busy = "this machine is busy: times may mislead" if _busy(run) else ""
    measured = f"by FLOPs; measured on this machine {_spread(run.bench.gain)}x"
    share, tokens = (
        (f"{kept / total:.0%}", f"{kept} of {total} tokens, behind the last layer that drops")
        if total
        else ("100%", "every token")
    )
    if found is None:
        value, what = ("same", "as") if run.short.text == shown.base.text else ("changed", "not")
        same = Highlight("answer", value, f"{what} the unpruned model's")
    else:
        same = Highlight(
            "agreement", number(found.values[0], 3), f"{found.measure} with the unpruned output; 1 is the same"
        )
    return [
        Highlight("kept", share, tokens),
        Highlight("faster", f"{number(run.bench.flops_bound, 2)}x", measured, busy),
        same,
    ]


def _compared(shown: Shown) -> Table:
    """A row for each plan."""
    rows = []
    for run in shown.runs:
        kept, total = _kept(run)
        found = _found(run, shown)
        same = "same answer" if run.short.text == shown.base.text else "another answer"
        rows.append([
            run.name,
            f"{kept} of {total}" if total else "all",
            Cell(f"{number(run.bench.flops_bound, 2)}x", run.bench.flops_bound),
            Cell(f"{_spread(run.bench.gain)}x", run.bench.gain.median),
            same if found is None else Cell(number(found.values[0], 4), found.values[0]),
        ])  # fmt: skip
    head = ["plan", "tokens kept", "faster by FLOPs", "measured here", "agreement with the unpruned output"]
    return Table(head, rows, "Two plans on this picture", sortable=False)


def _unpruned(run: Run, grid: Sequence[int] | None) -> Iterator[Picture]:
    """The picture as the model sees it, a tile each."""
    for number_, figure in enumerate(pictures_of(run.facts, grid), 1):
        own = figure.grid if figure.whole is None else figure.whole
        if figure.uri is not None:
            tile = f", tile {number_}" if number_ > 1 else ""
            caption = f"unpruned: all {int(own[0]) * int(own[1])} patches{tile}"
            yield Picture("the picture as the model sees it", caption, uri=figure.uri)


def _figures(run: Run, grid: Sequence[int] | None) -> list[Figure]:
    return list(pictures_of(run.facts, grid))


def _answers(shown: Shown) -> list[Block]:
    """Show what the model says unpruned and pruned."""
    named = [(run.name if len(shown.runs) > 1 else "pruned", run.short) for run in shown.runs]
    both = [("unpruned", shown.base), *named]
    if shown.base.text is not None:
        return [Quotes(shown.question, [(name, one.text or "(no text)") for name, one in both])]
    vectors = [(name, answer(one.output)[1][0].detach().float().cpu()) for name, one in both]
    found = _found(shown.runs[0], shown)
    assert found is not None, "a model that does not write has outputs"
    if vectors[0][1].ndim == 3:  # a map [1, H, W]
        high, wide = vectors[0][1].shape[-2:]
        side = (SIDE, round(SIDE * high / wide))
        maps = [Picture(f"{name} map", name, data_uri(heatmap(v[0], side), SIDE, 60_000)) for name, v in vectors]
        return [Heading("Outputs"), Gallery(maps, pair=True), Text("Dark is 0, light is 1.", aside=True)]
    if found.answer == "logits" or shown.classes is not None:
        tops = [Group([_tops(name, v, shown.classes)], box=True) for name, v in vectors]
        return [Heading("Outputs"), Gallery(tops, pair=True)]
    if not shown.known:
        return []
    near = [Group([_nearest(name, v, shown.known)], box=True) for name, v in vectors]
    return [More("which photographs the output is nearest to, unpruned and pruned", [Gallery(near, pair=True)])]


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


def _box(run: Run, shown: Shown) -> PlanBox:
    """The plan as a line of Python, a command and a file; lines name the file where the plan is too long for them."""
    plan = run.plan.to_dict()
    text, spelled = json.dumps(plan, separators=(",", ":")), as_python(run.plan)
    recipe = next((name for name in presets.recipes() if presets.recipe(name) == run.plan), None)
    python = f"saint.apply(model, {spelled})" if len(spelled) < _LONG else f'saint.apply(model, "{_FILE}")'
    if run.keep is not None:
        python = f"saint.apply(model, keep={run.keep:g})"
    elif recipe is not None:
        python = f'saint.apply(model, "{recipe}")'
    command = f"saint demo {shlex.quote(shown.spec)}"
    if shown.question:
        command = f"saint chat {shlex.quote(shown.spec)} --images FILE --prompt {shlex.quote(shown.question)}"
    given = recipe or (text if len(text) < _LONG else _FILE)
    return PlanBox(plan, python, f"{command} --plan {shlex.quote(given)}", run.name, _FILE)


def _measured(run: Run, several: bool) -> list[Block]:
    """Times, and tokens at each drop point."""
    bench, steps, busy = run.bench, run.facts["layers"], _busy(run)
    made: list[Block] = [Heading(run.name)] if several else []
    rows = [[*_time(line), *([] if line.kv_bytes is None else [line.kv_bytes / 2**20])] for line in bench.lines]
    made += [Text(f"{_capital(busy)}.", warning=True)] if busy else []
    made += [Table(["", *bench.heads], rows, bench.caption, sortable=False)]
    made += [_timed(bench.gain, bench.flops_bound, bench.conditions)]
    return [*made, *_tokens(steps)]


def _tokens(steps: Sequence[dict[str, Any]]) -> list[Block]:
    rows = []
    for step in steps:
        where = behind(step) if step.get("stage") != "connector" else ""
        name = ", ".join(part for part in (step.get("stage"), where) if part)
        rows.append([name, step["tokens_in"], step["tokens_out"]])
    made = Table(["drop point", "tokens in", "tokens kept"], rows, "Tokens", sortable=False)
    if len(steps) < 2 or len({step.get("stage") for step in steps}) > 1:
        return [made]
    line = Line("tokens kept", [s["tokens_out"] for s in steps], x=[place(s) for s in steps])
    whole = ("unpruned", float(steps[0]["tokens_in"]))
    return [Curves("Tokens kept", [line], y="tokens", zero=True, whole=whole), made]


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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
