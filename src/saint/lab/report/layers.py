"""Section of `saint analyze`: what happens in each layer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Boundary, Line, heat_map, line_chart
from .kept import gallery
from .markup import Markup, details, join, number, table, tag
from .reading import Record
from .section import Section, charts, conditions, plan_box, skipped

_STAGES = {"vision": "vision encoder", "language": "language model"}


def analyze_section(record: Record, prefix: str, side: int) -> Section:
    """`saint analyze`."""
    data = record.data
    parts = data["parts"]
    verdict = " ".join(f"{_title(part)}: {_verdict(part['stages'])}." for part in parts) or "No layer was analysed."
    body: list[Markup | None] = [_part(part) for part in parts]
    body.append(gallery(record, prefix, side))
    if data.get("plan") is not None:
        body += [tag("h3", "Proposed plan"), plan_box(data["plan"], data.get("plan_line"))]
    body.append(skipped(record))
    if data.get("settings"):
        body.append(details("all settings", tag("pre", json.dumps(data["settings"], indent=1), tabindex="0")))
    read, questions = data["images"] or data["prompts"], data.get("questions")
    more = {
        "images" if data["images"] else "prompts": f"{read['count']} ({read['set']})"
        if read.get("set")
        else read["count"],
        "questions": questions["count"] if questions else None,
        "settings": _settings(data.get("settings") or {}),
    }
    asked = f"What do tokens do in each layer of {data['model']}, and where can they go?"
    return Section(f"Layers: {data['model']}", asked, verdict, conditions(record, **more), join(body))


def _title(part: Mapping[str, Any]) -> str:
    stage = str(part["stage"])
    return _STAGES.get(stage, stage).capitalize()


def _verdict(stages: Mapping[str, Any] | None) -> str:
    if stages is None:
        return "stages were not looked for"
    said = str(stages["verdict"])
    if not stages["shown"] and said == "not shown":
        reasons = "; ".join(map(str, stages.get("reasons") or []))
        return f"stages: not shown ({reasons})" if reasons else "stages: not shown"
    return said


def _part(part: Mapping[str, Any]) -> Markup:
    stages = part.get("stages") or {}
    edges = (
        [Boundary(b["layer"], b["low"], b["high"]) for b in stages.get("boundaries") or []]
        if stages.get("shown")
        else []
    )
    figures: list[Markup] = []
    for quantity in part["quantities"]:
        line = Line(str(quantity["title"]), quantity["mean"], quantity.get("low") or (), quantity.get("high") or ())
        note = f"mean of {quantity['n']}, band: 95 % interval" if quantity.get("low") else f"mean of {quantity['n']}"
        figures.append(
            line_chart(
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
            Line(f"threshold {threshold:g}", mean, low, high)
            for threshold, mean, low, high in zip(drop["thresholds"], drop["mean"], lows, highs, strict=True)
        ]
        figures.append(line_chart("Share of tokens that could be dropped", lines, y="share", boundaries=edges))
    if (causal := part.get("causal")) is not None:
        lines = [
            Line(str(name), c["mean"], c.get("low") or (), c.get("high") or ()) for name, c in causal["methods"].items()
        ]
        note = f"when {number(100 * causal['share'])} % of the tokens are dropped at this layer alone"
        figures.append(line_chart("Change of the answer", lines, y=_measured(causal), boundaries=edges, note=note))
    if (cka := part.get("cka")) is not None:
        figures.append(heat_map("Similarity of layers (CKA)", cka["mean"], unit="linear CKA"))
    tokens = part.get("tokens") or {}
    about = f"{part['layers']} layers"
    if tokens:
        about += f", {number(tokens['candidates'], 1)} tokens that may go"
        about += f", {number(tokens['protected'])} protected" if tokens.get("protected") is not None else ""
    return join(
        [
            tag("h3", _title(part)),
            tag("p", tag("b", _capital(_verdict(part.get("stages")))), f". {about}."),
            _stages(stages),
            charts(*figures),
        ]
    )


def _measured(causal: Mapping[str, Any]) -> str:
    unit = causal.get("unit")
    return f"{causal['measure']}, {unit}" if unit and unit != "1" else str(causal["measure"])


def _stages(stages: Mapping[str, Any]) -> Markup | None:
    if not stages:
        return None
    rows = [[f"{s['first']} to {s['last']}", s["what"]] for s in stages.get("segments") or []]
    parts = (
        [
            table(
                ["layers", "what they do"],
                rows,
                "Stages" if stages["shown"] else "Best division, not shown to be real",
                sortable=False,
            )
        ]
        if rows
        else []
    )
    criteria = list(_flat(stages.get("criteria") or {}))
    if criteria:
        values = table(["criterion", "value"], criteria, "Criteria", sortable=False)
        used = tag("p", f"From: {', '.join(map(str, stages.get('used') or []))}.")
        parts.append(details("how this was decided", values, used))
    return join(parts)


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
