"""Language models without images by name, with their tokenizer, for the command line."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...extras import require
from ...language.locate import find
from ...upstream.decoders import TEXT
from ..demo import smollm2
from .failures import explained
from .models import resolve_device

DEMO = f"demo:{smollm2.NAME}"


@dataclass(frozen=True)
class LoadedText:
    """A language model without images, ready to run, with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device

    def inputs(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of ``model.forward``: the text as it is, without a chat template; a batch of one.

        Raises:
            ValueError: fewer than 4 tokens: the first and last stay, and one has nobody to be compared with.
        """
        made = self.tokenizer(prompt, return_tensors="pt")
        if (count := made["input_ids"].shape[1]) < 4:
            raise ValueError(f"a prompt needs at least 4 tokens, got {count}: the first and last stay")
        return {**{name: made[name].to(self.device) for name in ("input_ids", "attention_mask")}, "logits_to_keep": 1}


def is_text(spec: str) -> bool:
    """Whether ``spec`` names a language model without images (reads its config, no weights)."""
    library, _, name = spec.partition(":")
    if spec == DEMO:
        return True
    if library != "hf" or not name:
        return False
    with explained(spec):
        config = require("transformers", "transformers").AutoConfig.from_pretrained(name)
    return next(iter(config.architectures or []), "").endswith(("ForCausalLM", "LMHeadModel"))


def load_text(
    spec: str, device: str | torch.device = "cpu", pretrained: bool = True, dtype: torch.dtype | None = None
) -> LoadedText:
    """The language model called ``spec`` with its tokenizer.

    Args:
        spec: ``hf:NAME_OR_PATH``, or ``demo:smollm2-135m`` (works offline).
        device: where to put it.
        pretrained: False gives random weights (always the same) and downloads only config and tokenizer.
        dtype: of the weights; None means that of the checkpoint.

    Raises:
        ValueError: not such a name, or the device is not there.
        UnsupportedModelError: no language model that is known.
        MissingExtraError: transformers is not installed, or what reads the demo's weights.
        DownloadError: the weights cannot be fetched.
    """
    device = resolve_device(device)
    library, _, name = spec.partition(":")
    if spec == DEMO:
        if not pretrained:
            raise ValueError("a demo model is its weights: leave --no-pretrained out")
        model, tokenizer = smollm2.load(dtype or torch.float32)
        return LoadedText(model.to(device), tokenizer, device)
    if library != "hf" or not name:
        raise ValueError(f"a language model is hf:NAME_OR_PATH or {DEMO}; got {spec!r}")
    transformers = require("transformers", "vlm")
    auto = transformers.AutoModelForCausalLM
    with explained(spec):
        if pretrained:
            network: nn.Module = auto.from_pretrained(name, dtype=dtype or "auto")
        else:
            config = transformers.AutoConfig.from_pretrained(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = auto.from_config(config, dtype=dtype or torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if find(network) is None:
        raise UnsupportedModelError(
            f"{spec} is a {type(network).__name__}, whose layers are not known; known language models without images: "
            f"{', '.join(TEXT.values())}"
        )
    return LoadedText(network.eval().to(device), tokenizer, device)
