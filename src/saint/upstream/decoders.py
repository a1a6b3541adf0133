"""Facts about the decoder layers of transformers, for tokens that go between attention and MLP; and language models of them."""

from collections.abc import Sequence

from torch import nn

from .names import ATTENTION, MASK, MLP, ROTARY
from .specs import BlockSpec
from .transformers import qualified

# norms in front of the attention, behind it, in front of the MLP, behind that; None and (): the layer has none
_NORMS: Sequence[tuple[str | None, tuple[str, ...], str | None, tuple[str, ...]]] = (
    (
        "input_layernorm",
        ("post_attention_layernorm",),
        "pre_feedforward_layernorm",
        ("post_feedforward_layernorm",),
    ),  # Gemma
    ("input_layernorm", ("post_attention_layernorm",), "pre_mlp_layernorm", ("post_mlp_layernorm",)),
    ("input_layernorm", ("post_self_attn_layernorm",), "post_attention_layernorm", ("post_mlp_layernorm",)),  # GLM
    ("input_layernorm", ("post_norm1",), "post_attention_layernorm", ("post_norm2",)),
    ("operator_norm", ("post_operator_norm",), "ffn_norm", ("post_ffn_norm",)),
    ("input_layernorm", (), "post_attention_layernorm", ()),  # Llama, and most others
    ("input_layernorm", (), "pre_ff_layernorm", ()),
    ("operator_norm", (), "ffn_norm", ()),
    ("attention_layernorm", (), "feedforward_layernorm", ()),
    (None, ("post_attention_layernorm",), None, ("post_feedforward_layernorm",)),  # OLMo 2
)
_DROPOUT1, _DROPOUT2, _SCALE = "resid_attn_dropout", "resid_mlp_dropout", "residual_multiplier"


def anatomies(layer: nn.Module) -> list[BlockSpec]:
    """List what the parts of a decoder layer may be, by their names, most parts first: a block proves which it is."""
    attention, mlp = ATTENTION.of(layer), MLP.of(layer)
    if attention is None or mlp is None:
        return []
    return [
        BlockSpec(
            attn=attention,
            mlp=mlp,
            norm1=norm1,
            norm2=norm2,
            branch1=(*behind1, _DROPOUT1, _SCALE),
            branch2=(*behind2, _DROPOUT2, _SCALE),
            keys=(),  # the cache shows them
            mask=MASK,
            tables=(ROTARY,),
        )
        for norm1, behind1, norm2, behind2 in _NORMS
        if all(name is None or hasattr(layer, name) for name in (norm1, *behind1, norm2, *behind2))
    ]


# language models without images: class without its head -> title. Of a prompt every token but the first (where attention rests)
# and the last (which the next one is read from) is a candidate
TEXT: dict[str, str] = {
    qualified("llama", "LlamaModel"): "Llama",
    qualified("mistral", "MistralModel"): "Mistral",
    qualified("qwen2", "Qwen2Model"): "Qwen2",
    qualified("qwen3", "Qwen3Model"): "Qwen3",
    qualified("gemma", "GemmaModel"): "Gemma",
    qualified("gemma3", "Gemma3TextModel"): "Gemma 3, text",
}
