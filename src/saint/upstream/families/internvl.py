"""InternVL: InternViT, whose patches a pixel shuffle joins by squares."""

from torch import nn

from ..specs import BlockSpec, EncoderSpec, FamilySpec
from ..tiny import IMAGE, TinyVLM, make, squares, text_config, tower_config
from ..transformers import qualified
from ._shared import feature_layer

_BLOCK = BlockSpec(
    attn="attention",
    mlp="mlp",
    norm1="layernorm_before",
    norm2="layernorm_after",
    branch1=("lambda_1",),
    branch2=("dropout", "lambda_2"),
    keys=("attention.k_norm",),
    heads=("attention.num_heads",),
    mask=None,
)
_TOWER = EncoderSpec(
    title="InternViT",
    library="transformers",
    encoder=qualified("internvl", "InternVLVisionModel"),
    blocks="encoder.layer",
    block_specs={"InternVLVisionLayer": _BLOCK},
    prefix=lambda m: 1,
    patch="embeddings.patch_embeddings.projection",
    final="layernorm",
)


def _build() -> nn.Module:
    import transformers as hf

    config = hf.InternVLConfig(
        vision_config=tower_config(),
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return make(hf.InternVLForConditionalGeneration, config)


SPECS = (
    FamilySpec(
        title="InternVL",
        model=qualified("internvl", "InternVLModel"),
        merge_size=lambda m: round(1 / m.config.downsample_ratio),
        feature_layer=feature_layer,
        tower_spec=_TOWER,
        tiny=(
            TinyVLM(
                "internvl",
                _build,
                squares(24),
                tower="model.vision_tower.encoder.layer",
                merge_size=2,
                prefix=1,
                attention="attention",
            ),
        ),
    ),
)
