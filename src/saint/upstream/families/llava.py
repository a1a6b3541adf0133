"""LLaVA-1.5 and LLaVA-NeXT: CLIP, a projection, and any of several language models."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..specs import FamilySpec
from ..tiny import IMAGE, TinyVLM, make, squares, text_config, tiles, tower_config
from ..transformers import qualified
from ._shared import CLIP_LAYERS, feature_layer


def _llava(text: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as hf

        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**tower_config()),
            text_config=getattr(hf, text)(**text_config(**more)),
            image_token_id=IMAGE,
            image_seq_length=36,
        )
        return make(hf.LlavaForConditionalGeneration, config)

    return build


def _llava_next() -> nn.Module:
    import transformers as hf

    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config()),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    return make(hf.LlavaNextForConditionalGeneration, config)


SPECS = (
    FamilySpec(
        title="LLaVA-1.5",
        model=qualified("llava", "LlavaModel"),
        feature_layer=feature_layer,
        tiny=(
            TinyVLM("llava-llama", _llava("LlamaConfig"), squares(24), tower=CLIP_LAYERS, prefix=1),
            TinyVLM(
                "llava-mistral", _llava("MistralConfig", sliding_window=None), squares(24), tower=CLIP_LAYERS, prefix=1
            ),
            TinyVLM("llava-qwen2", _llava("Qwen2Config"), squares(24), tower=CLIP_LAYERS, prefix=1),
        ),
    ),
    FamilySpec(
        title="LLaVA-NeXT",
        model=qualified("llava_next", "LlavaNextModel"),
        feature_layer=feature_layer,
        tiny=(TinyVLM("llava-next", _llava_next, tiles, tower=CLIP_LAYERS, prefix=1),),
    ),
)
