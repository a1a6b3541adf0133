"""Random survivors: what any method has to beat."""

import dataclasses
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..tokens import Candidates
from .base import Scorer, check_integer
from .saint import Saint

Word = TypeVar("Word", int, Tensor)


@dataclasses.dataclass(frozen=True)
class Random(Scorer):
    """Keep tokens at random: a token's rank is a hash of the seed, the drop point and its original index.

    The choice is a function of these alone, so it is the same on every device and does not depend on batch mates; two
    samples with equally many candidates keep the same places. The random number generators of torch are not touched.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "https://arxiv.org/abs/2208.07220"  # PatchDropout: patches dropped at random
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})

    seed: int = 0  # in [0, 2^63); another seed, another choice

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0, 2**63 - 1)

    def layers(self, stage: str, depth: int) -> list[int]:
        return Saint().layers(stage, depth)  # where SAINT drops, so that the two differ in the choice only

    def score(self, candidates: Candidates) -> Tensor:
        tokens = candidates.tokens
        offset = _mix(_mix(self.seed & 0xFFFFFFFF) + (self.seed >> 32) + candidates.step)
        if torch.compiler.is_exporting():  # what some runtimes compute with 32 bits must not come from products of 64
            words = [_mix(place ^ offset) for place in range(tokens.width)]
            rank = {word: place for place, word in enumerate(sorted(words))}
            return torch.tensor([rank[word] for word in words], device=tokens.index.device)[tokens.index]
        return _mix(tokens.index ^ offset)


def _mix(x: Word) -> Word:
    """A bijection of the 32-bit integers that scatters neighbours; products stay below 2^63."""
    for _ in range(2):
        x = x ^ (x >> 16)
        x = (x * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
