"""What a user may hand over as a model."""

from typing import Any, Protocol

from torch import nn


class HoldsModel(Protocol):
    """Something that is no module and keeps one in ``.model``, such as a pipeline of transformers."""

    model: Any


ModelLike = nn.Module | HoldsModel


def module_of(model: ModelLike) -> nn.Module:
    """The model itself, or what it keeps in ``.model``."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if isinstance(found, nn.Module):
        return found
    held = "" if found is None else f", whose .model is of type {type(found).__name__}"
    raise TypeError(
        f"a torch.nn.Module is expected, or an object that keeps one in .model (a pipeline), got {type(model).__name__}{held}"
    )
