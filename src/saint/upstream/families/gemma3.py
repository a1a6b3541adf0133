"""Gemma 3: SigLIP, whose patches are averaged by squares."""

from torch import nn

from ..specs import FamilySpec
from ..tiny import IMAGE, TinyVLM, make, squares, text_config, tower_config
from ..transformers import qualified
from ._shared import CLIP_LAYERS


def _build() -> nn.Module:
    import transformers as hf

    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    config = hf.Gemma3Config(
        vision_config=tower_config(vision_use_head=False, image_size=48),
        mm_tokens_per_image=36,
        image_token_id=IMAGE,
        text_config=text_config(sliding_window=24, layer_types=kinds * 2, num_hidden_layers=6),
    )
    return make(hf.Gemma3ForConditionalGeneration, config)


SPECS = (
    FamilySpec(
        title="Gemma 3",
        model=qualified("gemma3", "Gemma3Model"),
        merge_size=lambda m: m.multi_modal_projector.kernel_size,
        tiny=(
            TinyVLM(
                "gemma3",
                _build,
                squares(48),
                tower=CLIP_LAYERS,
                types="token_type_ids",
                types_mark_images=True,
                merge_size=2,
            ),
        ),
    ),
)
