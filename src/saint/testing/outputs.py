"""Runs a model and names the tensors that it returns."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]


def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """All floating-point tensors a forward returns, by name ("output" for a bare tensor)."""
    with torch.no_grad():
        return dict(tensors(model(**inputs)))


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in what a model returned, by path: "output", "logits", "image_outputs.pooler_output", ..."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():  # nested: outputs of a tower, which are not the model's own of the same name
            yield from tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name or 'output'}[{index}]")
