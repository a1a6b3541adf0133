"""docs/analysis.md and its pictures, from the records of `analyze.py`."""

import math
from pathlib import Path
from typing import Any

from analyze_claims import claims
from PIL import Image, ImageDraw, ImageFont

from saint.files import write_whole
from saint.lab.view import save_png

TRAINED, RANDOM = (31, 90, 166), (190, 110, 30)
COLOURS = 64  # of a picture: a quarter of the bytes
SCALE = 2  # drawn larger and reduced: smooth lines
PANEL, MARGIN = (230, 150), (44, 26, 10, 24)  # width and height; left, top, right, bottom; pixels
LEGEND = 20  # height below the panels
PICTURES = ("key_similarity", "cls_entropy", "last_entropy", "token_entropy", "effective_rank", "residual_update")
LOSSES = {"tome": "ToMe", "tome_plain": "ToMe, beta 0"}
TITLES = {
    "demo:clip-b16": "CLIP ViT-B/16",
    "demo:dinov2-s": "DINOv2 ViT-S/14",
    "demo:small-llava": "small LLaVA",
    "demo:smollm2-135m": "SmolLM2-135M",
}


def write_pages(records: list[dict[str, Any]], again: list[dict[str, Any]], docs: Path) -> None:
    """One page, one picture per stack of layers; of each model the record with trained weights and its control."""
    shown = {
        weights: [
            part["stages"]["shown"] for record in records if record["weights"] == weights for part in record["parts"]
        ]
        for weights in ("trained", "random")
    }
    lines = [
        HEAD.format(
            images=next(record["images"]["count"] for record in records if record["images"]),
            prompts="".join({PROMPTS.format(**record["prompts"]) for record in records if not record["images"]}),
            shown=sum(shown["trained"]), stacks=len(shown["trained"]), control=sum(shown["random"]),
        )
    ]  # fmt: skip
    trained = [record for record in records if record["weights"] == "trained"]
    lines += [
        claims([(_where(r, part), {**part, "things": _things(r)}) for r in trained for part in r["parts"]], again)
    ]
    for name in dict.fromkeys(record["model"] for record in records):
        both = {record["weights"]: record for record in records if record["model"] == name}
        if set(both) != {"trained", "random"}:
            raise ValueError(f"{name} needs a record with trained and one with random weights, got {sorted(both)}")
        for trained, control in zip(both["trained"]["parts"], both["random"]["parts"], strict=True):
            where = _where(both["trained"], trained)
            file = f"analysis-{name.removeprefix('demo:')}-{trained['stage']}.png"
            save_png(figure(trained, control).quantize(COLOURS, dither=Image.Dither.NONE), docs / "images" / file)
            lines += [f"## {where}\n", f"![{where}: trained and random weights](images/{file})\n"]
            lines += [table(trained, _things(both["trained"])), ""]
            lines += [verdict("Trained", trained), verdict("Random", control), ""]
        plan = both["trained"]["plan_line"]
        lines += [f"Proposed plan: `{plan}`\n" if plan else "No plan proposed.\n"]
    write_whole(docs / "analysis.md", ("\n".join(lines).rstrip() + "\n").encode())


HEAD = """# What tokens do, layer by layer

The models of the demo under `saint analyze`, on {images} photographs, and a twin of each with random weights as control. Means
over images; bands in the pictures are 95 % bootstrap intervals over images. The small LLaVA has learned generated scenes, and was
asked the same question about every photograph. {prompts}
`make analysis PHOTOS=DIR` measures again and rewrites this page; records are in `evidence/results/analyze-*.json`. What the
numbers are: docstrings of `saint.lab.analysis`; how stages are decided: that of `stages.py`.

Stages are shown in {shown} of the {stacks} stacks of layers with trained weights, and in {control} of those with random ones.
"""

PROMPTS = """SmolLM2-135M-Instruct is a language model without images, and read {count}
passages of {tokens} tokens of Python's documentation (`{set}`): there tokens are those of the prompt but
its first and last, and means are over passages."""


def _things(record: dict[str, Any]) -> str:
    """What was counted."""
    return "photographs" if record["images"] else "passages"


def _where(record: dict[str, Any], part: dict[str, Any]) -> str:
    """The title of a stack of layers."""
    tower = ", tower" if len(record["parts"]) > 1 else ""
    named = ", language model" if record["images"] and part["stage"] == "language" else tower
    return TITLES[record["model"]] + named


def verdict(weights: str, part: dict[str, Any]) -> str:
    """A line."""
    stages = part["stages"]
    why = "" if stages["shown"] else f" ({'; '.join(stages['reasons'])})"
    segments = "; ".join(f"layers {s['first']} to {s['last']}: {s['what']}" for s in stages["segments"])
    return f"- {weights} weights, stages: **{stages['verdict']}**{why}. {segments}".rstrip()


def table(part: dict[str, Any], things: str) -> str:
    """Means per layer."""
    values = {quantity["name"]: quantity for quantity in part["quantities"]}
    columns = [
        ("similarity", values.get("key_similarity"), 2),
        ("H CLS", values.get("cls_entropy"), 2),
        ("H last", values.get("last_entropy"), 2),
        ("H tokens", values.get("token_entropy"), 2),
        ("H received", values.get("received_entropy"), 2),
        ("visual to visual", values.get("visual_share"), 2),
        ("text to visual", values.get("text_share"), 2),
        ("rank", values.get("effective_rank"), 0),
        ("update", values.get("residual_update"), 2),
        ("CKA in/out", values.get("cka_adjacent"), 2),
        ("high norms", values.get("outliers"), 3),
        ("would drop at 0.75", {"mean": part["droppable"]["mean"][part["droppable"]["thresholds"].index(0.75)]}, 2),
        *((f"loss, {LOSSES.get(name, name)}", found, 4) for name, found in part["causal"]["methods"].items()),
    ]
    columns = [column for column in columns if column[1] is not None]
    rows = ["| layer | " + " | ".join(name for name, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for layer in range(part["layers"]):
        cells = [_text(found["mean"][layer], digits) for _, found, digits in columns]
        rows.append(f"| {layer} | " + " | ".join(cells) + " |")
    causal = part["causal"]
    note = (
        f"Entropies in nat. Loss: {causal['measure']} when {causal['share']:.0%} of the tokens leave at that layer alone; "
        f"{causal['methods']['saint']['n']} {things}."
    )
    return "\n".join([*rows, "", note])


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# -- pictures -----------------------------------------------------------------------------------------------------------


def figure(trained: dict[str, Any], control: dict[str, Any]) -> Image.Image:
    """Panels in two rows: quantities of both weights, and the causal column."""
    names = [q["name"] for q in trained["quantities"] if q["name"] in PICTURES][:5]
    panels = []
    for name in names:
        found = [next(q for q in part["quantities"] if q["name"] == name) for part in (trained, control)]
        unit = found[0]["unit"]
        title = found[0]["title"].replace("entropy of the attention of", "entropy:")
        panels.append((f"{title} ({unit})", found))
    causal = [{**part["causal"]["methods"]["saint"]} for part in (trained, control)]
    panels.append((f"loss, SAINT: {trained['causal']['measure']}", causal))
    columns = 3
    width, height = PANEL
    below = math.ceil(len(panels) / columns) * height * SCALE
    sheet = Image.new("RGB", (columns * width * SCALE, below + LEGEND * SCALE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10 * SCALE)
    for place, (name, colour) in enumerate((("trained weights", TRAINED), ("random weights", RANDOM))):
        x = (MARGIN[0] + place * 140) * SCALE
        draw.line([(x, below + 8 * SCALE), (x + 24 * SCALE, below + 8 * SCALE)], fill=colour, width=2 * SCALE)
        draw.text((x + 30 * SCALE, below + 8 * SCALE), name, fill="black", font=font, anchor="lm")
    for place, (title, curves) in enumerate(panels):
        corner = (place % columns * width * SCALE, place // columns * height * SCALE)
        sheet.paste(panel(title, curves), corner)
    return sheet.resize((sheet.width // SCALE, sheet.height // SCALE), Image.Resampling.LANCZOS)


def panel(title: str, curves: list[dict[str, Any]]) -> Image.Image:
    """Curves with bands over layers; the first trained, the second random."""
    width, height = (side * SCALE for side in PANEL)
    left, top, right, bottom = (side * SCALE for side in MARGIN)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(10 * SCALE)
    values = [v for curve in curves for key in ("low", "high", "mean") for v in curve[key] if v is not None]
    least, most = min(values), max(values)
    most = most if most > least else least + 1
    layers = len(curves[0]["mean"])

    def at(layer: int, value: float) -> tuple[float, float]:
        x = left + layer * (width - left - right) / max(1, layers - 1)
        return x, top + (most - value) * (height - top - bottom) / (most - least)

    for value in (least, (least + most) / 2, most):
        y = at(0, value)[1]
        draw.line([(left, y), (width - right, y)], fill=(225, 225, 225), width=SCALE)
        draw.text((left - 4 * SCALE, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
    for layer in (0, layers // 2, layers - 1):
        draw.text((at(layer, least)[0], height - bottom + 4 * SCALE), str(layer), fill="black", font=font, anchor="mt")
    for curve, colour in zip(curves, (TRAINED, RANDOM), strict=True):
        there = [i for i in range(layers) if curve["mean"][i] is not None]
        if all(curve["low"][i] is not None for i in there):
            band = [at(i, curve["high"][i]) for i in there] + [at(i, curve["low"][i]) for i in reversed(there)]
            draw.polygon(band, fill=(*colour, 60))
        draw.line([at(i, curve["mean"][i]) for i in there], fill=colour, width=2 * SCALE)
    draw.text((8 * SCALE, 4 * SCALE), title, fill="black", font=font)
    return image
