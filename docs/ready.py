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


def _sizes(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """Settings that encoders and language models have under the same names."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


_VICUNA_7B = _sizes(4096, 32, 32, 11008, num_key_value_heads=32)
_VICUNA_13B = _sizes(5120, 40, 40, 13824, num_key_value_heads=40)
_QWEN_3B = _sizes(2048, 36, 16, 11008, num_key_value_heads=2, vocab_size=152064)
_QWEN_7B = _sizes(3584, 28, 28, 18944, num_key_value_heads=4, vocab_size=152064)
_SO400M = _sizes(1152, 27, 16, 4304, patch_size=14)


def _clip(**sizes: int) -> nn.Module:
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**sizes))


def _dinov2(**sizes: Any) -> nn.Module:
    return hf.Dinov2Model(hf.Dinov2Config(image_size=518, patch_size=14, **sizes))


def _llava(text: dict[str, Any]) -> nn.Module:
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=hf.LlamaConfig(**text)))


def _llava_next(text: dict[str, Any]) -> nn.Module:
    return hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(text_config=hf.LlamaConfig(**text)))


def _qwen2_5_vl(text: dict[str, Any]) -> nn.Module:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    }
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    text = _sizes(4096, 36, 32, 12288, num_key_value_heads=8, head_dim=128)
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision))


def _internvl() -> nn.Module:
    vision = hf.InternVLVisionConfig(**_sizes(1024, 24, 16, 4096, image_size=[448, 448]))
    config = hf.InternVLConfig(text_config=hf.Qwen2Config(**_QWEN_7B), vision_config=vision)
    return hf.InternVLForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    text = hf.Gemma3TextConfig(**_sizes(2560, 34, 8, 10240, num_key_value_heads=4, head_dim=256))
    vision = hf.SiglipVisionConfig(**_SO400M, image_size=896)
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP ViT-B/16": lambda: _clip(patch_size=16),
    "CLIP ViT-L/14, 336 px": lambda: _clip(**_sizes(1024, 24, 16, 4096, patch_size=14, image_size=336)),
    "SigLIP so400m/14, 384 px": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_SO400M, image_size=384)),
    "DINOv2 ViT-S/14": lambda: _dinov2(hidden_size=384, num_attention_heads=6),
    "DINOv2 ViT-B/14": _dinov2,
    "DINOv2 ViT-L/14": lambda: _dinov2(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "DINOv3 ViT-B/16 (timm)": lambda: timm.create_model("vit_base_patch16_dinov3", num_classes=0),
    "LLaVA-1.5 7B": lambda: _llava(_VICUNA_7B),
    "LLaVA-1.5 13B": lambda: _llava(_VICUNA_13B),
    "LLaVA-NeXT 7B": lambda: _llava_next(_VICUNA_7B),
    "Qwen2.5-VL 3B": lambda: _qwen2_5_vl(_QWEN_3B),
    "Qwen2.5-VL 7B": lambda: _qwen2_5_vl(_QWEN_7B),
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
