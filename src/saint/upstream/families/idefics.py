"""Idefics3 and SmolVLM: a SigLIP of their own, whose patches a pixel shuffle joins by squares."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..specs import EncoderSpec, FamilySpec
from ..tiny import IMAGE, PAD, TinyVLM, make, text_config, tower_config
from ..transformers import CLIP_BLOCK, qualified


def _build(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as hf

        config = getattr(hf, f"{name}Config")(
            vision_config=tower_config(),
            text_config=hf.LlamaConfig(**text_config()),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
        return make(getattr(hf, f"{name}ForConditionalGeneration"), config)

    return build


def _by_sample(sizes: list[list[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """``pixel_values`` [B, images, 3, 24, 24]: each sample's images, behind them zeros."""
    images = iter(torch.randn(sum(map(len, sizes)), 3, 24, 24, generator=generator))
    pixels = torch.zeros(len(sizes), max(map(len, sizes)), 3, 24, 24)
    for sample, own in enumerate(sizes):
        for image in range(len(own)):
            pixels[sample, image] = next(images)
    return {"pixel_values": pixels}


def _family(name: str) -> FamilySpec:
    module = name.lower()
    return FamilySpec(
        title=name,
        model=qualified(module, f"{name}Model"),
        tower="vision_model",
        connector="connector",
        decoder="text_model",
        merge_size=lambda m: m.connector.scale_factor,
        tower_spec=EncoderSpec(
            title=name,
            library="transformers",
            encoder=qualified(module, f"{name}VisionTransformer"),
            blocks="encoder.layers",
            block_specs={f"{name}EncoderLayer": CLIP_BLOCK},
            prefix=lambda m: 0,
            patch="embeddings.patch_embedding",
            final="post_layernorm",
        ),
        tiny=(
            TinyVLM(
                module,
                _build(name),
                _by_sample,
                decoder="model.text_model.layers",
                tower="model.vision_model.encoder.layers",
                merge_size=2,
            ),
        ),
    )


SPECS = (_family("Idefics3"), _family("SmolVLM"))
