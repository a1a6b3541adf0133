"""Tiny random vision-language models as folders that an engine loads: weights, a tokenizer of words, a processor.

    python checkpoints.py FAMILY FOLDER
"""

import sys
from pathlib import Path

from saint.upstream.tiny import IMAGE, PAD, VOCAB, make, text_config, tower_config

SIDE, PATCH = 24, 4  # pixels; 6 x 6 patches
TOKENS = (SIDE // PATCH) ** 2
# attention kernels of engines want heads of 32 and more
TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def tokenizer(**more):
    """One token per word: ``w17`` is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{token}": token for token in range(VOCAB) if token not in (PAD, IMAGE)}
    inner = Tokenizer(models.WordLevel({**words, "<pad>": PAD, "<image>": IMAGE}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="w1",
        additional_special_tokens=["<image>"],
        model_max_length=1024,
        chat_template=(
            "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
            "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ ' <image> ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        ),
        **more,
    )


def _as_on_the_hub(folder: Path, prefixes: dict[str, str]) -> None:
    """Rename weights to what published checkpoints call them: recent releases of transformers write other names."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    renamed = {}
    for name, weight in load_file(file).items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name if old is None or name.startswith(prefixes[old]) else prefixes[old] + name[len(old) :]] = weight
    save_file(renamed, file, {"format": "pt"})


def llava(folder: Path) -> None:
    import transformers as hf

    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config()),
        text_config=hf.LlamaConfig(**text_config(**TEXT)),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
    )
    make(hf.LlavaForConditionalGeneration, config).save_pretrained(folder)
    _as_on_the_hub(folder, {"vision_tower.": "vision_tower.vision_model."})
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


FAMILIES = {"llava": llava}

if __name__ == "__main__":
    FAMILIES[sys.argv[1]](Path(sys.argv[2]))
