"""Vision encoders of transformers: their facts, and tiny models of them.

Encoders that only make sense inside one family of vision-language models are beside its facts, in ``families``.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .names import MASK, PATCH, ROTARY, SHAPES
from .specs import BlockSpec, EncoderSpec, ReaderSpec, RowLayout, RowSpec

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
CLIP_BLOCK = BlockSpec(
    attn="self_attn",
    mlp="mlp",
    norm1="layer_norm1",
    norm2="layer_norm2",
    keys=("self_attn.k_proj",),
    heads=("self_attn.num_heads",),
    mask=MASK,
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


def qualified(module: str, cls: str) -> str:
    """Qualified name of a modeling class of transformers."""
    return f"transformers.models.{module}.modeling_{module}.{cls}"


def _registers(model: Any) -> int:
    return 1 + int(model.config.num_register_tokens)


def _channels_last(holder: Any, linear: Any) -> RowLayout:
    side = PATCH.get(holder)
    return RowLayout(linear.in_features // side**2, side, side, channels_last=True)


def _channels_first(holder: Any, linear: Any) -> RowLayout:
    return _channels_last(holder, linear)._replace(channels_last=False)


def _dense(cls: str) -> tuple[str, ...]:
    return ("forward",) if cls.endswith("Backbone") else ()  # a backbone reshapes every map to the grid


def _spec(
    title: str, module: str, cls: str, blocks: str, block_specs: dict[str, BlockSpec], patch: str | None, **facts: Any
) -> EncoderSpec:
    return EncoderSpec(
        title=title,
        library="transformers",
        encoder=qualified(module, cls),
        blocks=blocks,
        block_specs=block_specs,
        patch=patch,
        **facts,
    )


# -- tiny models ------------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 48,  # real: 384..1280
    "num_hidden_layers": 4,  # real: 12..48
    "num_attention_heads": 3,
    "patch_size": 16,
}
_PIXELS = {"image_size": 96}
_MLP = {"intermediate_size": 96}
_HEAD = {"num_labels": 7}
_MAPS = {"out_indices": [2, 4]}  # of backbones


def _tiny(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as hf

        return getattr(hf, model)(getattr(hf, config)(**_SIZES, **settings))

    return build


SPECS = [
    _spec(
        "ViT",
        "vit",
        "ViTModel",
        "layers",
        {"ViTLayer": _VIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="layernorm",
        tiny={"vit": _tiny("ViTConfig", "ViTForImageClassification", **_PIXELS, **_MLP, **_HEAD)},
    ),
    _spec(
        "DeiT",
        "deit",
        "DeiTModel",
        "layers",
        {"DeiTLayer": _VIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 2,
        final="layernorm",
        tiny={"deit": _tiny("DeiTConfig", "DeiTForImageClassificationWithTeacher", **_PIXELS, **_MLP, **_HEAD)},
    ),
    _spec(
        "CLIP",
        "clip",
        "CLIPVisionModel",
        "encoder.layers",
        {"CLIPEncoderLayer": CLIP_BLOCK},
        "embeddings.patch_embedding",
        prefix=lambda m: 1,
        tiny={"clip": _tiny("CLIPVisionConfig", "CLIPVisionModelWithProjection", **_PIXELS, **_MLP, projection_dim=16)},
    ),
    _spec(
        "SigLIP",
        "siglip",
        "SiglipVisionModel",
        "encoder.layers",
        {"SiglipEncoderLayer": CLIP_BLOCK},
        "embeddings.patch_embedding",
        prefix=lambda m: 0,
        final="post_layernorm",
        pools=("head",),
        tiny={"siglip": _tiny("SiglipVisionConfig", "SiglipVisionModel", **_PIXELS, **_MLP)},
    ),
    _spec(
        "SigLIP 2 (NaFlex)",
        "siglip2",
        "Siglip2VisionModel",
        "encoder.layers",
        {"Siglip2EncoderLayer": CLIP_BLOCK},
        None,  # patches arrive as rows
        rows=RowSpec(
            "embeddings.patch_embedding",
            layout=_channels_last,  # Siglip2ImageProcessor
            grid=lambda _, given: SHAPES.read(given).tolist(),
        ),
        prefix=lambda m: 0,
        final="post_layernorm",
        pools=("head",),
        tiny={"siglip2": _tiny("Siglip2VisionConfig", "Siglip2VisionModel", **_MLP, num_patches=36)},
    ),
    _spec(
        "BEiT",
        "beit",
        "BeitModel",
        "layers",
        {"BeitLayer": _BEIT},
        "embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="layernorm",
        tiny={
            "beit": _tiny(
                "BeitConfig", "BeitModel", **_PIXELS, **_MLP, use_relative_position_bias=True, use_mean_pooling=False
            ),
            "beit-shared": _tiny(
                "BeitConfig",
                "BeitForImageClassification",
                **_PIXELS,
                **_MLP,
                **_HEAD,
                use_shared_relative_position_bias=True,
            ),
        },
    ),
    _spec(
        "BEiT",
        "beit",
        "BeitBackbone",
        "beit.layers",
        {"BeitLayer": _BEIT},
        "beit.embeddings.patch_embeddings.projection",
        prefix=lambda m: 1,
        final="beit.layernorm",
        dense_calls=("forward",),
        tiny={
            "beit-backbone": _tiny(
                "BeitConfig", "BeitBackbone", **_PIXELS, **_MLP, **_MAPS, use_relative_position_bias=True
            )
        },
    ),
    *[
        _spec(
            "DINOv2",
            "dinov2",
            cls,
            "encoder.layer",
            {"Dinov2Layer": _DINOV2},
            "embeddings.patch_embeddings.projection",
            prefix=lambda m: 1,
            final="layernorm",
            dense_calls=_dense(cls),
            usual=224,
            tiny=tiny,
        )
        for cls, tiny in (
            (
                "Dinov2Model",
                {"dinov2": _tiny("Dinov2Config", "Dinov2ForImageClassification", **_PIXELS, **_HEAD, mlp_ratio=2)},
            ),
            (
                "Dinov2Backbone",
                {"dinov2-backbone": _tiny("Dinov2Config", "Dinov2Backbone", **_PIXELS, **_MAPS, mlp_ratio=2)},
            ),
        )
    ],
    *[
        _spec(
            "DINOv2 with registers",
            "dinov2_with_registers",
            cls,
            "encoder.layer",
            {"Dinov2WithRegistersLayer": _DINOV2},
            "embeddings.patch_embeddings.projection",
            prefix=_registers,
            final="layernorm",
            dense_calls=_dense(cls),
            usual=224,
            tiny={name: _tiny("Dinov2WithRegistersConfig", cls, **_PIXELS, mlp_ratio=2, **more)},
        )
        for cls, name, more in (
            ("Dinov2WithRegistersModel", "dinov2-registers", {"num_register_tokens": 3}),
            ("Dinov2WithRegistersBackbone", "dinov2-registers-backbone", _MAPS),
        )
    ],
    *[
        _spec(
            "DINOv3",
            "dinov3_vit",
            cls,
            "model.layer",
            {"DINOv3ViTLayer": _DINOV2},
            "embeddings.patch_embeddings",
            prefix=_registers,
            final="norm",
            dense_calls=_dense(cls),
            tiny={name: _tiny("DINOv3ViTConfig", cls, **_PIXELS, **_MLP, **more)},
        )
        for cls, name, more in (
            ("DINOv3ViTModel", "dinov3", {"num_register_tokens": 4}),
            ("DINOv3ViTBackbone", "dinov3-backbone", _MAPS),
        )
    ],
]

# classes around these encoders that read their rows; all others read what is pooled, or an average over the rows
READERS = [
    *[
        ReaderSpec(qualified(module, cls), dense=True)
        for module, cls in (
            ("vit", "ViTForMaskedImageModeling"),
            ("deit", "DeiTForMaskedImageModeling"),
            ("beit", "BeitForMaskedImageModeling"),
            ("beit", "BeitForSemanticSegmentation"),
        )
    ],
    ReaderSpec(
        qualified("vision_encoder_decoder", "VisionEncoderDecoderModel"),
        decoder="decoder",
        projection="enc_to_dec_proj",
    ),
    ReaderSpec(
        qualified("siglip2", "Siglip2ForImageClassification"),
        needs="it averages the rows under the mask of its pictures, which is of full length",
    ),
]

# towers that no spec was written for, to whose linear layer patches arrive as their image processor lays them in rows
ROW_LAYOUTS = {
    qualified("cosmos3_edge", "Cosmos3EdgeVisionModel"): _channels_last,
    qualified("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel"): _channels_first,
}

REFUSED = {
    "transformers.models.swin.modeling_swin.SwinModel": "windows, no global tokens",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model": "windows, no global tokens",
    "transformers.models.convnext.modeling_convnext.ConvNextModel": "convolutions, no tokens",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2Model": "convolutions, no tokens",
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextModel": "convolutions, no tokens",
}
