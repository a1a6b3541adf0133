"""Facts about the decoder layers of transformers, for tokens that go between attention and MLP; and language models of them."""

from .names import MASK, ROTARY
from .specs import BlockSpec
from .transformers import qualified

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
