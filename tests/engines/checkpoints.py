"""Tiny random vision-language models as folders that an engine loads: weights, a tokenizer of words, a processor.

python checkpoints.py FAMILY FOLDER
"""

import sys
from functools import partial
from pathlib import Path

from saint.upstream.tiny import END, IMAGE, PAD, START, VIDEO, VOCAB, make, text_config, tower_config

SIDE, PATCH = 24, 4  # pixels; 6 x 6 patches
TOKENS = (SIDE // PATCH) ** 2
# attention kernels of engines want heads of 32 and more
TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def tokenizer(image: str = "<image>", *more: str, **named: str):
    """One token per word: ``w17`` is token 17. Named ones become attributes of the tokenizer."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<unk>": 1, image: IMAGE}
    for token in (*more, *named.values()):
        special.setdefault(token, max(IMAGE, *special.values()) + 1)
    words = {f"w{token}": token for token in range(VOCAB) if token not in special.values()}
    inner = Tokenizer(models.WordLevel({**words, **special}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named,
        model_max_length=1024,
        chat_template=(
            "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
            "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ ' IMAGE ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        ).replace("IMAGE", image),
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


def _save(name: str, config: object, folder: Path, processor: object) -> None:
    import transformers as hf

    make(getattr(hf, f"{name}ForConditionalGeneration"), config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _clip():
    import transformers as hf

    return hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def llava(folder: Path) -> None:
    import transformers as hf

    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config()),
        text_config=hf.LlamaConfig(**text_config(**TEXT)),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
    )
    processor = hf.LlavaProcessor(
        _clip(), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    _save("Llava", config, folder, processor)
    _as_on_the_hub(folder, {"vision_tower.": "vision_tower.vision_model."})


def llava_next(folder: Path) -> None:
    import transformers as hf

    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config()),
        text_config=hf.LlamaConfig(**text_config(**TEXT)),
        image_token_id=IMAGE,
        image_grid_pinpoints=grids,
        image_seq_length=TOKENS,
    )
    pixels = hf.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    processor = hf.LlavaNextProcessor(
        pixels, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    _save("LlavaNext", config, folder, processor)
    _as_on_the_hub(folder, {"vision_tower.": "vision_tower.vision_model."})


def llava_onevision(folder: Path) -> None:
    import transformers as hf

    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**tower_config(vision_use_head=False)),
        text_config=hf.Qwen2Config(**text_config(**TEXT)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer("<image>", "<video>"),
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
    )
    _save("LlavaOnevision", config, folder, processor)
    _as_on_the_hub(folder, {"vision_tower.": "vision_tower.vision_model."})


def internvl(folder: Path) -> None:
    import transformers as hf

    config = hf.InternVLConfig(
        vision_config=tower_config(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        text_config=hf.Qwen2Config(**text_config(**TEXT)),
        image_token_id=IMAGE,
        image_seq_length=TOKENS // 4,
    )
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"height": SIDE, "width": SIDE}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=4),
        tokenizer("<IMG_CONTEXT>", **names),
        hf.InternVLVideoProcessor(size=size),
        image_seq_length=TOKENS // 4,
    )
    _save("InternVL", config, folder, processor)


def _idefics3(name: str, folder: Path) -> None:
    import transformers as hf

    config = getattr(hf, f"{name}Config")(
        vision_config=tower_config(),
        text_config=hf.LlamaConfig(**text_config(**TEXT)),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    words = tokenizer(
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        "\n",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    )
    sides = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    pixels = getattr(hf, f"{name}ImageProcessor")(**sides)
    if name == "SmolVLM":
        processor = hf.SmolVLMProcessor(pixels, words, hf.SmolVLMVideoProcessor(**sides), image_seq_len=TOKENS // 4)
    else:
        processor = hf.Idefics3Processor(pixels, words, image_seq_len=TOKENS // 4)
    _save(name, config, folder, processor)


def gemma3(folder: Path) -> None:
    import transformers as hf

    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    config = hf.Gemma3Config(
        vision_config=tower_config(vision_use_head=False, image_size=2 * SIDE),
        mm_tokens_per_image=TOKENS,
        image_token_id=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
        text_config=text_config(**TEXT, sliding_window=512, layer_types=kinds * 2, num_hidden_layers=6),
    )
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    words = tokenizer("<image>", "<boi>", "<eoi>", *("\n" * count for count in (1, 2, 3, 4)), **names)
    pixels = hf.Gemma3ImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE})
    _save("Gemma3", config, folder, hf.Gemma3Processor(pixels, words, image_seq_length=TOKENS))
    _as_on_the_hub(folder, {"vision_tower.": "vision_tower.vision_model."})


def _qwen(name: str, folder: Path) -> None:
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    tower = {
        "depth": 4, "num_heads": 2, "patch_size": PATCH, "hidden_size": 32, "out_hidden_size": TEXT["hidden_size"],
        "intermediate_size": 48,
    }  # fmt: skip
    if name == "Qwen3VL":
        tower |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
        rope["mrope_interleaved"] = True
    elif name == "Qwen2VL":
        tower |= {"embed_dim": tower.pop("hidden_size"), "hidden_size": tower.pop("out_hidden_size"), "mlp_ratio": 2}
    else:
        tower |= {"window_size": 16, "fullatt_block_indexes": [2]}
    config = getattr(hf, f"{name}Config")(
        vision_config=tower,
        text_config=text_config(**TEXT, rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    sizes = {"patch_size": PATCH, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    videos = hf.Qwen3VLVideoProcessor if name == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    processor = getattr(hf, f"{name}Processor")(hf.Qwen2VLImageProcessor(**sizes), words, videos(**sizes))
    _save(name, config, folder, processor)


FAMILIES = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": partial(_idefics3, "Idefics3"),
    "smolvlm": partial(_idefics3, "SmolVLM"),
    "gemma3": gemma3,
    "qwen2-vl": partial(_qwen, "Qwen2VL"),
    "qwen2.5-vl": partial(_qwen, "Qwen2_5_VL"),
    "qwen3-vl": partial(_qwen, "Qwen3VL"),
}

if __name__ == "__main__":
    FAMILIES[sys.argv[1]](Path(sys.argv[2]))
