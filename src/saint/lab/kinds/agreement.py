"""How much a pruned model's answer differs from the unpruned one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# the first that a model returns is its answer
_ANSWERS = ("image_embeds", "logits", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Agreement:
    """Similarity of two answers, per sample.

    Attributes:
        answer: which output was compared.
        measure: "cosine" of vectors, or "correlation" (Pearson) of maps.
        values: one per sample, 1 = the same.
        same_top1: for logits, whether the winner is the same; else None.
    """

    answer: str
    measure: str
    values: list[float]
    same_top1: list[bool] | None = None


def answer(output: Any) -> tuple[str, Tensor]:
    """The tensor a user of the model looks at, and its name.

    Args:
        output: what ``model(...)`` returned.

    Returns:
        [B, C] for a vector, [B, 1, H, W] for a map.

    Raises:
        ValueError: no such tensor.
    """
    name = "output"
    if isinstance(output, Mapping):
        name = next((key for key in _ANSWERS if output.get(key) is not None), "")
        if not name:
            raise ValueError(f"no answer to compare among the outputs {list(output)}; looked for {', '.join(_ANSWERS)}")
        output = output[name]
    elif isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"no answer to compare in a {type(output).__name__}")
    if output.ndim == 3:  # tokens, of which a pruned model returns fewer: the first is the CLS token, if there is one
        output = output[:, 0]
    return name, output


def agreement(base: Any, pruned: Any) -> Agreement:
    """Compare what an unpruned and a pruned forward returned for the same B pictures.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])).values
        [1.0]
    """
    name, a = answer(base)
    _, b = answer(pruned)
    if a.shape != b.shape:
        raise ValueError(f"the answers have shapes {tuple(a.shape)} and {tuple(b.shape)}, which cannot be compared")
    flat_a, flat_b = a.flatten(1).double().cpu(), b.flatten(1).double().cpu()
    if a.ndim == 4:
        flat_a, flat_b = flat_a - flat_a.mean(1, keepdim=True), flat_b - flat_b.mean(1, keepdim=True)
    values = torch.nn.functional.cosine_similarity(flat_a, flat_b).tolist()
    top1 = (flat_a.argmax(1) == flat_b.argmax(1)).tolist() if name == "logits" else None
    return Agreement(name, "correlation" if a.ndim == 4 else "cosine", values, top1)
