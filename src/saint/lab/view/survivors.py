"""Which tokens a plan keeps of a few images of a run, as plain data for its record."""

from collections.abc import Sequence
from typing import Any

import torch

from ...plans import Plan
from ...session import pruned
from ..images import reason
from ..kinds import Subject
from ..sources.items import Item
from .reasons import Reasons

SHOWN = 3  # images of a run: one may be odd, and a record of three stays small whatever the size of the run
_SIDE = 256  # pixels of a picture


def survivors(subject: Subject, plan: Plan, items: Sequence[Item]) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Run the first ``SHOWN`` of ``items`` again: the run that measured them holds no images.

    Args:
        subject: the model.
        plan: what drops.
        items: images of the run, in order.

    Returns:
        Photographs as `saint view` writes them, with the reasons of every drop point; where and why others are not shown.
    """
    photos, left_out = [], []
    for item in items[:SHOWN]:
        try:
            image: Any = item.load()
            inputs = subject.inputs([item], [image])
            subject.tiles(image, inputs)  # a picture that lies on no grid is refused before it is run
            witness = Reasons(plan)
            with pruned(subject.model, plan, observers=[witness]) as session, torch.inference_mode():
                subject.model(**inputs)
                facts = subject.facts(image, inputs, session.trace, witness.take(), _SIDE)
        except (OSError, ValueError) as error:
            left_out.append([str(item.where), reason(error)])
            continue
        grid = {} if subject.grid is None else {"grid": list(subject.grid)}
        photos.append({"name": str(item.id), **grid, **facts})
    return photos, left_out
