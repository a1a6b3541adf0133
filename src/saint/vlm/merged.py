"""Which rows of a language model's input are visual tokens, where the caller has merged features into text himself.

Image features enter the text by copying, so a row is known again by what it holds. Of features that the model computed for a
caller, a number per row is kept.

Letters: B prompts, L positions of the longest prompt, N features, C channels.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_CALLS = 4096  # whose features are known again


class Known:
    """Features that were computed for a caller."""

    def __init__(self) -> None:
        self._numbers: deque[Tensor] = deque(maxlen=_CALLS)
        self.waiting = False  # some were computed and have not been seen to enter the language model

    def note(self, output: Any) -> None:
        """Note what a connector, or a method that computes features, returned."""
        for features in tensors(output):
            self._numbers.append(numbers(features.detach().flatten(0, -2)))
            self.waiting = True

    def among(self, x: Tensor) -> Tensor:
        """Mark the rows of x [B, L, C] that are such features, bool [B, L]."""
        found = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if self._numbers:
            known = torch.cat([one.to(x.device) for one in self._numbers])
            found = torch.isin(numbers(x.detach()), known)
        return found


def numbers(x: Tensor) -> Tensor:
    """Of each row a number that rows of other values do not have: x [..., C] -> int64 [...]."""
    bits = x.float().contiguous().view(torch.int32).to(torch.int64)
    odd = torch.randint(-(2**62), 2**62, (x.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (bits * odd.to(x.device)).sum(-1)


def tensors(value: Any) -> Iterator[Tensor]:
    """The features in what a model returned."""
    if isinstance(value, Tensor):
        if value.ndim >= 2 and value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
