"""Plans for vision-language models without a recipe of their own."""

from typing import Any

from ...language.layers import read_layers, with_keys
from ...methods.saint import Saint
from ...methods.saint_full_graph import SaintFullGraph
from ...plans import Plan, Stage
from ...vision.derive import with_tower
from ...vision.locate import locate_tower
from ...vlm.locate import locate


def modes(model: Any) -> dict[str, Plan]:
    """A plan per mode that fits any depth, for models without a recipe of their own: about a third of the tokens stays.

    A mode that the family cannot do is left out.
    """
    _, vlm, spec = locate(model, "language")
    spec = with_tower(vlm, spec)
    decoder = vlm.get_submodule(spec.decoder)
    depth = len(list(decoder.get_submodule("layers").children()))
    shown = with_keys(read_layers(decoder.config, depth))
    layers = shown[len(shown) // 5 :][: max(3, len(shown) * 3 // 10)]  # each can drop at most half
    language = Stage(Saint(threshold=0.83, keep=0.15), layers=layers)
    made = {
        "connector": Plan(connector=SaintFullGraph(keep=0.33)),
        "language": Plan(language=language),
    }
    if spec.no_vision is None:
        _, tower, tower_spec = locate_tower(vlm, spec)
        blocks = len(list(tower.get_submodule(tower_spec.blocks).children()))
        used = spec.feature_layer(vlm, blocks)
        if used is not None:
            at = [max(0, min(blocks * 4 // 5, used - 1))]
            made["vision"] = Plan(vision=Stage(SaintFullGraph(keep=0.33), layers=at))
            half = Stage(Saint(threshold=0.83, keep=0.5), layers=layers)
            made["hybrid"] = Plan(vision=Stage(SaintFullGraph(keep=0.5), layers=at), language=half)
    return made
