"""timm's encoders: their facts, and tiny models of them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .names import TIMM_PAIRS, TIMM_PLACES, TIMM_ROTARY, TIMM_VALID
from .specs import BlockSpec, EncoderSpec, RowLayout, RowSpec

_VIT = BlockSpec(attn="attn", mlp="mlp", branch1=("ls1", "drop_path1"), branch2=("ls2", "drop_path2"))
_RES_POST = BlockSpec(
    attn="attn", mlp="mlp", norm1=None, norm2=None, branch1=("norm1", "drop_path1"), branch2=("norm2", "drop_path2")
)
# k_norm is an Identity when there is no qk-norm; a hook on attn.qkv would never fire, EVA calls F.linear on its weight
_EVA = BlockSpec(
    attn="attn", mlp="mlp", branch1=("gamma_1", "drop_path1"), branch2=("gamma_2", "drop_path2"), tables=(TIMM_ROTARY,)
)
_EVA_POST = BlockSpec(
    attn="attn",
    mlp="mlp",
    norm1=None,
    norm2=None,
    branch1=("norm1", "drop_path1"),
    branch2=("norm2", "drop_path2"),
    tables=(TIMM_ROTARY,),
)
_THINGS = BlockSpec(
    attn="attn",
    mlp="mlp",
    norm1="norm",
    norm2="norm",
    branch1=("ls", "drop_path"),
    branch2=("ls", "drop_path"),
    units=("attns", "ffns"),
)
# one matrix product brings forth queries, keys, values and the hidden layer of the MLP
_PARALLEL = BlockSpec(attn=None, mlp=None, norm1="in_norm", norm2=None, keys=("k_norm",), keys_by_token=True)
_DIFF_PARALLEL = BlockSpec(attn=None, mlp=None, norm1="in_norm", norm2=None, keys=("k_norm",))
_BEIT = BlockSpec(
    attn="attn",
    mlp="mlp",
    branch1=("gamma_1", "drop_path1"),
    branch2=("gamma_2", "drop_path2"),
    keys=("attn.qkv.weight",),  # F.linear again, and no norm to listen at; there is no bias of keys
    heads=("attn.num_heads",),
    mask=TIMM_PAIRS,
    bias=(("attn._get_rel_pos_bias", "attn.relative_position_bias_table"),),
)
_PAIRS = (("attn.rel_pos.get_bias", "attn.rel_pos"),)
_RELPOS = replace(_VIT, mask=TIMM_PAIRS, bias=_PAIRS)
_RELPOS_POST = replace(_RES_POST, mask=TIMM_PAIRS, bias=_PAIRS)


def _refuse(model: Any) -> str | None:
    drop = getattr(model, "patch_drop", None)
    if drop is not None and getattr(drop, "prob", 0.0) > 0 and model.training:
        return "its patch_drop is active in train mode and would drop patches first; set its prob to 0"
    return None


_BLOCKS = {
    "Block": _VIT,
    "ResPostBlock": _RES_POST,
    "ParallelThingsBlock": _THINGS,
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _DIFF_PARALLEL,
}


def _candidates(model: Any) -> int | None:
    embed = model.patch_embed
    return embed.num_patches if getattr(embed, "strict_img_size", False) else None


def _row(embeds: Any, linear: Any) -> RowLayout | None:
    if getattr(embeds, "norm_input", None) is not None:  # what enters the layer is no pixels
        return None
    high, wide = embeds.patch_size
    last = getattr(embeds, "channels_last", True)
    return RowLayout(linear.in_features // (high * wide), high, wide, channels_last=last)


def _grid(embeds: Any, given: Mapping[str, Any]) -> tuple[int, int] | list[list[int]]:
    places, valid = TIMM_PLACES.read(given), TIMM_VALID.read(given)
    if places is None:  # pictures [B, C, H, W]
        rows, columns = embeds.dynamic_feat_size(given["x"].shape[-2:])
        return rows, columns
    sizes = places.amax(1) + 1
    slots = torch.arange(places.shape[1], device=places.device)
    row_by_row = torch.stack([slots // sizes[:, 1:], slots % sizes[:, 1:]], -1)  # [B, N, 2]
    elsewhere = (places != row_by_row).any(-1)
    if bool((elsewhere if valid is None else elsewhere & valid.bool()).any()):
        raise ValueError(
            f"{TIMM_PLACES} does not lay the patches of each picture row by row, so their grid is not known"
        )
    return sizes.tolist()


# -- tiny models ------------------------------------------------------------------------------------------------------

_SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}  # real: 192..1280, 12..32, 3..16


def _tiny(name: str, img_size: int | None = 96, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of the model ``name`` on 6 x 6 patches, smaller; without ``img_size`` the model takes any pictures."""

    def build() -> nn.Module:
        import timm

        pixels = {} if img_size is None else {"img_size": img_size}
        return timm.create_model(name, num_classes=7, **{**_SIZES, **pixels, **settings})

    return build


_usual = functools.partial(
    EncoderSpec,
    library="timm",
    blocks="blocks",
    prefix=lambda m: m.num_prefix_tokens,
    patch="patch_embed.proj",
    candidates=_candidates,
    final="norm",
    dense_calls=("forward_intermediates",),
)

SPECS = [
    EncoderSpec(
        title="ViT (AugReg, DeiT/DeiT-3, MAE, CLIP, SigLIP/SigLIP 2, DINOv2 with and without registers, AIMv2, hybrids, "
        "ViTamin, parallel blocks)",
        library="timm",
        encoder="timm.models.vision_transformer.VisionTransformer",
        blocks="blocks",
        block_specs=_BLOCKS,
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        candidates=_candidates,
        final="norm",
        pools=("attn_pool",),
        pool_with_prefix=lambda m: bool(getattr(m, "pool_include_prefix", False)),
        dense_calls=("forward_intermediates", "get_intermediate_layers"),
        refuse=_refuse,
        tiny={
            "vit-augreg": _tiny("vit_tiny_patch16_224"),
            "vit-avg": _tiny("vit_base_patch16_224.mae", global_pool="avg"),
            "deit-distilled": _tiny("deit_tiny_distilled_patch16_224"),
            "deit3": _tiny("deit3_small_patch16_224", init_values=1e-5),
            "clip": _tiny("vit_base_patch16_clip_quickgelu_224"),
            "siglip": _tiny("vit_base_patch16_siglip_224"),
            "siglip2": _tiny("vit_base_patch16_siglip_256.v2_webli"),
            "siglip-gap": _tiny("vit_base_patch16_siglip_gap_224"),
            "dinov2": _tiny("vit_small_patch14_dinov2", img_size=84),
            "dinov2-reg": _tiny("vit_small_patch14_reg4_dinov2", img_size=84),
            "vit-qknorm": _tiny("vit_tiny_patch16_224", qk_norm=True),
            "vit-srelpos-free-reg-gap": _tiny("vit_medium_patch16_reg4_gap_256"),
            "map-without-registers": _tiny("vit_so150m_patch16_reg4_map_256"),
            "vit-parallel": _tiny("vit_small_patch16_18x2_224"),
            "vit-parallel-scaling": _tiny("vit_base_patch16_xp_224"),
            # halves of heads; not in timm 1.0.20
            "vit-diff": _tiny("vit_dwee_patch16_reg1_gap_256", num_heads=2),
            "vit-diff-parallel": _tiny("vit_dpwee_patch16_reg1_gap_256", num_heads=2),
        },
    ),
    _usual(
        title="EVA, EVA-02, DINOv3, Perception Encoder",
        encoder="timm.models.eva.Eva",
        block_specs={"EvaBlock": _EVA, "EvaBlockPostNorm": _EVA_POST},
        pools=("attn_pool",),
        refuse=_refuse,
        tiny={
            "eva": _tiny("eva_giant_patch14_224", img_size=84),
            "eva02": _tiny("eva02_tiny_patch14_224", img_size=84),
            "eva02-clip": _tiny("eva02_base_patch16_clip_224"),
            "dinov3": _tiny("vit_small_patch16_dinov3"),
            "pe-core": _tiny("vit_pe_core_tiny_patch16_384"),
            "vit-rope-mixed": _tiny("vit_small_patch16_rope_mixed_224"),
        },
    ),
    _usual(
        title="BEiT, BEiT-2",
        encoder="timm.models.beit.Beit",
        block_specs={"Block": _BEIT},
        tiny={
            "beit": _tiny("beit_base_patch16_224"),
            "beit-shared": _tiny("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
        },
    ),
    _usual(
        title="ViT with relative position bias (own or shared)",
        encoder="timm.models.vision_transformer_relpos.VisionTransformerRelPos",
        block_specs={"RelPosBlock": _RELPOS, "ResPostRelPosBlock": _RELPOS_POST},
        tiny={
            "relpos": _tiny("vit_relpos_small_patch16_224"),
            "relpos-cls": _tiny("vit_relpos_base_patch16_clsgap_224"),
            "relpos-shared": _tiny("vit_srelpos_small_patch16_224"),
            "relpos-post": _tiny("vit_relpos_base_patch32_plus_rpn_256", patch_size=16),
        },
    ),
    EncoderSpec(
        title="NaFlexViT (pictures, or patches with padding)",
        library="timm",
        encoder="timm.models.naflexvit.NaFlexVit",
        blocks="blocks",
        block_specs={**_BLOCKS, "EvaBlock": _EVA},
        prefix=lambda m: m.num_prefix_tokens,
        patch="embeds",
        rows=RowSpec("embeds.proj", layout=_row, grid=_grid),
        final="norm",
        pools=("attn_pool",),
        pool_with_prefix=lambda m: bool(m.pool_include_prefix),
        masked_pools={"_pool": TIMM_VALID},
        dense_calls=("forward_intermediates",),
        refuse=_refuse,
        tiny={
            "naflex": _tiny("naflexvit_base_patch16_gap", img_size=None, pos_embed_grid_size=(6, 6)),
            "naflex-map": _tiny("naflexvit_base_patch16_map", img_size=None, pos_embed_grid_size=(6, 6)),
        },
    ),
]

_GRID = "lays its tokens on the grid behind the last block, where a module joins squares of them"

REFUSED = {
    "timm.models.cait.Cait": "its attention mixes heads in front of the softmax and takes no mask, and classes attend to the "
    "patches in blocks of their own",
    "timm.models.vision_transformer_sam.VisionTransformerSAM": "windows on the grid, no sequence of tokens",
    "timm.models.hieradet_sam2.HieraDet": "windows on the grid and pooling between its stages, no sequence of tokens",
    "timm.models.hiera.Hiera": "windows and pooling between its stages, no sequence of tokens",
    "timm.models.gemma4_vit.Gemma4VitEncoder": "behind the last block it averages squares of patches by their positions",
    "timm.models.qwen3_vit.Qwen3VitEncoder": _GRID,
    "timm.models.deepseek_vit.DeepseekVitEncoder": _GRID,
    "timm.models.xcit.Xcit": "attention over channels, and convolutions over the grid in every block",
    "timm.models.volo.VOLO": "attention over windows of the grid",
    "timm.models.convit.ConVit": "its attention weighs positions of the full grid beside the softmax",
    "timm.models.crossvit.CrossVit": "two sequences that exchange their class tokens",
    "timm.models.tnt.TNT": "an inner sequence for each token",
    "timm.models.pit.PoolingVisionTransformer": "pooling on the grid between its stages",
    "timm.models.fastvit.FastVit": "convolutions, and attention on a small grid at most",
    "timm.models.swin_transformer.SwinTransformer": "windows, no global tokens",
    "timm.models.swin_transformer_v2.SwinTransformerV2": "windows, no global tokens",
    "timm.models.convnext.ConvNeXt": "convolutions, no tokens",
}
