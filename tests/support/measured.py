"""Plans of the committed measurements and all recipes, on narrow random models with the measured layers and tokens."""

import functools
import hashlib
import json
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from timm.models import create_model
from torch import nn

import saint
from saint.plans import Plan
from saint.upstream.tiny import IMAGE, make, text_config

ROOT = Path(__file__).parents[2]
RELATIVE = 5e-5
# what a plan is run on, by what the file of its measurement is called; else an encoder
SMALL = (
    "small-llava",
    "keep-small-llava",
    "easy",
    "vlm",
    "modes",
    "levers-answers",
    "analyze-small-llava",
    "analyze-smollm2",
)
ABLATED = {"saint_merged", "tome_dropped"}  # methods of evidence/ablations.py, not of the package
LARGE = ("llava-1.5", "headline-shapes-cpu.llava", "headline-static-cpu.llava")
DEEP = "headline-shapes-cpu.vit-h"  # an encoder of 32 layers, not 12


def measured() -> dict[str, Plan]:
    """Every plan once, by recipe or by file and place."""
    plans = {name: saint.plan(name) for name in saint.recipes()}
    for folder in ("evidence", "benchmarks"):
        for file in sorted((ROOT / folder / "results").glob("*.json")):
            for place, plan in _plans_in(json.loads(file.read_text(encoding="utf-8"))):
                if not ABLATED & {stage["method"]["method"] for slot in _slots(plan) for stage in slot}:
                    plans[file.stem + place] = Plan.from_dict(plan)
    first: dict[str, str] = {}
    for name, plan in plans.items():
        first.setdefault(json.dumps(plan.to_dict(), sort_keys=True) + subject(name), name)
    return {name: plans[name] for name in first.values()}


def _plans_in(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "version" in value and {"vision", "connector", "language"} & set(value) and "model" not in value:
            yield place, value
            return
        for name, entry in value.items():
            yield from _plans_in(entry, f"{place}.{name}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _plans_in(entry, f"{place}[{number}]")


def _slots(plan: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The stages of each slot; files of older measurements hold one without a list."""
    slots = [plan[name] for name in ("vision", "connector", "language") if plan.get(name)]
    return [slot if isinstance(slot, list) else [slot] for slot in slots]


def kind(name: str) -> str:
    """Which kind of model a plan is run on."""
    return "small-llava" if name.startswith(SMALL) else "llava" if name.startswith(LARGE) else "encoder"


def subject(name: str) -> str:
    """Which model a plan is run on."""
    return "deep encoder" if name.startswith(DEEP) else kind(name)


@functools.cache
def model(which: str) -> nn.Module:
    """A narrow model: 12 or 32 layers on 196 patches; 12 in front of 30 layers; or 24 on 576 patches in front of 32."""
    if which in ("encoder", "deep encoder"):
        torch.manual_seed(0)
        depth = 12 if which == "encoder" else 32
        made = create_model("vit_base_patch16_224", embed_dim=32, depth=depth, num_heads=2, num_classes=8).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.25 if "qkv" in name else 0.08)
        return made
    layers, side, patch, depth = (12, 224, 16, 30) if which == "small-llava" else (24, 336, 14, 32)
    tower = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2, image_size=side,
        patch_size=patch,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=tower,
        text_config=hf.LlamaConfig(**text_config(num_hidden_layers=depth)),
        image_token_id=IMAGE,
        image_seq_length=(side // patch) ** 2,
    )
    return make(hf.LlavaForConditionalGeneration, config)


def inputs(which: str, seed: int) -> dict[str, torch.Tensor]:
    """A picture of blots (two for an encoder), and a prompt around it."""
    if which in ("encoder", "deep encoder"):
        return {"x": torch.stack([_blots(seed, 224), _blots(seed + 1000, 224)])}
    side, tokens = (224, 196) if which == "small-llava" else (336, 576)
    ids = torch.tensor([[5, 17, 30, *[IMAGE] * tokens, 8, 41, 62, 9]])
    return {"pixel_values": _blots(seed, side)[None], "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _blots(seed: int, side: int) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    picture = sum(
        np.asarray(
            Image.fromarray(draw.integers(0, 256, (n, n, 3)).astype(np.uint8)).resize(
                (side, side), Image.Resampling.NEAREST
            ),
            dtype=np.float32,
        )
        for n in (3, 7, 28)
    )
    return torch.from_numpy(picture / 160 - 2.4).permute(2, 0, 1).contiguous()


def outcome(name: str, plan: Plan, seed: int) -> tuple[dict[str, str], torch.Tensor]:
    """What each drop point kept, by a checksum of the indices, and the output."""
    which = subject(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(model(which), plan, inputs(which, seed))
    finally:
        torch.set_num_threads(threads)


def run(model: nn.Module, plan: Plan, given: dict[str, torch.Tensor]) -> tuple[dict[str, str], torch.Tensor]:
    """See :func:`outcome`."""
    with torch.inference_mode(), saint.pruned(model, plan) as session:
        full = which_is_read(plan, given)
        out = model.forward_features(given["x"]) if full else model(**given)
        trace, summary = session.trace, session.summary()
    kept = {}
    for step in trace:
        indices = [row.tolist() for row in (*step.kept, *(step.into or ()))]
        said = (
            f"{step.tokens_in.tolist()} to {step.tokens_out.tolist()}, crc {zlib.crc32(json.dumps(indices).encode())}"
        )
        kept[f"{step.stage} {step.layer} {step.placement}"] = said
    tokens = {stage: round(sum(layers), 3) for stage, layers in summary.layers.items()}
    kept["summary"] = f"FLOPs left {summary.flops_left and round(summary.flops_left, 6)}, tokens of all layers {tokens}"
    return kept, out if isinstance(out, torch.Tensor) else out.logits[:, -1]


def which_is_read(plan: Plan, given: dict[str, torch.Tensor]) -> bool:
    """Patch tokens are read where a plan gives dropped ones a value: the class token alone would not show it."""
    return "x" in given and any(stage.output != "survivors" for stage in plan.vision)


def steady(name: str, plan: Plan) -> int:
    """A seed of inputs on which no choice lies so close to an edge that another machine's rounding turns it over."""
    which = subject(name)
    for seed in range(20):
        kept, _ = outcome(name, plan, seed)
        for draw in range(2):
            torch.manual_seed(draw)
            given = {
                key: value * (1 + 1e-5 * torch.randn_like(value)) if value.is_floating_point() else value
                for key, value in inputs(which, seed).items()
            }
            if run(model(which), plan, given)[0] != kept:
                break
        else:
            return seed
    raise ValueError(f"{name}: every input has a choice on an edge")


def figures(output: torch.Tensor) -> dict[str, Any]:
    """A few numbers of an output, and its bytes in short."""
    flat = output.float().flatten()
    places = torch.linspace(0, len(flat) - 1, 6).long()
    told = [flat.mean(), flat.std(), *flat[places]]
    return {
        "figures": [float(f"{float(value):.8g}") for value in told],
        "sha256": hashlib.sha256(flat.contiguous().numpy().tobytes()).hexdigest()[:16],
    }


def machine() -> str:
    """What the bytes of an output depend on."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        # several processors share a name in a virtual machine; libraries choose their loops by what they can do
        facts = dict(line.replace("\t", "").split(": ", 1) for line in info.read_text().splitlines() if ": " in line)
        flags = zlib.crc32(facts.get("flags", "").encode())
        cpu = f"{facts.get('model name', cpu)} {facts.get('model', '')} {facts.get('stepping', '')} {flags:08x}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, transformers {hf.__version__}, {capability}, {cpu}"


def unlike(want: dict[str, Any], got: dict[str, Any], same_machine: bool) -> list[str]:
    """Where an outcome differs from the recorded one."""
    lines = [
        f".kept.{step}: {want['kept'].get(step)!r} there, {got['kept'].get(step)!r} now"
        for step in {**want["kept"], **got["kept"]}
        if want["kept"].get(step) != got["kept"].get(step)
    ]
    spread = want["figures"][1]  # an entry near zero is as exact as the others
    lines += [
        f".figures[{place}]: {a!r} there, {b!r} now"
        for place, (a, b) in enumerate(zip(want["figures"], got["figures"], strict=True))
        if not abs(a - b) <= RELATIVE * max(abs(a), spread)
    ]
    if same_machine and want["sha256"] != got["sha256"]:
        lines.append(f".sha256: {want['sha256']} there, {got['sha256']} now, on the same kind of machine")
    return lines
