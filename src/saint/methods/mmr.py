"""Maximal marginal relevance: visual tokens that matter and resemble none that was chosen. As in arXiv 2602.13315."""

import dataclasses
from typing import ClassVar

import torch

from .. import greedy
from ..tokens import Candidates
from .base import Greedy, check_number, relevance


@dataclasses.dataclass(frozen=True)
class MMR(Greedy):
    """Keep visual tokens that the prompt finds relevant and that are unlike those chosen so far, one after another.

    With S_ij the cosine of the tokens' embeddings and r_i in [0, 1] their relevance (that of :class:`CDPruner`), the next token
    is argmax_i weight r_i - (1 - weight) max over the tokens s chosen so far of S_si; the first is the most relevant one.

    Deviation: IDPruner, which chooses so, has importance from a trained selector; nothing is trained here.
    """

    name: ClassVar[str] = "mmr"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.13315"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)
    weight: float = 0.5  # of relevance, in [0, 1]; 0: diversity alone

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight, 0, 1, "the published value is 0.5")

    def gain(self, candidates: Candidates) -> greedy.Gain:
        similarity = (1 - self.weight) * greedy.cosines(candidates.features)
        worth = relevance(candidates)
        return greedy.Apart(similarity, torch.zeros_like(worth), self.weight * worth)
