"""Facts about timm's encoders."""

from dataclasses import replace
from typing import Any

from .names import TIMM_PAIRS, TIMM_ROTARY, TIMM_VALID
from .specs import BlockSpec, EncoderSpec

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
    ),
    EncoderSpec(
        title="EVA, EVA-02, DINOv3, Perception Encoder",
        library="timm",
        encoder="timm.models.eva.Eva",
        blocks="blocks",
        block_specs={"EvaBlock": _EVA, "EvaBlockPostNorm": _EVA_POST},
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        candidates=_candidates,
        final="norm",
        pools=("attn_pool",),
        dense_calls=("forward_intermediates",),
        refuse=_refuse,
    ),
    EncoderSpec(
        title="BEiT, BEiT-2",
        library="timm",
        encoder="timm.models.beit.Beit",
        blocks="blocks",
        block_specs={"Block": _BEIT},
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        candidates=_candidates,
        final="norm",
        dense_calls=("forward_intermediates",),
    ),
    EncoderSpec(
        title="ViT with relative position bias (own or shared)",
        library="timm",
        encoder="timm.models.vision_transformer_relpos.VisionTransformerRelPos",
        blocks="blocks",
        block_specs={"RelPosBlock": _RELPOS, "ResPostRelPosBlock": _RELPOS_POST},
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        candidates=_candidates,
        final="norm",
        dense_calls=("forward_intermediates",),
    ),
    EncoderSpec(
        title="NaFlexViT (pictures, or patches with padding)",
        library="timm",
        encoder="timm.models.naflexvit.NaFlexVit",
        blocks="blocks",
        block_specs={**_BLOCKS, "EvaBlock": _EVA},
        prefix=lambda m: m.num_prefix_tokens,
        patch="embeds",
        final="norm",
        pools=("attn_pool",),
        pool_with_prefix=lambda m: bool(m.pool_include_prefix),
        masked_pools={"_pool": TIMM_VALID},
        dense_calls=("forward_intermediates",),
        refuse=_refuse,
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
