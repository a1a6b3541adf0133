"""What every tiny vision-language model shares: sizes, lively random weights, and prompts with images.

The models themselves are beside the facts of their family, in ``families``. Tests, and tools that must run a family without
a download, use the same ones.

Letters: B prompts, L positions of the longest prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, START, END, PAD, VOCAB = 100, 101, 102, 103, 0, 128  # token ids, and how many there are
LAYERS = 5  # of the language models; real ones have 28..48

Pixels = Callable[[list[list[int]], torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class TinyVLM:
    """A small random model of a family, how its inputs look, and where its parts are.

    The paths and sizes repeat what the family's spec says or reads off the instance: tests hold one against the other.

    Attributes:
        name: short name, unique among all families.
        build: the model with its language head, in eval mode, always with the same weights. Imports its library.
        pixels: keyword inputs for the images of a batch, from the sizes of each prompt's images (0 or 1) and a generator.
        decoder: path of the language model's layers.
        tower: path of the tower's layers; None where the vision stage is refused.
        types: name of the input with token types, or None.
        types_mark_images: token types are 1 at images, else 0 everywhere.
        delimited: a token in front of each image and one behind it, as the processors of Qwen write them.
        merge_size: side of the squares of patches that become one visual token.
        prefix: tokens in front of the patches in the tower.
        attention: path of the module in a layer of the tower that takes the mask; "" where the layer itself takes it.
    """

    name: str
    build: Callable[[], nn.Module]
    pixels: Pixels
    decoder: str = "model.language_model.layers"
    tower: str | None = None
    types: str | None = None
    types_mark_images: bool = False
    delimited: bool = False
    merge_size: int = 1
    prefix: int = 0
    attention: str = ""


def text_config(**more: Any) -> dict[str, Any]:
    """Arguments of a config of a small language model (real: 2048..5120 channels, 16..40 heads)."""
    return {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 1024, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.25, "head_dim": 12, **more,
    }  # fmt: skip


def tower_config(**more: Any) -> dict[str, Any]:
    """Arguments of a config of a small vision tower on 6 x 6 patches (real: 768..1152 channels, 24..27 layers)."""
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24,
        "patch_size": 4, **more,
    }  # fmt: skip


def make(cls: Any, config: Any) -> nn.Module:
    """A ``cls`` with random weights in which images and layers matter."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # towers start too flat for keys to differ, and Gemma 3's projection starts with zeros
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("vision", "visual", "mm_input_projection")) and parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def squares(side: int) -> Pixels:
    """One picture of ``side`` x ``side`` pixels per image, whatever its size: ``pixel_values`` [images, 3, side, side]."""

    def pixels(sizes: list[list[int]], generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(sum(map(len, sizes)), 3, side, side, generator=generator)}

    return pixels


def tiles(sizes: list[list[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Any-resolution tiles, [images, 5, 3, 24, 24]: size 0 is wide (base + 2 tiles), size 1 square (base + 4) with padding."""
    flat = [size for sample in sizes for size in sample]
    pixels = torch.zeros(len(flat), 5, 3, 24, 24)
    for image, size in enumerate(flat):
        count = (3, 5)[size]
        pixels[image, :count] = torch.randn(count, 3, 24, 24, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[(24, 48), (44, 48)][size] for size in flat])}


def prompts(tiny: TinyVLM, model: Any, samples: Sequence[Sequence[object]], seed: int = 0) -> dict[str, Any]:
    """A left-padded batch: keyword inputs of ``model``.

    Args:
        tiny: describes the inputs of ``model``.
        model: built by ``tiny``, or a changed copy.
        samples: one per prompt, of integers (so many text tokens) and strings ("0", "1": an image of that size).
        seed: of a private generator.

    Returns:
        ``input_ids`` and ``attention_mask``, [B, L], what ``tiny.pixels`` makes, and token types [B, L] where the family has
        them.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [[int(part) for part in sample if isinstance(part, str)] for sample in samples]
    images = sum(map(len, sizes))
    inputs = tiny.pixels(sizes, generator) if images else {}
    counts = iter(_placeholders(model, inputs, images) if images else [])
    tokens: list[list[int]] = []
    for sample in samples:
        tokens.append([])
        for part in sample:
            if isinstance(part, str):
                places = [IMAGE] * next(counts)
                tokens[-1] += [START, *places, END] if tiny.delimited else places
            elif isinstance(part, int):
                tokens[-1] += torch.randint(2, 99, (part,), generator=generator).tolist()
    longest = max(map(len, tokens))
    ids = torch.tensor([[PAD] * (longest - len(sample)) + sample for sample in tokens])
    inputs["attention_mask"] = torch.tensor([[0] * (longest - len(sample)) + [1] * len(sample) for sample in tokens])
    inputs["input_ids"] = ids
    if tiny.types is not None:
        inputs[tiny.types] = (ids == IMAGE).long() if tiny.types_mark_images else torch.zeros_like(ids)
    return inputs


def _placeholders(model: Any, pixels: dict[str, Tensor], images: int) -> list[int]:
    """Tokens that stand for each image in a prompt."""
    with torch.no_grad():
        features = model.get_image_features(**pixels, return_dict=True).pooler_output
    lengths = [len(feature) for feature in features]
    return lengths if len(lengths) == images else [sum(lengths) // images] * images  # Idefics3 joins those of a sample
