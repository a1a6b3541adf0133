"""Positions on a grid (M-RoPE): each survivor of a picture keeps its row and column, the text behind a picture keeps its place.

vLLM lays out the positions of a prompt when it comes in, and which places of a picture stay is known behind the encoder only. So
the layout is that of the *unpruned* prompt, in which the survivors take evenly spaced places of their picture: everything but
their rows and columns is final. What a survivor has to move from there travels in channels behind its features, and is added in
the forward that computes it, whatever chunk that is. The first axis (time) is the same all over a picture.

Letters: N places of a picture, K kept, L tokens of a prompt, T tokens of a forward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .budget import Choice

CHANNELS = 4  # that a feature gets: rows and columns to move, each as a multiple of BASE and a rest
BASE = 256  # bfloat16 holds no larger range of whole numbers


def even(choice: Choice) -> Tensor:
    """Evenly spaced places of a picture, as many as are kept: int64 [K], ascending."""
    places, kept = sum(choice.runs), sum(choice.goals)
    return (2 * torch.arange(kept) + 1) * places // (2 * kept)


def unpruned(tokens: Sequence[int], items: Sequence[tuple[int, Choice | None]]) -> tuple[list[int], list[int], Tensor]:
    """The prompt that ``tokens`` was before pictures lost places.

    Args:
        tokens: of the pruned prompt, L of them.
        items: where each picture or video begins, in order, and what is kept of it (None: everything).

    Returns:
        Its tokens; where each item begins in it; the place in it of each token of the pruned one, int64 [L].
    """
    whole: list[int] = []
    begins, places, done = [], [], 0
    for offset, choice in [*items, (len(tokens), None)]:
        places.append(torch.arange(offset - done) + len(whole))
        whole += tokens[done:offset]
        begins.append(len(whole))
        done = offset
        if choice is not None:
            places.append(even(choice) + len(whole))
            whole += [tokens[offset]] * sum(choice.runs)
            done += sum(choice.goals)
    return whole, begins[:-1], torch.cat(places)


def moves(kept: Tensor, choice: Choice, width: int) -> Tensor:
    """Rows and columns from the evenly spaced places to those that were kept.

    Args:
        kept: places that stay, int64 [K].
        choice: what they were chosen by.
        width: places in a row of the picture.

    Returns:
        int64 [K, 2].
    """
    start = even(choice).to(kept.device)
    return torch.stack([kept // width - start // width, kept % width - start % width], 1)


def packed(moves: Tensor) -> Tensor:
    """``moves``, int64 [K, 2], as channels that every float type holds exactly: int64 [K, 4]."""
    high = moves.div(BASE, rounding_mode="floor")
    return torch.cat([high, moves - BASE * high], 1)


def unpacked(channels: Tensor) -> Tensor:
    """The inverse of :func:`packed`: [T, 4] -> int64 [T, 2]."""
    high, low = channels.long().split(2, 1)
    return BASE * high + low
