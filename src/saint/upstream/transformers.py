"""Facts about the vision encoders of transformers."""

from typing import Any

from .names import MASK, ROTARY, SEGMENTS, WINDOW_ORDER
from .specs import BlockSpec, EncoderSpec

_VIT = BlockSpec(
    attn="attention",
    mlp="mlp",
    norm1="layernorm_before",
    norm2="layernorm_after",
    branch1=("dropout",),
    branch2=("dropout",),
    keys=("attention.k_proj",),
    heads=("attention.num_attention_heads",),
    mask=MASK,
)
# the block joins its own bias and the mask, and no part of it alone does
_BEIT = BlockSpec(
    attn=None,
    mlp=None,
    norm1="layernorm_before",
    norm2="layernorm_after",
    keys=("attention.k_proj",),
    heads=("attention.num_attention_heads",),
    mask=MASK,
    bias=(("relative_position_bias.forward", "relative_position_bias"),),
)
_CLIP = BlockSpec(
    attn="self_attn",
    mlp="mlp",
    norm1="layer_norm1",
    norm2="layer_norm2",
    keys=("self_attn.k_proj",),
    heads=("self_attn.num_heads",),
    mask=MASK,
)
_INTERNVL = BlockSpec(
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
_QWEN = BlockSpec(
    attn="attn",
    mlp="mlp",
    keys=("attn.qkv",),
    heads=("attn.num_heads",),
    mask=None,
    tables=(ROTARY,),
    fused=True,
    segments=SEGMENTS,
)
_DINOV2 = BlockSpec(
    attn="attention",
    mlp="mlp",
    branch1=("layer_scale1", "drop_path"),
    branch2=("layer_scale2", "drop_path"),
    keys=("attention.k_proj", "attention.attention.key"),  # the second: transformers 5.10 and before
    heads=("attention.num_heads", "attention.num_attention_heads", "attention.attention.num_attention_heads"),
    mask=MASK,
    tables=(ROTARY,),
)


def _registers(model: Any) -> int:
    return 1 + int(model.config.num_register_tokens)


def _dense(cls: str) -> tuple[str, ...]:
    return ("forward",) if cls.endswith("Backbone") else ()  # a backbone reshapes every map to the grid


def _row(
    title: str, module: str, cls: str, blocks: str, spec: dict[str, BlockSpec], patch: str | None, **facts: Any
) -> EncoderSpec:
    return EncoderSpec(
        title=title,
        library="transformers",
        encoder=f"transformers.models.{module}.modeling_{module}.{cls}",
        blocks=blocks,
        block_specs=spec,
        patch=patch,
        **facts,
    )


SPECS = [
    _row(
        "ViT",
        "vit",
        "ViTModel",
        "layers",
        {"ViTLayer": _VIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="layernorm",
    ),
    _row(
        "DeiT",
        "deit",
        "DeiTModel",
        "layers",
        {"DeiTLayer": _VIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 2,
        final="layernorm",
    ),
    _row(
        "CLIP",
        "clip",
        "CLIPVisionModel",
        "encoder.layers",
        {"CLIPEncoderLayer": _CLIP},
        "embeddings.patch_embedding",
        prefix=lambda m: 1,
    ),
    _row(
        "SigLIP",
        "siglip",
        "SiglipVisionModel",
        "encoder.layers",
        {"SiglipEncoderLayer": _CLIP},
        "embeddings.patch_embedding",
        prefix=lambda m: 0,
        final="post_layernorm",
        pools=("head",),
    ),
    _row(
        "SigLIP 2 (NaFlex)",
        "siglip2",
        "Siglip2VisionModel",
        "encoder.layers",
        {"Siglip2EncoderLayer": _CLIP},
        None,  # patches arrive flattened: no grid to read
        prefix=lambda m: 0,
        final="post_layernorm",
        pools=("head",),
    ),
    _row(
        "BEiT",
        "beit",
        "BeitModel",
        "layers",
        {"BeitLayer": _BEIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="layernorm",
    ),
    _row(
        "BEiT",
        "beit",
        "BeitBackbone",
        "beit.layers",
        {"BeitLayer": _BEIT},
        "beit.embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="beit.layernorm",
        dense_calls=("forward",),
    ),
    *[
        _row(
            "DINOv2",
            "dinov2",
            cls,
            "encoder.layer",
            {"Dinov2Layer": _DINOV2},
            "embeddings.patch_embeddings.projection",
            prefix=lambda m: 1,
            final="layernorm",
            dense_calls=_dense(cls),
        )
        for cls in ("Dinov2Model", "Dinov2Backbone")
    ],
    *[
        _row(
            "DINOv2 with registers",
            "dinov2_with_registers",
            cls,
            "encoder.layer",
            {"Dinov2WithRegistersLayer": _DINOV2},
            "embeddings.patch_embeddings.projection",
            prefix=_registers,
            final="layernorm",
            dense_calls=_dense(cls),
        )
        for cls in ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone")
    ],
    *[
        _row(
            "DINOv3",
            "dinov3_vit",
            cls,
            "model.layer",
            {"DINOv3ViTLayer": _DINOV2},
            "embeddings.patch_embeddings",
            prefix=_registers,
            final="norm",
            dense_calls=_dense(cls),
        )
        for cls in ("DINOv3ViTModel", "DINOv3ViTBackbone")
    ],
]

# encoders whose output only their own vision-language model can read: it joins groups of their tokens
TOWERS: list[EncoderSpec] = [
    *[
        _row(
            title,
            module,
            f"{cls}VisionTransformer",
            "encoder.layers",
            {f"{cls}EncoderLayer": _CLIP},
            "embeddings.patch_embedding",
            prefix=lambda m: 0,
            final="post_layernorm",
        )
        for title, module, cls in (("Idefics3", "idefics3", "Idefics3"), ("SmolVLM", "smolvlm", "SmolVLM"))
    ],
    _row(
        "InternViT",
        "internvl",
        "InternVLVisionModel",
        "encoder.layer",
        {"InternVLVisionLayer": _INTERNVL},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="layernorm",
    ),
    *[
        _row(title, module, cls, "blocks", {block: _QWEN}, None, prefix=lambda m: 0, packed=True, order=order)
        for title, module, cls, block, order in (
            ("Qwen2-VL", "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionBlock", None),
            (
                "Qwen2.5-VL",
                "qwen2_5_vl",
                "Qwen2_5_VisionTransformerPretrainedModel",
                "Qwen2_5_VLVisionBlock",
                WINDOW_ORDER,
            ),
            ("Qwen3-VL", "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionBlock", None),
        )
    ],
]

REFUSED = {
    "transformers.models.swin.modeling_swin.SwinModel": "windows, no global tokens",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model": "windows, no global tokens",
    "transformers.models.convnext.modeling_convnext.ConvNextModel": "convolutions, no tokens",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2Model": "convolutions, no tokens",
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextModel": "convolutions, no tokens",
}
