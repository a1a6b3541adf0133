"""Tiny random models for every row of the support table, built from the libraries' own classes, no network."""

from collections.abc import Callable

import torch
from timm.models import vision_transformer
from torch import nn

from saint.testing.zoo import enliven

BUILDERS: dict[str, Callable[[], nn.Module]] = {}
_TIMM = {"embed_dim": 48, "depth": 4, "num_heads": 3}  # real: 192..1280, 12..32, 3..16


def register(name: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        BUILDERS[name] = build
        return build

    return add


def build(name: str) -> nn.Module:
    """The model called ``name``, in eval mode, with weights lively enough that layers matter."""
    torch.manual_seed(0)
    return enliven(BUILDERS[name]().eval())


def _timm(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7, **kwargs)

    return make


for title, make in {
    "timm/vit-augreg": _timm("vit_tiny_patch16_224", img_size=96, **_TIMM),
    "timm/vit-avg": _timm("vit_base_patch16_224.mae", img_size=96, global_pool="avg", **_TIMM),
    "timm/deit-distilled": _timm("deit_tiny_distilled_patch16_224", img_size=96, **_TIMM),
    "timm/deit3": _timm("deit3_small_patch16_224", img_size=96, init_values=1e-5, **_TIMM),
    "timm/clip": _timm("vit_base_patch16_clip_quickgelu_224", img_size=96, **_TIMM),
    "timm/siglip": _timm("vit_base_patch16_siglip_224", img_size=96, **_TIMM),
    "timm/siglip2": _timm("vit_base_patch16_siglip_256.v2_webli", img_size=96, **_TIMM),
    "timm/siglip-gap": _timm("vit_base_patch16_siglip_gap_224", img_size=96, **_TIMM),
    "timm/dinov2": _timm("vit_small_patch14_dinov2", img_size=84, **_TIMM),
    "timm/dinov2-reg": _timm("vit_small_patch14_reg4_dinov2", img_size=84, **_TIMM),
    "timm/vit-qknorm": _timm("vit_tiny_patch16_224", img_size=96, qk_norm=True, **_TIMM),
    "timm/vit-srelpos-free-reg-gap": _timm("vit_medium_patch16_reg4_gap_256", img_size=96, **_TIMM),
    "timm/eva": _timm("eva_giant_patch14_224", img_size=84, **_TIMM),
    "timm/eva02": _timm("eva02_tiny_patch14_224", img_size=84, **_TIMM),
    "timm/eva02-clip": _timm("eva02_base_patch16_clip_224", img_size=96, **_TIMM),
    "timm/dinov3": _timm("vit_small_patch16_dinov3", img_size=96, **_TIMM),
    "timm/pe-core": _timm("vit_pe_core_tiny_patch16_384", img_size=96, **_TIMM),
    "timm/map-without-registers": _timm("vit_so150m_patch16_reg4_map_256", img_size=96, **_TIMM),
    "timm/vit-parallel": _timm("vit_small_patch16_18x2_224", img_size=96, **_TIMM),
    "timm/vit-parallel-scaling": _timm("vit_base_patch16_xp_224", img_size=96, **_TIMM),
    "timm/beit": _timm("beit_base_patch16_224", img_size=96, **_TIMM),
    "timm/beit-shared": _timm(
        "beit_base_patch16_224", img_size=96, use_shared_rel_pos_bias=True, use_rel_pos_bias=False, **_TIMM
    ),
    "timm/relpos": _timm("vit_relpos_small_patch16_224", img_size=96, **_TIMM),
    "timm/relpos-cls": _timm("vit_relpos_base_patch16_clsgap_224", img_size=96, **_TIMM),
    "timm/relpos-shared": _timm("vit_srelpos_small_patch16_224", img_size=96, **_TIMM),
    "timm/relpos-post": _timm("vit_relpos_base_patch32_plus_rpn_256", img_size=96, patch_size=16, **_TIMM),
    "timm/naflex": _timm("naflexvit_base_patch16_gap", pos_embed_grid_size=(6, 6), **_TIMM),
    "timm/naflex-map": _timm("naflexvit_base_patch16_map", pos_embed_grid_size=(6, 6), **_TIMM),
    "timm/vit-rope-mixed": _timm("vit_small_patch16_rope_mixed_224", img_size=96, **_TIMM),
}.items():
    BUILDERS[title] = make

_DIFF = {**_TIMM, "num_heads": 2}  # halves of heads
for title, make in {
    "timm/vit-diff": _timm("vit_dwee_patch16_reg1_gap_256", img_size=96, **_DIFF),
    "timm/vit-diff-parallel": _timm("vit_dpwee_patch16_reg1_gap_256", img_size=96, **_DIFF),
}.items():
    if hasattr(vision_transformer, "DiffParallelScalingBlock"):  # not in timm 1.0.20
        BUILDERS[title] = make

_HF = {
    "hidden_size": 48,  # real: 384..1280
    "intermediate_size": 96,
    "num_hidden_layers": 4,  # real: 12..48
    "num_attention_heads": 3,
    "image_size": 96,
    "patch_size": 16,
}


@register("transformers/vit")
def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_HF, num_labels=7))


@register("transformers/deit")
def _deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**_HF, num_labels=7))


@register("transformers/clip")
def _clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**_HF, projection_dim=16))


@register("transformers/siglip")
def _siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_HF))


@register("transformers/siglip2")
def _siglip2() -> nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = {name: value for name, value in _HF.items() if name != "image_size"}
    return Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=36))


@register("transformers/beit")
def _beit() -> nn.Module:
    from transformers import BeitConfig, BeitModel

    return BeitModel(BeitConfig(**_HF, use_relative_position_bias=True, use_mean_pooling=False))


@register("transformers/beit-shared")
def _beit_shared() -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    return BeitForImageClassification(BeitConfig(**_HF, use_shared_relative_position_bias=True, num_labels=7))


@register("transformers/dinov2")
def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {name: value for name, value in _HF.items() if name != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, mlp_ratio=2, num_labels=7))


@register("transformers/dinov2-registers")
def _dinov2_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {name: value for name, value in _HF.items() if name != "intermediate_size"}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=3))


@register("transformers/dinov3")
def _dinov3() -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**_HF, num_register_tokens=4))


def _open_clip(**kwargs: object) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(96, 16, 48, 4, 3, 2.0, output_dim=16, **kwargs)


@register("open_clip/vit")
def _open_clip_default() -> nn.Module:
    return _open_clip(ls_init_value=1e-5)


@register("open_clip/vit-tokens")
def _open_clip_tokens() -> nn.Module:
    return _open_clip(output_tokens=True)  # beside the pooled vector the patches alone, without the class token


@register("open_clip/vit-avg")
def _open_clip_avg() -> nn.Module:
    return _open_clip(pool_type="avg", final_ln_after_pool=True)


@register("open_clip/vit-custom-attention")
def _open_clip_custom() -> nn.Module:
    return _open_clip(qk_norm=True, scale_attn=True)


@register("open_clip/coca")
def _open_clip_coca() -> nn.Module:
    return _open_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=4)


def backbones() -> dict[str, nn.Module]:
    """Encoders that return feature maps laid on the grid, from every row that has one."""
    from transformers import (
        BeitBackbone,
        BeitConfig,
        Dinov2Backbone,
        Dinov2Config,
        Dinov2WithRegistersBackbone,
        Dinov2WithRegistersConfig,
        DINOv3ViTBackbone,
        DINOv3ViTConfig,
    )

    sizes = {name: value for name, value in _HF.items() if name != "intermediate_size"} | {"out_indices": [2, 4]}
    return {
        "beit": BeitBackbone(BeitConfig(**_HF, out_indices=[2, 4], use_relative_position_bias=True)),
        "dinov2": Dinov2Backbone(Dinov2Config(**sizes, mlp_ratio=2)),
        "dinov2-registers": Dinov2WithRegistersBackbone(Dinov2WithRegistersConfig(**sizes, mlp_ratio=2)),
        "dinov3": DINOv3ViTBackbone(DINOv3ViTConfig(**_HF, out_indices=[2, 4])),
    }
