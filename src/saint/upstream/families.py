"""Facts about the vision-language models of transformers."""

from typing import Any

from .names import PIXELS, VIDEOS
from .specs import FamilySpec


def _row(title: str, module: str, cls: str, **facts: Any) -> FamilySpec:
    return FamilySpec(title=title, model=f"transformers.models.{module}.modeling_{module}.{cls}", **facts)


def _feature_layer(model: Any, depth: int) -> int | None:
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        return None
    return layer if layer >= 0 else depth + 1 + layer


_BOTH = (PIXELS, VIDEOS)
_USE = "; use the connector or language stage"

SPECS: tuple[FamilySpec, ...] = (
    _row("LLaVA-1.5", "llava", "LlavaModel", feature_layer=_feature_layer),
    _row("LLaVA-NeXT", "llava_next", "LlavaNextModel", feature_layer=_feature_layer),
    _row(
        "LLaVA-OneVision",
        "llava_onevision",
        "LlavaOnevisionModel",
        pixels=_BOTH,
        no_vision="its packing interpolates between neighbouring features, which would mix dropped with kept ones"
        + _USE,
    ),
    _row(
        "Qwen2-VL",
        "qwen2_vl",
        "Qwen2VLModel",
        tower="visual",
        connector="visual.merger",
        pixels=_BOTH,
        merge_size=lambda m: m.visual.spatial_merge_size,
    ),
    _row(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        "Qwen2_5_VLModel",
        tower="visual",
        connector="visual.merger",
        pixels=_BOTH,
        merge_size=lambda m: m.visual.spatial_merge_size,
    ),
    _row(
        "Qwen3-VL",
        "qwen3_vl",
        "Qwen3VLModel",
        tower="visual",
        connector="visual.merger",
        pixels=_BOTH,
        merge_size=lambda m: m.visual.spatial_merge_size,
        deepstack_mergers=lambda m: {
            f"visual.deepstack_merger_list.{i}": layer + 1 for i, layer in enumerate(m.visual.deepstack_visual_indexes)
        },
        between=lambda m: len(m.config.vision_config.deepstack_visual_indexes),
    ),
    _row(
        "InternVL",
        "internvl",
        "InternVLModel",
        merge_size=lambda m: round(1 / m.config.downsample_ratio),
        feature_layer=_feature_layer,
    ),
    _row("Gemma 3", "gemma3", "Gemma3Model", merge_size=lambda m: m.multi_modal_projector.kernel_size),
    _row("PaliGemma", "paligemma", "PaliGemmaModel"),
    _row(
        "Idefics3",
        "idefics3",
        "Idefics3Model",
        tower="vision_model",
        connector="connector",
        decoder="text_model",
        merge_size=lambda m: m.connector.scale_factor,
    ),
    _row(
        "SmolVLM",
        "smolvlm",
        "SmolVLMModel",
        tower="vision_model",
        connector="connector",
        decoder="text_model",
        merge_size=lambda m: m.connector.scale_factor,
    ),
)
