"""The features of an image: what goes into a model's classifier, or the model's answer where it has none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import answer


def classifier(model: nn.Module) -> nn.Linear | None:
    """The classifier: what timm's ``get_classifier`` or transformers' ``classifier`` is; None where it is no linear layer."""
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()  # type: ignore[operator]
        head = head[0] if isinstance(head, tuple) else head  # distilled DeiT has two
    else:
        head = next((getattr(model, n) for n in ("classifier", "cls_classifier") if hasattr(model, n)), None)
    return head if isinstance(head, nn.Linear) else None


class Features:
    """One forward that gives features [B, C] and, where there is a classifier, logits [B, classes]; float32, on the CPU.

    Args:
        model: an encoder; its classifier gets a hook, which :meth:`remove` takes off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.features: Tensor | None = None
        head = classifier(model)
        self._hook = None if head is None else head.register_forward_pre_hook(self._note)

    def _note(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.features = args[0]

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        self.features = None
        with torch.inference_mode():
            _, output = answer(self.model(**inputs))
        output = output.flatten(1).float().cpu()
        if self.features is None:
            return output, None
        features = self.features if self.features.ndim == 2 else self.features[:, 0]
        return features.float().cpu(), output

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
