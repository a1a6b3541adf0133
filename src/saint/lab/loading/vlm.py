"""Vision-language models by name, with their own processor, for the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...errors import UnsupportedModelError
from ...extras import require
from ...upstream import registry
from ...vlm.locate import find
from ..demo import small_llava
from .failures import explained
from .models import resolve_device

DEMO = f"demo:{small_llava.NAME}"


def _package(cls: str) -> str:
    """Package of a qualified class name: configs lie beside the models they are of."""
    return cls.rsplit(".", 2)[0]


@dataclass(frozen=True)
class LoadedVLM:
    """A vision-language model, ready to generate, with its processor."""

    model: Any
    processor: Any
    device: torch.device

    def inputs(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keyword arguments of ``generate``: one image in front of each prompt, in the model's dtype and place.

        Raises:
            ValueError: the processor says neither how a chat looks nor what stands for an image.
        """
        processor = self.processor
        if getattr(processor, "chat_template", None):
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                for prompt in prompts
            ]
        elif isinstance(token := getattr(processor, "image_token", None), str):
            texts = [f"{token}\n{prompt}" for prompt in prompts]
        else:
            raise ValueError(
                f"{type(processor).__name__} has neither a chat template nor an image token, so it is unknown where the image "
                "goes in the prompt"
            )
        made = processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=len(texts) > 1)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {k: t.to(self.device, dtype if t.is_floating_point() else None) for k, t in made.items()}

    def decode(self, tokens: Any) -> str:
        """New tokens as text."""
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()


def is_vlm(spec: str) -> bool:
    """Whether ``spec`` names a vision-language model of a known family (reads its config, no weights)."""
    library, _, name = spec.partition(":")
    if spec == DEMO:
        return True
    if library != "hf" or not name:
        return False
    with explained(spec):
        config = require("transformers", "transformers").AutoConfig.from_pretrained(name)
    kind = next(iter(config.architectures or []), "")
    packages = {_package(model) for model in registry.families()}
    here = _package(f"{type(config).__module__}.{type(config).__qualname__}")
    return here in packages and kind.endswith("ForConditionalGeneration")


def load_vlm(
    spec: str, device: str | torch.device = "cpu", pretrained: bool = True, dtype: torch.dtype | None = None
) -> LoadedVLM:
    """The vision-language model called ``spec`` with its processor.

    Args:
        spec: ``hf:NAME_OR_PATH``, or ``demo:small-llava`` (works offline).
        device: where to put it.
        pretrained: False gives random weights (always the same) and downloads only config and processor.
        dtype: of the weights; None means that of the checkpoint.

    Raises:
        ValueError: not such a name, no generation, or the device is not there.
        UnsupportedModelError: not a family that can be pruned.
        MissingExtraError: transformers is not installed.
        DownloadError: the weights cannot be fetched.
    """
    device = resolve_device(device)
    if spec == DEMO:
        if not pretrained:
            raise ValueError("a demo model is its weights: leave --no-pretrained out")
        return LoadedVLM(small_llava.load().to(device, dtype or torch.float32), small_llava.processor(), device)
    library, colon, name = spec.partition(":")
    if not colon or library != "hf" or not name:
        raise ValueError(f"a vision-language model is hf:NAME_OR_PATH or {DEMO}; got {spec!r}")
    transformers = require("transformers", "vlm")
    auto = transformers.AutoModelForImageTextToText
    with explained(spec):
        config = transformers.AutoConfig.from_pretrained(name)
        if type(config) not in auto._model_mapping:
            raise ValueError(f"{spec} is a {config.model_type} model, which does not answer questions about images")
        if pretrained:
            model: nn.Module = auto.from_pretrained(name, dtype=dtype or "auto")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto.from_config(config, dtype=dtype or torch.float32)
        processor = transformers.AutoProcessor.from_pretrained(name)
    if find(model) is None:
        known = ", ".join(family.title for family in registry.families().values())
        raise UnsupportedModelError(f"{spec} is a {type(model).__name__}, which cannot be pruned; known: {known}")
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return LoadedVLM(model.eval().to(device), processor, device)
