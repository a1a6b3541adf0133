"""SAINT's voting graph over the frames of a video: the same place in the frame before is one more neighbour."""

import dataclasses
from typing import ClassVar

from .. import frames, graph
from ..tokens import Candidates, Selection
from .base import check_budget, check_integer
from .saint import Saint


@dataclasses.dataclass(frozen=True)
class SaintVideo(Saint):
    """:class:`Saint` with edges across frames, so that a frame's budget depends on what the frames before it show.

    A token whose similarity with the same place in the nearest earlier frame that still has it reaches ``threshold`` has one more
    edge, which counts as ``across`` of those within a frame: at the default one is enough to vote. Tokens that nothing changes
    leave, the first frame and what moves stay. Of targets (odd positions) those can leave that have such an edge. One token of
    each sample always stays, whatever ``floor``.

    In the vision stage of packed encoders each frame is a sample and has its own budget; in the connector and language stages
    the tokens of a prompt are voted on together, those of pictures with them. Without a video it is :class:`Saint`.

    ``Saint`` as published, the edges across frames are ours.
    """

    name: ClassVar[str] = "saint_video"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})
    needs: ClassVar[frozenset[str]] = frozenset({"frames"})

    across: int = 5  # edges within a frame that one across frames counts as, >= 1

    def __post_init__(self, keep: int | float | None) -> None:
        super().__post_init__(keep)
        check_budget(self.budget, ("sample",), "budget")  # one number for all frames is what this is not
        check_integer("across", self.across, 1, hint="with as many as neighbors one edge across frames is enough")

    def select(self, candidates: Candidates) -> Selection | None:
        tokens = candidates.tokens
        if candidates.facts.cells is None:
            return super().select(candidates)
        ballot = frames.vote(
            candidates.keys,
            candidates.facts.cells,
            self.threshold,
            self.neighbors,
            self.gamma,
            self.across,
            center=self.center,
            valid=tokens.valid,
        )
        drop = self.drops(lambda: ballot.votes, candidates)
        drop = tuple(min(r, n - 1) for r, n in zip(drop, tokens.lengths, strict=True))
        return Selection.from_order(graph.descending(ballot.score), drop, tokens) if any(drop) else None
