"""Recurrent layers: padding of a shorter sample must stand in front of its tokens.

Behind them it would decay the state that decoding goes on from, and run through its convolution: the prompt would come out right
and the answer wrong.

Letters: B batch, S survivors of the longest sample.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..tokens import TokenMap


def in_front(tokens: TokenMap) -> tuple[Tensor, Tensor, TokenMap]:
    """The same survivors with their padding in front.

    Args:
        tokens: with padding behind.

    Returns:
        The slots in the new order, the way back, int64 [B, S] each, and the map in the new order.
    """
    assert tokens.valid is not None
    order = torch.sort(tokens.valid.view(torch.uint8), dim=1, stable=True).indices
    front = replace(tokens, index=tokens.index.gather(1, order), valid=tokens.valid.gather(1, order))
    return order, order.argsort(1), front


def filled_state(cache: Any, layer: int) -> bool:
    """Tell whether the layer has a state already."""
    return cache is not None and layer < len(cache.layers) and bool(cache.has_previous_state(layer))
