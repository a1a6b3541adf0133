"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed towers (all images in one sequence) whose mergers join squares of patches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..names import PIXELS, ROTARY, SEGMENTS, VIDEO_GRID, VIDEOS, WINDOW_ORDER, Role
from ..specs import BlockSpec, Clip, EncoderSpec, FamilySpec
from ..tiny import END, IMAGE, START, VIDEO, TinyVLM, make, text_config
from ..transformers import qualified

_BLOCK = BlockSpec(
    attn="attn",
    mlp="mlp",
    keys=("attn.qkv",),
    heads=("attn.num_heads",),
    mask=None,
    tables=(ROTARY,),
    fused=True,
    segments=SEGMENTS,
)


def _tower(title: str, module: str, cls: str, block: str, order: Role | None = None) -> EncoderSpec:
    return EncoderSpec(
        title=title,
        library="transformers",
        encoder=qualified(module, cls),
        blocks="blocks",
        block_specs={block: _BLOCK},
        prefix=lambda m: 0,
        patch=None,
        packed=True,
        order=order,
    )


def _clips(model: Any, given: Mapping[str, Any]) -> list[Clip]:
    size = model.visual.spatial_merge_size**2
    return [Clip(frames, rows * columns // size) for frames, rows, columns in VIDEO_GRID.read(given).tolist()]


def _family(title: str, module: str, cls: str, **facts: Any) -> FamilySpec:
    return FamilySpec(
        title=title,
        model=qualified(module, cls),
        tower="visual",
        connector="",
        pixels=(PIXELS, VIDEOS),
        merge_size=lambda m: m.visual.spatial_merge_size,
        clips=_clips,
        **facts,
    )


# -- tiny models ------------------------------------------------------------------------------------------------------

_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_TEXT = text_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]})
_TOWER = {"depth": 4, "num_heads": 2, "patch_size": 4}  # real: 24..32, 16, 14..16


def _qwen2() -> nn.Module:
    import transformers as hf

    config = hf.Qwen2VLConfig(
        vision_config={**_TOWER, "embed_dim": 32, "hidden_size": 48}, text_config={**_TEXT}, **_TOKENS
    )
    return make(hf.Qwen2VLForConditionalGeneration, config)


def _qwen25() -> nn.Module:
    import transformers as hf

    tower = {
        **_TOWER, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48, "window_size": 16,
        "fullatt_block_indexes": [2],
    }  # fmt: skip
    return make(
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig(vision_config=tower, text_config={**_TEXT}, **_TOKENS),
    )


def _qwen3() -> nn.Module:
    import transformers as hf

    tower = {
        **_TOWER, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48, "deepstack_visual_indexes": [0, 2],
        "num_position_embeddings": 64,
    }  # fmt: skip
    return make(
        hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig(vision_config=tower, text_config={**_TEXT}, **_TOKENS)
    )


def _patches(sizes: list[list[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Flattened patches of all images, [patches, 96], and their grids, [images, 3] (time, rows, columns)."""
    grids = [[(1, 8, 12), (1, 8, 8)][size] for sample in sizes for size in sample]
    count = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(count, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}


def _tiny(name: str, build: Any) -> TinyVLM:
    return TinyVLM(
        name,
        build,
        _patches,
        tower="model.visual.blocks",
        types="mm_token_type_ids",
        types_mark_images=True,
        delimited=True,
        merge_size=2,
        attention="attn",
    )


SPECS = (
    _family(
        "Qwen2-VL",
        "qwen2_vl",
        "Qwen2VLModel",
        tower_spec=_tower("Qwen2-VL", "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionBlock"),
        tiny=(_tiny("qwen2-vl", _qwen2),),
    ),
    _family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        "Qwen2_5_VLModel",
        tower_spec=_tower(
            "Qwen2.5-VL",
            "qwen2_5_vl",
            "Qwen2_5_VisionTransformerPretrainedModel",
            "Qwen2_5_VLVisionBlock",
            WINDOW_ORDER,
        ),
        tiny=(_tiny("qwen2.5-vl", _qwen25),),
    ),
    _family(
        "Qwen3-VL",
        "qwen3_vl",
        "Qwen3VLModel",
        reads=lambda m: [layer + 1 for layer in m.visual.deepstack_visual_indexes],
        tower_spec=_tower("Qwen3-VL", "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionBlock"),
        tiny=(_tiny("qwen3-vl", _qwen3),),
    ),
)
