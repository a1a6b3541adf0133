"""What is known of a vision-language family: one row, plain facts. The table is in families.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FamilyRow:
    """One supported family.

    Attributes:
        title: how people call it.
        model: qualified name of the class that merges image features into the text (the model without its head).
        tower: path of the vision tower.
        connector: path of the module between tower and language model.
        decoder: path of the language model.
        merge: method of the model that learns where the placeholders are, called whenever there are features to merge: it
            returns the mask, or a tuple of masks (images, videos), each [B, L, 1 or C]; or it is ``inputs_merger``, which
            does the merging itself.
        pixels: arguments of the model's forward that bring images or videos.
        no_vision: why the vision stage is not possible, or None.
        joins: side of the square of patches that is joined into one token between tower and language model, from the
            instance; None where every patch becomes a token.
        taps: paths of further modules that join patches, and the tower's hidden states they read (0 = embeddings), from the
            instance (DeepStack).
        feature_layer: index into the tower's hidden states (0 = embeddings) of the features used, from the instance; None
            where the features of several layers are joined.
        between: layers behind which the model adds to the full sequence, from the instance (DeepStack).
        refuse: reason why this instance cannot be pruned at a stage, or None.
    """

    title: str
    model: str
    tower: str = "vision_tower"
    connector: str = "multi_modal_projector"
    decoder: str = "language_model"
    merge: str = "get_placeholder_mask"
    pixels: tuple[str, ...] = ("pixel_values",)
    no_vision: str | None = None
    joins: Callable[[Any], int | None] = lambda _: None
    taps: Callable[[Any], dict[str, int]] = lambda _: {}
    feature_layer: Callable[[nn.Module, int], int | None] = lambda _, depth: depth
    between: Callable[[nn.Module], int] = lambda _: 0
