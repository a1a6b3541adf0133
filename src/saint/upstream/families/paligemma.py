"""PaliGemma: SigLIP, and a prefix of images and prompt that attends to itself in both directions."""

from torch import nn

from ..specs import FamilySpec
from ..tiny import IMAGE, TinyVLM, make, squares, text_config, tower_config
from ..transformers import qualified
from ._shared import CLIP_LAYERS


def _build() -> nn.Module:
    import transformers as hf

    config = hf.PaliGemmaConfig(
        vision_config=tower_config(vision_use_head=False, projection_dim=48),
        text_config={"model_type": "gemma", **text_config()},
        image_token_id=IMAGE,
        projection_dim=48,
        hidden_size=48,
    )
    return make(hf.PaliGemmaForConditionalGeneration, config)


SPECS = (
    FamilySpec(
        title="PaliGemma",
        model=qualified("paligemma", "PaliGemmaModel"),
        tiny=(TinyVLM("paligemma", _build, squares(24), tower=CLIP_LAYERS, types="token_type_ids"),),
    ),
)
