"""Which tokens a plan keeps of a few images of a run, as plain data for its record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...plans import Plan
from ...session import pruned
from ..images import data_uri, reason
from .facts import layer_facts, steps_of
from .reasons import Reasons
from .tiles import tiles, visual_tokens

SHOWN = 3  # images of a run: one may be odd, and a record of three stays small whatever the size of the run
_SIDE = 256  # pixels of a picture


def survivors(
    loaded: Any, plan: Plan, items: Sequence[Any], inputs: Callable[[Any, Any], Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The first ``SHOWN`` of ``items``, read again: the run that measured them holds no images.

    Args:
        loaded: a ``Loaded`` encoder or a ``LoadedVLM``.
        plan: what drops.
        items: images of the run in order, with ``id``, ``where`` and ``load()``.
        inputs: makes the keyword arguments of ``model.forward`` from an item and its image.

    Returns:
        Photographs as `saint view` writes them, with the reasons of every drop point; where and why others are not shown.
    """
    photos, left_out = [], []
    for item in items[:SHOWN]:
        try:
            image = item.load()
            facts = (_tiled if hasattr(loaded, "processor") else _patches)(loaded, plan, image, inputs(item, image))
        except (OSError, ValueError) as error:
            left_out.append([str(item.where), reason(error)])
            continue
        photos.append({"name": str(item.id), **facts})
    return photos, left_out


def _patches(loaded: Any, plan: Plan, image: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of an encoder.

    Raises:
        ValueError: its patches are on no grid.
    """
    picture, grid = data_uri(loaded.picture(image), _SIDE), list(loaded.grid)
    trace, reasons = _run(loaded.model, plan, inputs)
    layers = [layer_facts(t, 0, why[0]) for t, why in zip(trace, reasons, strict=True)]
    return {"grid": grid, "picture": picture, "layers": layers}


def _tiled(loaded: Any, plan: Plan, image: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a vision-language model.

    Raises:
        ValueError: its pixels show no grid.
    """
    seen = tiles(loaded.model, loaded.processor, inputs)
    trace, reasons = _run(loaded.model, plan, inputs)
    return {
        "visual_tokens": visual_tokens(loaded.model, inputs),
        "tiles": [list(tile.grid) for tile in seen],
        "pictures": [data_uri(tile.picture, _SIDE) for tile in seen],
        "layers": steps_of(trace, reasons),
    }


def _run(model: Any, plan: Plan, inputs: Mapping[str, Any]) -> tuple[Sequence[Any], list[list[dict[str, Any]]]]:
    witness = Reasons(plan)
    with pruned(model, plan, observers=[witness]) as session, torch.inference_mode():
        model(**inputs)
        return session.trace, witness.take()
