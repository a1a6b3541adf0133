"""DivPrune: the subset of visual tokens whose two closest members lie farthest apart. arXiv 2503.02175."""

import dataclasses
from typing import ClassVar

from .. import greedy
from ..tokens import Candidates
from .base import Greedy
from .saint_full_graph import SaintFullGraph


@dataclasses.dataclass(frozen=True)
class DivPrune(Greedy):
    """Max-min diversity of the projected visual tokens, solved greedily by farthest-point selection.

    With d(i, j) = 1 - cos(f_i, f_j) of the embeddings f that enter the language model: the first survivor is
    argmax_i min_{j != i} d(i, j), each further one argmax_j min_{s in S} d(j, s), until ``keep`` are chosen. Needs neither
    text nor attention. A fraction is rounded half up, everywhere in this library.

    Published for the connector. In the vision stage, which is ours, the embeddings are those of the residual stream.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector"})

    keep: int | float = 0.25  # survivors: a number (int) or a fraction of the candidates (float)

    def layers(self, stage: str, depth: int) -> list[int]:
        return SaintFullGraph().layers(stage, depth)  # late, where the other one-time choice among all tokens is

    def gain(self, candidates: Candidates) -> greedy.Gain:
        return greedy.farthest(candidates.features, valid=candidates.tokens.valid)
