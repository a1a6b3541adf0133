"""LLaVA-OneVision: SigLIP, whose features are laid on a grid and interpolated."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..names import FRAMES, PIXELS, VIDEOS
from ..specs import Clip, FamilySpec
from ..tiny import IMAGE, VIDEO, TinyVLM, make, text_config, tiles, tower_config
from ..transformers import qualified


def _build() -> nn.Module:
    import transformers as hf

    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**tower_config(vision_use_head=False)),
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    return make(hf.LlavaOnevisionForConditionalGeneration, config)


def _clips(model: Any, given: Mapping[str, Any]) -> list[Clip]:
    videos, frames = FRAMES.read(given).shape[:2]  # [videos, frames, channels, height, width]
    tower = model.config.vision_config
    # squares of 2 x 2 patches become one token, also at the edge
    side = math.ceil(tower.image_size // tower.patch_size / 2)
    return [Clip(frames, side * side, 1)] * videos  # a newline behind the last frame


SPECS = (
    FamilySpec(
        title="LLaVA-OneVision",
        model=qualified("llava_onevision", "LlavaOnevisionModel"),
        pixels=(PIXELS, VIDEOS),
        clips=_clips,
        no_vision="its packing interpolates between neighbouring features, which would mix dropped with kept ones; "
        "use the connector or language stage",
        tiny=(TinyVLM("llava-onevision", _build, tiles),),
    ),
)
