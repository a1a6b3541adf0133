"""EVS, efficient video sampling: tokens that changed least since the frame before leave. arXiv 2510.14624."""

import dataclasses
from typing import ClassVar

import torch

from .. import frames, graph
from ..tokens import Candidates, Selection
from .base import Method, check_budget, final_keep


@dataclasses.dataclass(frozen=True)
class EVS(Method):
    """Keep the tokens of videos that differ most from the same place in the frame before.

    With d(i) = 1 - cos(f_i, f_before(i)) of the embeddings f that enter the language model, and d = infinity in the first frame,
    the ``keep`` tokens of largest d stay, of equal ones the earlier: the first frame as a whole, at least, then what changes.
    Pictures lose nothing. As in serving engines, which know one video per budget; here those of a prompt share theirs.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14624"
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = frozenset({"frames"})

    keep: int | float = 0.25  # survivors among the tokens of videos: a number (int) or a fraction (float)

    def __post_init__(self) -> None:
        check_budget(self.keep)

    @property
    def fixed(self) -> None:
        return None  # of videos alone: what stays of a prompt depends on its pictures

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, cells = candidates.tokens, candidates.facts.cells
        if cells is None:
            return None
        before = frames.earlier(cells, valid=tokens.valid)
        with graph.full_precision(cells.device):
            # 3 in the first frame, where there is no frame before: most of all
            change = 1 - frames.resemblance(graph.metric(candidates.features), before)
        moving = (cells != frames.NONE) & tokens.real
        first = moving & (before == frames.NONE)
        counts = torch.stack([moving.sum(1), first.sum(1)]).tolist()
        goal = tuple(
            n - shown + max(begin, final_keep(self.keep, shown)) if shown else n
            for n, shown, begin in zip(tokens.lengths, *counts, strict=True)
        )
        if goal == tokens.lengths:
            return None
        return Selection.from_scores(change.masked_fill(~moving, torch.inf), goal, tokens)
