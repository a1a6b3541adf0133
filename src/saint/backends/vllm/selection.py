"""Which of a picture's features enter the language model.

Letters: B pictures, N features of one, K kept, C channels.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...tokens import Candidates, TokenMap
from .budget import Choice


def indices(features: Sequence[Tensor], choices: Sequence[Choice]) -> list[Tensor]:
    """The places of each picture that its prompt has.

    Args:
        features: per picture, [N, C].
        choices: per picture, what to keep of it.

    Returns:
        Per picture int64 [K], ascending.

    Raises:
        ValueError: features of another number than the prompt was made for.
    """
    if len(choices) != len(features):
        raise ValueError(f"{len(features)} pictures came out of the encoder, expected {len(choices)}")
    for one, choice in zip(features, choices, strict=True):
        if one.shape[0] != sum(choice.runs):
            raise ValueError(
                f"the encoder made {one.shape[0]} features of a picture, its prompt counts on {sum(choice.runs)}"
            )
    kept: dict[int, Tensor] = {}
    for choice in dict.fromkeys(choices):  # equal ones together
        members = [i for i, other in enumerate(choices) if other == choice]
        together = torch.stack([features[i] for i in members])  # [B, N, C]
        kept.update(zip(members, choose(together, choice).unbind(0), strict=True))
    return [kept[i] for i in range(len(features))]


def choose(features: Tensor, choice: Choice) -> Tensor:
    """The places that stay, of pictures with one choice.

    Args:
        features: [B, N, C]. NaN and infinity count as 0: no picture of one user may stop an engine that serves others.
        choice: what to keep.

    Returns:
        int64 [B, K], ascending.
    """
    features = torch.nan_to_num(features, nan=0.0, posinf=0.0, neginf=0.0)
    kept, start = [], 0
    for run, goal in zip(choice.runs, choice.goals, strict=True):
        shown = features[:, start : start + run]
        tokens = TokenMap.full(shown.shape[0], run, shown.device)
        method = dataclasses.replace(choice.method, keep=goal)
        selection = method.select(Candidates(shown, shown, tokens, step=0, steps=1))
        kept.append((tokens.index if selection is None else selection.slots) + start)
        start += run
    return torch.cat(kept, 1)
