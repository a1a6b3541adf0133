"""Tiny language models without images, and prompts for them."""

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from saint.upstream.tiny import PAD, make, text_config

GEMMA3 = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
MODELS = {  # the head's class, the config, and more of it
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": 6}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GEMMA3),
}


def tiny(name: str):
    """A tiny one with random weights, by its key in MODELS."""
    cls, config, more = MODELS[name]
    return make(cls, config(**text_config(**more)))


def batch(lengths: list[int], side: str = "left", seed: int = 0) -> dict:
    """Prompts padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    most = max(lengths)
    ids, mask = torch.full((len(lengths), most), PAD), torch.zeros(len(lengths), most, dtype=torch.long)
    for row, n in enumerate(lengths):
        where = slice(most - n, most) if side == "left" else slice(0, n)
        ids[row, where] = torch.randint(2, 99, (n,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


WORDS = [f"w{n}" for n in range(100)]


def save_text(path) -> str:
    """A tiny Llama with a tokenizer of a token per word, in a folder: what MODEL is called."""
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)
    model = tiny("llama")
    with torch.no_grad():  # other weights than those that the seed of random ones gives
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(path)
    return f"hf:{path}"
