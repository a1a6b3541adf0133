"""Facts about the decoder layers of transformers, for tokens that go between attention and MLP."""

from .names import MASK, ROTARY
from .specs import BlockSpec

_LLAMA = BlockSpec(
    attn="self_attn",
    mlp="mlp",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    keys=(),  # the cache shows them
    mask=MASK,
    tables=(ROTARY,),
)
_GEMMA3 = BlockSpec(
    attn="self_attn",
    mlp="mlp",
    norm1="input_layernorm",
    norm2="pre_feedforward_layernorm",
    branch1=("post_attention_layernorm",),
    branch2=("post_feedforward_layernorm",),
    keys=(),
    mask=MASK,
    tables=(ROTARY,),
)

# class name of the layer -> its parts
BLOCKS: dict[str, BlockSpec] = {
    **dict.fromkeys(
        (
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen3DecoderLayer",
            "GemmaDecoderLayer",
            "Qwen2VLDecoderLayer",
            "Qwen2_5_VLDecoderLayer",
            "Qwen3VLTextDecoderLayer",
        ),
        _LLAMA,
    ),
    "Gemma3DecoderLayer": _GEMMA3,
}
