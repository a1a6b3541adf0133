"""Facts about timm's encoders."""

from typing import Any

from .names import TIMM_ROTARY
from .specs import Anatomy, EncoderRow

_VIT = Anatomy(attn="attn", mlp="mlp", branch1=("ls1", "drop_path1"), branch2=("ls2", "drop_path2"))
_RES_POST = Anatomy(
    attn="attn", mlp="mlp", norm1=None, norm2=None, branch1=("norm1", "drop_path1"), branch2=("norm2", "drop_path2")
)
# k_norm is an Identity when there is no qk-norm; a hook on attn.qkv would never fire, EVA calls F.linear on its weight
_EVA = Anatomy(
    attn="attn", mlp="mlp", branch1=("gamma_1", "drop_path1"), branch2=("gamma_2", "drop_path2"), tables=(TIMM_ROTARY,)
)
_EVA_POST = Anatomy(
    attn="attn",
    mlp="mlp",
    norm1=None,
    norm2=None,
    branch1=("norm1", "drop_path1"),
    branch2=("norm2", "drop_path2"),
    tables=(TIMM_ROTARY,),
)


def _refuse(model: Any) -> str | None:
    drop = getattr(model, "patch_drop", None)
    if drop is not None and getattr(drop, "prob", 0.0) > 0 and model.training:
        return "its patch_drop is active in train mode and would drop patches first; set its prob to 0"
    return None


ROWS = [
    EncoderRow(
        title="ViT (AugReg, DeiT/DeiT-3, MAE, CLIP, SigLIP/SigLIP 2, DINOv2 with and without registers)",
        library="timm",
        encoder="timm.models.vision_transformer.VisionTransformer",
        blocks="blocks",
        anatomies={"Block": _VIT, "ResPostBlock": _RES_POST},
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        final="norm",
        pools=("attn_pool",),
        pool_with_prefix=lambda m: bool(getattr(m, "pool_include_prefix", False)),
        dense_calls=("forward_intermediates", "get_intermediate_layers"),
        refuse=_refuse,
    ),
    EncoderRow(
        title="EVA, EVA-02, DINOv3, Perception Encoder",
        library="timm",
        encoder="timm.models.eva.Eva",
        blocks="blocks",
        anatomies={"EvaBlock": _EVA, "EvaBlockPostNorm": _EVA_POST},
        prefix=lambda m: m.num_prefix_tokens,
        patch="patch_embed.proj",
        final="norm",
        pools=("attn_pool",),
        dense_calls=("forward_intermediates",),
        refuse=_refuse,
    ),
]

REFUSED = {
    "timm.models.beit.Beit": "its attention adds a relative-position bias fixed to the full grid",
    "timm.models.swin_transformer.SwinTransformer": "windows, no global tokens",
    "timm.models.swin_transformer_v2.SwinTransformerV2": "windows, no global tokens",
    "timm.models.convnext.ConvNeXt": "convolutions, no tokens",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": "its attention adds a relative-position bias fixed "
    "to the full grid",
    "timm.models.naflexvit.NaFlexVit": "variable-resolution packing is not in the table",
}
