"""Tiny random vision-language models from the real config classes, inputs for them, and the masked oracle.

The oracle knows nothing of the pruning path: it runs the *full* sequence through an untouched copy of the model, without a
cache, and hides the dropped tokens as keys from every attention behind their drop point.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saint.upstream.names import CACHE, Parameters, Role

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

IMAGE, VIDEO, START, END, PAD, VOCAB = 100, 101, 102, 103, 0, 128
LAYERS = 5  # of the language models; real ones have 28..48


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    pixels: Callable[[list[int], torch.Generator], dict]  # one entry per image: a size, 0 or 1
    decoder: str  # path of the language model's layers
    tower: str | None = None  # path of the tower's layers, where the vision stage works
    types: str | None = None  # name of the token-type input
    merge_size: int = 1  # side of the squares of patches that become one visual token
    prefix: int = 0  # tokens in front of the patches in the tower
    attention: str = ""  # path of the module in a layer of the tower that takes the mask


def _text(**more) -> dict:
    return {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 1024, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.25, "head_dim": 12, **more,
    }  # fmt: skip


def _tower(**more) -> dict:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24,
        "patch_size": 4, **more,
    }  # fmt: skip


def _make(cls, config) -> nn.Module:
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # towers start too flat for keys to differ, and Gemma 3's projection starts with zeros
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("vision", "visual", "mm_input_projection")) and parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _llava(text_cls, **more):
    def build():
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_tower()), text_config=text_cls(**_text(**more)), image_token_id=IMAGE,
            image_seq_length=36,
        )  # fmt: skip
        return _make(hf.LlavaForConditionalGeneration, config)

    return build


def _llava_next():
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_tower()), text_config=hf.LlamaConfig(**_text()), image_token_id=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )  # fmt: skip
    return _make(hf.LlavaNextForConditionalGeneration, config)


def _onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_tower(vision_use_head=False)), text_config=hf.Qwen2Config(**_text()),
        image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )  # fmt: skip
    return _make(hf.LlavaOnevisionForConditionalGeneration, config)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}


def _qwen2_vl():
    config = hf.Qwen2VLConfig(
        vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4},
        text_config=_text(rope_parameters=_MROPE), image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return _make(hf.Qwen2VLForConditionalGeneration, config)


def _qwen25_vl():
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 4, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 4, "intermediate_size": 48,
            "window_size": 16, "fullatt_block_indexes": [2],
        },
        text_config=_text(rope_parameters=_MROPE), image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return _make(hf.Qwen2_5_VLForConditionalGeneration, config)


def _qwen3_vl():
    config = hf.Qwen3VLConfig(
        vision_config={
            "depth": 4, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 4, "intermediate_size": 48,
            "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64,
        },
        text_config={**_text(rope_parameters=_MROPE), "bos_token_id": 1}, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return _make(hf.Qwen3VLForConditionalGeneration, config)


def _internvl():
    config = hf.InternVLConfig(
        vision_config=_tower(), text_config=hf.Qwen2Config(**_text()), image_token_id=IMAGE, image_seq_length=9
    )
    return _make(hf.InternVLForConditionalGeneration, config)


def _gemma3():
    config = hf.Gemma3Config(
        vision_config=_tower(vision_use_head=False, image_size=48), mm_tokens_per_image=36, image_token_id=IMAGE,
        text_config={**_text(), "sliding_window": 24, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
                     "num_hidden_layers": 6},
    )  # fmt: skip
    config.text_config.layer_types = config.text_config.layer_types[:6]
    return _make(hf.Gemma3ForConditionalGeneration, config)


def _paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=_tower(vision_use_head=False, projection_dim=48), text_config={"model_type": "gemma", **_text()},
        image_token_id=IMAGE, projection_dim=48, hidden_size=48,
    )  # fmt: skip
    return _make(hf.PaliGemmaForConditionalGeneration, config)


def _idefics3(config_cls, cls):
    def build():
        config = config_cls(
            vision_config=_tower(image_size=24), text_config=hf.LlamaConfig(**_text()), image_token_id=IMAGE,
            scale_factor=2, pad_token_id=PAD,
        )  # fmt: skip
        return _make(cls, config)

    return build


# -- upstream's spellings -------------------------------------------------------------------------------------------------


def cache_of(output) -> object:
    """The cache in what a model returned."""
    return CACHE.get(output)


def cached(model: nn.Module, cache) -> dict:
    """The keyword argument that hands ``cache`` to ``model``."""
    return Parameters(type(model).forward).put({}, CACHE, cache)


def checkpoint(model: nn.Module) -> None:
    """Switch on gradient checkpointing, without re-entrance."""
    enable = Role("activation_checkpointing_enable", "gradient_checkpointing_enable").get(model)
    enable({"use_reentrant": False})


# -- pixels -----------------------------------------------------------------------------------------------------------


def _plain(side: int):
    return lambda sizes, g: {"pixel_values": torch.randn(len(sizes), 3, side, side, generator=g)}


def _tiles(sizes: list[int], g) -> dict:
    """Any-resolution tiles: size 0 is a wide image (base + 2 tiles), size 1 a square one (base + 4) with padding."""
    count = [3, 5]
    pixels = torch.zeros(len(sizes), 5, 3, 24, 24)
    for row, size in enumerate(sizes):
        pixels[row, : count[size]] = torch.randn(count[size], 3, 24, 24, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[(24, 48), (44, 48)][size] for size in sizes])}


def _patches(sizes: list[int], g) -> dict:
    grids = [[(1, 8, 12), (1, 8, 8)][size] for size in sizes]
    count = sum(t * h * w for t, h, w in grids)
    return {"pixel_values": torch.randn(count, 3 * 2 * 4 * 4, generator=g), "image_grid_thw": torch.tensor(grids)}


_LLAMA = "model.language_model.layers"
_CLIP = "model.vision_tower.encoder.layers"
_QWEN = "model.visual.blocks"
FAMILIES = {
    f.name: f
    for f in [
        Family("llava-llama", _llava(hf.LlamaConfig), _plain(24), _LLAMA, _CLIP, prefix=1),
        Family("llava-mistral", _llava(hf.MistralConfig, sliding_window=None), _plain(24), _LLAMA, _CLIP, prefix=1),
        Family("llava-qwen2", _llava(hf.Qwen2Config), _plain(24), _LLAMA, _CLIP, prefix=1),
        Family("llava-next", _llava_next, _tiles, _LLAMA, _CLIP, prefix=1),
        Family("llava-onevision", _onevision, _tiles, _LLAMA),
        Family("qwen2-vl", _qwen2_vl, _patches, _LLAMA, _QWEN, types="mm_token_type_ids", merge_size=2, attention="attn"),
        Family("qwen2.5-vl", _qwen25_vl, _patches, _LLAMA, _QWEN, types="mm_token_type_ids", merge_size=2, attention="attn"),
        Family("qwen3-vl", _qwen3_vl, _patches, _LLAMA, _QWEN, types="mm_token_type_ids", merge_size=2, attention="attn"),
        Family("internvl", _internvl, _plain(24), _LLAMA, "model.vision_tower.encoder.layer", merge_size=2, prefix=1,
               attention="attention"),
        Family("gemma3", _gemma3, _plain(48), _LLAMA, _CLIP, types="token_type_ids", merge_size=2),
        Family("paligemma", _paligemma, _plain(24), _LLAMA, _CLIP, types="token_type_ids"),
        Family("idefics3", _idefics3(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration), _plain(24),
               "model.text_model.layers", "model.vision_model.encoder.layers", merge_size=2),
        Family("smolvlm", _idefics3(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration), _plain(24),
               "model.text_model.layers", "model.vision_model.encoder.layers", merge_size=2),
    ]
}  # fmt: skip


def prompts(family: Family, model: nn.Module, samples: list[list[object]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch. A sample is a list of ints (so many text tokens) and strings ("0", "1": an image of that size)."""
    g = torch.Generator().manual_seed(seed)
    sizes = [int(part) for sample in samples for part in sample if isinstance(part, str)]
    inputs = family.pixels(sizes, g) if sizes else {}
    if sizes and family.name in ("idefics3", "smolvlm"):
        # these want one row of images per sample, zeros where there is none
        per = [sum(isinstance(part, str) for part in sample) for sample in samples]
        pixels, rows = iter(inputs["pixel_values"]), []
        for n in per:
            rows.append(torch.stack([next(pixels) if i < n else torch.zeros(3, 24, 24) for i in range(max(per))]))
        inputs["pixel_values"] = torch.stack(rows)
    counts = iter(_counts(model, inputs, len(sizes)) if sizes else [])
    rows = []
    for sample in samples:
        row = []
        for part in sample:
            if isinstance(part, str):
                places = [IMAGE] * next(counts)
                row += (
                    [START, *places, END] if family.types == "mm_token_type_ids" else places
                )  # as processors of Qwen do
            else:
                row += torch.randint(2, 99, (part,), generator=g).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    inputs["attention_mask"] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs["input_ids"] = ids
    if family.types == "mm_token_type_ids" or family.name == "gemma3":
        inputs[family.types] = (ids == IMAGE).long()
    elif family.types:
        inputs[family.types] = torch.zeros_like(ids)
    return inputs


def _counts(model: nn.Module, pixels: dict[str, Tensor], images: int) -> list[int]:
    """Placeholders per image."""
    with torch.no_grad():
        features = model.get_image_features(**pixels, return_dict=True).pooler_output
    lengths = [len(feature) for feature in features]
    return lengths if len(lengths) == images else [sum(lengths) // images] * images  # Idefics3 joins those of a sample


# -- the masked oracle ------------------------------------------------------------------------------------------------


def hide(stack, layers: nn.ModuleList, gone_before: Callable[[int], Tensor | None]) -> None:
    """Hide keys: ``gone_before(i)`` is bool [B, L'], the tokens that layer i must not attend to. Eager masks only."""

    def hook(index: int):
        def mask_keys(_module, args, kwargs):
            gone = gone_before(index)
            if gone is None:
                return None
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")  # CLIP layers take it by position
            if mask is None:
                mask = torch.zeros(gone.shape[0], 1, 1, gone.shape[1])
            more = torch.nn.functional.pad(gone, (0, mask.shape[-1] - gone.shape[1]))
            low = torch.finfo(mask.dtype).min
            return args[:1], {**kwargs, "attention_mask": mask.masked_fill(more[:, None, None], low)}

        return mask_keys

    for index, layer in enumerate(layers):
        stack.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)


def hide_packed(stack, attentions: list[nn.Module], gone_before: Callable[[int], Tensor | None]) -> None:
    """Like :func:`hide` for a packed sequence, bool [N]: eager attention runs its segments one by one, without masks."""
    pieces: list[Tensor] = []

    class Mask(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is nn.functional.softmax and pieces:
                gone = pieces.pop(0)
                assert args[0].shape[-1] == len(gone)
                if not bool(gone.all()):  # in an empty window nobody is left to look
                    args = (args[0].masked_fill(gone, -torch.inf), *args[1:])
            return func(*args, **(kwargs or {}))

    def hook(index: int):
        def cut(_module, _args, kwargs):
            assert not pieces
            gone = gone_before(index)
            if gone is not None:
                pieces.extend(gone.split(kwargs["cu_seqlens"].diff().tolist()))

        return cut

    for index, attention in enumerate(attentions):
        stack.callback(attention.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
    stack.enter_context(Mask())


def members(family: Family, groups: int) -> Tensor:
    """Patches of each visual token of one image, int64 [G, M]: squares of the patch grid, row by row."""
    side, k = round(groups**0.5), family.merge_size
    return torch.tensor(
        [
            [(k * row + i) * k * side + k * column + j for i in range(k) for j in range(k)]
            for row in range(side)
            for column in range(side)
        ]
    )


def missing(kept: list[Tensor], places: Tensor) -> Tensor:
    """bool [B, L]: the candidates (``places`` marks them, in order) that are not among ``kept``."""
    gone = torch.zeros_like(places)
    for row, (where, keep) in enumerate(zip(places, kept, strict=True)):
        index = where.nonzero().flatten()
        stay = torch.zeros(len(index), dtype=torch.bool)
        stay[keep] = True
        gone[row, index[~stay]] = True
    return gone


def oracle_model(model: nn.Module) -> nn.Module:
    """An untouched copy that takes masks; make it before the plan is applied."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin
