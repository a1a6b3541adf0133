"""Choice and fate taken apart: SAINT's choice merged, ToMe's choice dropped. For the tables, not for users."""

import dataclasses
from typing import ClassVar

import saint
from saint.gathers import similar_survivor
from saint.graph import metric
from saint.methods import ToMe
from saint.tokens import Candidates, Selection


@dataclasses.dataclass(frozen=True)
class SaintMerged(saint.Saint):
    """What SAINT drops goes into the survivor with the most similar key, as ToMe merges: by size, proportional attention."""

    name: ClassVar[str] = "saint_merged"
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})
    merges: ClassVar[bool] = True

    def size_bias(self) -> float:
        return 1.0

    def select(self, candidates: Candidates) -> Selection | None:
        selection = super().select(candidates)
        if selection is None:
            return None
        points = metric(candidates.keys, center=self.center, valid=candidates.tokens.valid)
        return dataclasses.replace(selection, owner=similar_survivor(points, selection))


@dataclasses.dataclass(frozen=True)
class ToMeDropped(ToMe):
    """What ToMe merges is dropped."""

    name: ClassVar[str] = "tome_dropped"
    merges: ClassVar[bool] = False

    def size_bias(self) -> float:
        return 0.0

    def select(self, candidates: Candidates) -> Selection | None:
        selection = super().select(candidates)
        return None if selection is None else dataclasses.replace(selection, owner=None)
