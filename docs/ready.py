"""What `saint.plan_for` gives the models that people have, at their real shapes, without weights: the table of docs/ready.md.

Shapes are those of the published configurations; timm knows its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import transformers as hf
from torch import nn

import saint
from saint.lab.report.markdown import table
from saint.plans import Plan, Stage

KEEPS = (0.7, 0.5, 0.35)

_QWEN = {"vocab_size": 152064, "rms_norm_eps": 1e-6}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=0)


def _clip(**sizes: int) -> Callable[[], nn.Module]:
    return lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**sizes))


def _dinov2(**sizes: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Dinov2Model(hf.Dinov2Config(image_size=518, patch_size=14, **sizes))


def _llava(hidden: int, layers: int, heads: int, inner: int, following: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text = hf.LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
        )
        if following:
            return hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(text_config=text))
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text))

    return build


def _qwen2_5_vl(hidden: int, layers: int, heads: int, shared: int, inner: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = hf.Qwen2_5_VLConfig(
            text_config={
                **_QWEN,
                "hidden_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": shared,
                "intermediate_size": inner,
            },
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": hidden,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "window_size": 112,
            },
        )
        return hf.Qwen2_5_VLForConditionalGeneration(config)

    return build


def _qwen3_vl() -> nn.Module:
    config = hf.Qwen3VLConfig(
        text_config={
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    )
    return hf.Qwen3VLForConditionalGeneration(config)


def _internvl() -> nn.Module:
    text = hf.Qwen2Config(
        **_QWEN,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
    )
    vision = hf.InternVLVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=[448, 448]
    )
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(text_config=text, vision_config=vision))


def _gemma3() -> nn.Module:
    text = hf.Gemma3TextConfig(
        hidden_size=2560,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=10240,
    )
    vision = hf.SiglipVisionConfig(**_SO400M, image_size=896, patch_size=14)
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision))


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP ViT-B/16": _clip(patch_size=16),
    "CLIP ViT-L/14, 336 px": _clip(**_LARGE, intermediate_size=4096, patch_size=14, image_size=336),
    "SigLIP so400m/14, 384 px": lambda: hf.SiglipVisionModel(
        hf.SiglipVisionConfig(**_SO400M, image_size=384, patch_size=14)
    ),
    "DINOv2 ViT-S/14": _dinov2(hidden_size=384, num_attention_heads=6),
    "DINOv2 ViT-B/14": _dinov2(),
    "DINOv2 ViT-L/14": _dinov2(**_LARGE),
    "DINOv3 ViT-B/16 (timm)": _timm("vit_base_patch16_dinov3"),
    "LLaVA-1.5 7B": _llava(4096, 32, 32, 11008),
    "LLaVA-1.5 13B": _llava(5120, 40, 40, 13824),
    "LLaVA-NeXT 7B": _llava(4096, 32, 32, 11008, following=True),
    "Qwen2.5-VL 3B": _qwen2_5_vl(2048, 36, 16, 2, 11008),
    "Qwen2.5-VL 7B": _qwen2_5_vl(3584, 28, 28, 4, 18944),
    "Qwen3-VL 8B": _qwen3_vl,
    "InternVL3 8B": _internvl,
    "Gemma 3 4B": _gemma3,
}


def ready_table() -> str:
    """A row per model and share."""
    return table(["model", "`keep`", "what stays, and where the rest leaves", "output"], list(_rows()))


def _rows() -> Iterator[list[str]]:
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build().eval()
        for keep in KEEPS:
            try:
                plan = saint.plan_for(model, keep=keep)
            except ValueError as error:  # so little cannot be had: that is what the row is for
                yield [name, f"{keep:g}", str(error).partition("; ")[2], ""]
                continue
            yield [name, f"{keep:g}", _told(plan), plan.vision[-1].output if plan.vision else ""]


def _told(plan: Plan) -> str:
    stages = [("patches", stage) for stage in plan.vision] + [("visual tokens", stage) for stage in plan.connector]
    return "; ".join(_stage(what, stage) for what, stage in stages)


def _stage(what: str, stage: Stage) -> str:
    if what == "visual tokens":
        where = "in front of the language model"
    elif stage.placement == "input":
        where = "in front of the layers"
    else:
        assert isinstance(stage.layers, tuple), "as plan_for writes them"
        at = ", ".join(map(str, stage.layers))
        where = "at all layers" if len(stage.layers) > 3 else f"by layer {at}"
    method = type(stage.method).__name__
    fate = f" {stage.method.fate}" if method == "Match" else ""
    kept = stage.method.fixed
    assert kept is not None, "plan_for fixes budgets"
    return f"{method}{fate}: {kept:.0%} of the {what}, {where}"
