"""Section of `saint analyze`: what happens in each layer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import (
    Block,
    Boundary,
    Charts,
    Code,
    Curves,
    Group,
    Heading,
    Line,
    Matrix,
    More,
    PlanBox,
    Sheet,
    Table,
    Text,
)
from .kept import gallery
from .reading import Record
from .told import conditions, skipped
from .words import number

# narrow columns of a terminal: quantity -> heading, digits; what has none is on the page
_COLUMNS = {
    "key_similarity": ("sim", 2),
    "key_similarity_centred": ("simc", 2),
    "cls_entropy": ("Hcls", 2),
    "last_entropy": ("Hlast", 2),
    "token_entropy": ("Htok", 2),
    "received_entropy": ("Hrec", 2),
    "visual_share": ("v>v", 2),
    "text_share": ("t>v", 2),
    "effective_rank": ("rank", 0),
    "residual_update": ("upd", 2),
    "cka_adjacent": ("CKA", 2),
    "outliers": ("high", 2),
}
_LEGEND = (
    "sim, simc: cosine of keys, of centred keys; Hcls, Hlast, Htok, Hrec: entropy of the attention of CLS, the last token, "
    "{tokens}, and of received attention (nat); {shares}upd: update; CKA: of input and output; high: share of high norms; "
    "drop: share of sources that SAINT would drop at {threshold:g}{causal}"
)

_STAGES = {"vision": "vision encoder", "language": "language model"}


def analyze_sheet(record: Record) -> Sheet:
    """`saint analyze`."""
    data = record.data
    parts = data["parts"]
    verdict = " ".join(f"{_title(part)}: {_lead(part)}." for part in parts) or "No layer was analysed."
    blocks: list[Block | None] = []
    if data.get("plan") is not None:
        blocks += [Heading("Proposed plan"), PlanBox(data["plan"], data.get("plan_line"), file="plan.json")]
    blocks += [_part(part, data["candidates"]) for part in parts]
    blocks += [gallery(record), skipped(record)]
    if data.get("settings"):
        blocks.append(More("all settings", [Code(json.dumps(data["settings"], indent=1))]))
    read, questions = data["images"] or data["prompts"], data.get("questions")
    more = {
        "images" if data["images"] else "prompts": f"{read['count']} ({read['set']})"
        if read.get("set")
        else read["count"],
        "questions": questions["count"] if questions else None,
        "settings": _settings(data.get("settings") or {}),
    }
    asked = f"What do tokens do in each layer of {data['model']}, and where can they go?"
    return Sheet(f"Layers: {data['model']}", asked, verdict, conditions(record, **more), blocks)


def _title(part: Mapping[str, Any]) -> str:
    stage = str(part["stage"])
    return _STAGES.get(stage, stage).capitalize()


def _lead(part: Mapping[str, Any]) -> str:
    """Say of a part what a reader can do with it: how many tokens could be dropped, and whether its layers differ in kind."""
    said = []
    drop = part.get("droppable")
    row = None if drop is None else drop["mean"][list(drop["thresholds"]).index(_middle(drop))]
    if (
        drop is not None
        and row is not None
        and (known := [(share, i) for i, share in enumerate(row) if share is not None])
    ):
        (most, best), (least, worst) = max(known), min(known)
        ends = (
            "no token"
            if not most
            else f"{number(100 * most, 1)} % of the tokens at layer {best}, {number(100 * least, 1)} % at layer {worst}"
        )
        said.append(f"at a similarity of {_middle(drop):g} it could drop {ends}")
    stages = part["stages"]
    said.append(_verdict(stages) if stages is None or stages["shown"] else "no stages of layers show")
    return "; ".join(said)


def _verdict(stages: Mapping[str, Any] | None) -> str:
    if stages is None:
        return "stages were not looked for"
    said = str(stages["verdict"])
    if not stages["shown"] and said == "not shown":
        reasons = "; ".join(map(str, stages.get("reasons") or []))
        return f"stages: not shown ({reasons})" if reasons else "stages: not shown"
    return said


def _part(part: Mapping[str, Any], candidates: str) -> Group:
    stages = part.get("stages") or {}
    edges = (
        [Boundary(b["layer"], b["low"], b["high"]) for b in stages.get("boundaries") or []]
        if stages.get("shown")
        else []
    )
    figures: list[Curves | Matrix] = []
    for quantity in part["quantities"]:
        short, digits = _COLUMNS.get(quantity["name"], ("", 3))
        line = Line(
            str(quantity["title"]), quantity["mean"], quantity.get("low") or (), quantity.get("high") or (),
            short=short, digits=digits,
        )  # fmt: skip
        note = f"mean of {quantity['n']}, band: 95 % interval" if quantity.get("low") else f"mean of {quantity['n']}"
        figures.append(
            Curves(
                _capital(str(quantity["title"])),
                [line],
                y="" if quantity["unit"] in ("1", None) else str(quantity["unit"]),
                boundaries=edges,
                note=note,
            )
        )
    if (drop := part.get("droppable")) is not None:
        lows, highs = drop.get("low") or [()] * len(drop["mean"]), drop.get("high") or [()] * len(drop["mean"])
        lines = [
            Line(f"threshold {threshold:g}", mean, low, high, short="drop" * (threshold == _middle(drop)), digits=2)
            for threshold, mean, low, high in zip(drop["thresholds"], drop["mean"], lows, highs, strict=True)
        ]
        title = "Share of tokens that could be dropped"
        figures.append(Curves(title, lines, y="share", boundaries=edges, zero=True))
    if (causal := part.get("causal")) is not None:
        lines = [
            Line(str(name), c["mean"], c.get("low") or (), c.get("high") or (), short=f"-{name}")
            for name, c in causal["methods"].items()
        ]
        note = f"when {number(100 * causal['share'])} % of the tokens are dropped at this layer alone"
        figures.append(Curves("Change of the answer", lines, y=_measured(causal), boundaries=edges, note=note))
    if (cka := part.get("cka")) is not None:
        figures.append(Matrix("Similarity of layers (CKA)", cka["mean"], unit="linear CKA"))
    tokens = part.get("tokens") or {}
    about = f"{part['layers']} layers"
    if tokens:
        about += f", {number(tokens['candidates'], 1)} tokens that may be dropped"
        about += f", {number(tokens['protected'])} protected" if tokens.get("protected") is not None else ""
    return Group(
        [
            Heading(_title(part)),
            Text(f". {about}.", lead=_capital(_verdict(part.get("stages")))),
            *_stages(stages),
            *(Text(f"No {what}: {why}.", warning=True) for what, why in part["missing"]),
            Charts(figures, _legend(part, candidates)),
        ]
    )


def _middle(drop: Mapping[str, Any]) -> float:
    """The threshold that stands in the column."""
    thresholds = drop["thresholds"]
    return float(0.75 if 0.75 in thresholds else thresholds[len(thresholds) // 2])


def _legend(part: Mapping[str, Any], candidates: str) -> str:
    shares = "" if candidates == "prompt tokens" else "v>v, t>v: attention of visual and text tokens on visual ones; "
    said = ""
    if (causal := part.get("causal")) is not None:
        names = ", ".join(f"-{method}" for method in causal["methods"])
        share = f"{causal['share']:.0%} of the tokens are dropped at that layer alone"
        said = f"; {names}: {_measured(causal)}, when {share}, by that choice"
    return _LEGEND.format(tokens=candidates, shares=shares, threshold=_middle(part["droppable"]), causal=said)


def _measured(causal: Mapping[str, Any]) -> str:
    unit = causal.get("unit")
    return f"{causal['measure']}, {unit}" if unit and unit != "1" else str(causal["measure"])


def _stages(stages: Mapping[str, Any]) -> list[Block]:
    if not stages:
        return []
    rows = [[f"{s['first']} to {s['last']}", s["what"]] for s in stages.get("segments") or []]
    caption = "Stages" if stages["shown"] else "Best division, not shown to be real"
    parts: list[Block] = [Table(["layers", "what they do"], rows, caption, sortable=False)] if rows else []
    criteria = list(_flat(stages.get("criteria") or {}))
    if criteria:
        values = Table(["criterion", "value"], criteria, "Criteria", sortable=False)
        used = Text(f"From: {', '.join(map(str, stages.get('used') or []))}.")
        parts.append(More("how this was decided", [values, used]))
    return parts


def _flat(values: Mapping[str, Any], before: str = "") -> Sequence[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}, ")
        else:
            rows.append(
                (f"{before}{name}", "-" if value is None else value if isinstance(value, (int, float)) else str(value))
            )
    return rows


def _settings(settings: Mapping[str, Any]) -> str | None:
    plain = {name: v for name, v in settings.items() if not isinstance(v, Mapping)}
    shown = (f"{name} {', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in plain.items())
    return "; ".join(shown) or None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
