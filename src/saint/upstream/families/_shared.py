"""Facts that several families of transformers share."""

from typing import Any

CLIP_LAYERS = "model.vision_tower.encoder.layers"  # of the towers CLIP and SigLIP in a tiny model


def feature_layer(model: Any, depth: int) -> int | None:
    """Index into the tower's ``depth + 1`` hidden states that the config names; None where it names several."""
    layer = model.config.vision_feature_layer
    if isinstance(layer, (list, tuple)) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        return None
    return layer if layer >= 0 else depth + 1 + layer
