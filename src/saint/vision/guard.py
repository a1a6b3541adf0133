"""How much fine detail a picture has, and how many of its tokens stay for that: the guard of pages of text.

Keys do not tell: the patches of a page resemble each other more than those of a photograph. Its pixels do (docs/matching.md).

Letters: B pictures, C channels, H x W pixels.
"""

import math

import torch
from torch import Tensor

# mean slope over contrast: 95 % of 60 photographs lie between 0.08 and 0.47, half below 0.20; of 40 rendered pages of text
# between 0.31 and 0.56, half below 0.48; of 30 drawn scenes between 0.13 and 0.22
_PLAIN, _FULL = 0.25, 0.45
FINE = 0.4  # above it a picture is more like a page of text than like a photograph


def detail(pixels: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels over their standard deviation, of the mean over channels, float32 [B].

    Neither brightness nor contrast nor the model's normalisation changes it. Of pictures of one colour it is 0.

    Args:
        pixels: [B, C, H, W], of at least 2 x 2 pixels.
    """
    grey = pixels.float().mean(1)
    down = (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2))
    right = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    contrast = grey.flatten(1).std(1, correction=0)
    return torch.where(contrast > 0, (down + right) / 2 / contrast, 0.0)


def shares(pixels: Tensor, guard: float) -> tuple[float, ...]:
    """Share of its candidates that each picture keeps at least, B numbers in [0, guard]: 0 of plain ones.

    Args:
        pixels: [B, C, H, W].
        guard: what a picture full of fine detail keeps.
    """
    full = ((detail(pixels) - _PLAIN) / (_FULL - _PLAIN)).clamp(0, 1)
    return tuple(guard * share for share in full.tolist())


def min_keep(shares: tuple[float, ...], candidates: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of each picture that stay at least, of so many before the first drop."""
    return tuple(math.ceil(share * n) for share, n in zip(shares, candidates, strict=True))
