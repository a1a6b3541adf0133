"""open_clip's ViT towers: their facts, and tiny models of them. timm towers inside open_clip are found through their trunk."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .specs import BlockSpec, EncoderSpec

_DEFAULT = BlockSpec(
    attn="attention",  # a method of the block: casts the mask and unpacks nn.MultiheadAttention
    mlp="mlp",
    norm1="ln_1",
    norm2="ln_2",
    branch1=("ls_1",),
    branch2=("ls_2",),
    keys=("attn.in_proj_weight",),
    heads=("attn.num_heads",),
    padding="attn",
)
_CUSTOM = BlockSpec(
    attn="attn",
    mlp="mlp",
    norm1="ln_1",
    norm2="ln_2",
    branch1=("ln_attn", "ls_1"),
    branch2=("ls_2",),
    keys=("attn.ln_k",),
)


def _refuse(model: Any) -> str | None:
    if not model.transformer.batch_first:
        return "its transformer runs sequence first (batch_first=False)"
    return None


def _tiny(**settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.transformer import VisionTransformer

        # pixels, patch, width, layers, heads, MLP ratio; real: 224..448, 14..32, 768..1664, 12..48, 12..16, 4
        return VisionTransformer(96, 16, 48, 4, 3, 2.0, output_dim=16, **settings)

    return build


SPECS = [
    EncoderSpec(
        title="ViT tower (both attention layouts)",
        library="open_clip",
        encoder="open_clip.transformer.VisionTransformer",
        blocks="transformer.resblocks",
        block_specs={"ResidualAttentionBlock": _DEFAULT, "CustomResidualAttentionBlock": _CUSTOM},
        prefix=lambda m: 1,
        patch="conv1",
        candidates=lambda m: m.grid_size[0] * m.grid_size[1],
        final="ln_post",
        pools=("attn_pool", "attn_pool_contrastive"),
        dense_calls=("forward_intermediates",),
        refuse=_refuse,
        tiny={
            "vit": _tiny(ls_init_value=1e-5),
            # beside the pooled vector the patches alone, without the class token
            "vit-tokens": _tiny(output_tokens=True),
            "vit-avg": _tiny(pool_type="avg", final_ln_after_pool=True),
            "vit-custom-attention": _tiny(qk_norm=True, scale_attn=True),
            "coca": _tiny(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=4),
        },
    ),
]

REFUSED = {"open_clip.modified_resnet.ModifiedResNet": "convolutions, no tokens"}
