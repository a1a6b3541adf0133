"""Facts about open_clip's ViT towers (timm towers inside open_clip are found through their trunk)."""

from typing import Any

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
    ),
]

REFUSED = {"open_clip.modified_resnet.ModifiedResNet": "convolutions, no tokens"}
