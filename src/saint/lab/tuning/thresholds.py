"""Thresholds instead of counts: every image keeps its own number, and the mean work is what a layout takes.

Letters: n images, P drop points.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn

import numpy as np

from ...methods.base import Method
from ...tokens import Candidates, Selection
from .layout import Layout, Space
from .trials import Trials
from .work import Table

_STEPS = 18  # of a bisection: thresholds to about 1e-5


def dynamic(method: Method) -> bool:
    """Tell whether ``method`` can let every image keep its own number, by a threshold."""
    return "threshold" in {field.name for field in dataclasses.fields(method)}


class _EnoughSeen(Exception):  # noqa: N818  (no error)
    """Raised in a forward of which no more is needed."""


@dataclasses.dataclass(frozen=True)
class _Watched(Method):
    """A method that keeps what it is shown, and ends the forward there: what comes behind is not needed."""

    name: ClassVar[str] = "watched"
    paper: ClassVar[str] = "none"
    stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})

    seen: list[Candidates]
    like: Method  # it stands behind stages that merge, where this one does

    def __post_init__(self) -> None:
        object.__setattr__(self, "merges", self.like.merges)

    def select(self, candidates: Candidates) -> NoReturn:
        kept = {name: getattr(candidates, name).clone() for name in ("keys", "features")}
        self.seen.append(dataclasses.replace(candidates, **kept))
        raise _EnoughSeen


def bisect(left: Callable[[float], float], goal: float, low: float, high: float) -> float:
    """The threshold at which ``left``, rising with it, comes closest to ``goal`` from below."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= goal else (low, middle)
    return low


def calibrated(
    trials: Trials, space: Space, layout: Layout, table: Table, which: Sequence[int], budget: float
) -> list[Method] | None:
    """A method with its threshold for each drop of ``layout``, from the first to the last on the images ``which``.

    At each drop point but the last the mean of the tokens left is the layout's; the last brings the mean work to ``budget``.

    Returns:
        The methods, or None where one has no threshold, or thresholds cannot bring the work there.
    """
    if not layout or not all(dynamic(drop.method) for drop in layout):
        return None
    methods: list[Method] = []
    behind: list[np.ndarray] = []  # of the drop points that are done, [n]
    for number, drop in enumerate(layout):
        watched = _Watched([], drop.method)
        trials.show(space.plan(layout[: number + 1], [*methods, watched]), which, _EnoughSeen)

        def left(threshold: float, seen: list[Candidates] = watched.seen, method: Method = drop.method) -> np.ndarray:
            chosen = method.voting(round(threshold, 6))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a floor that binds at a threshold nobody is going to use
                return np.concatenate([_lengths(chosen.select(one), one) for one in seen]).astype(float)

        if number < len(layout) - 1:
            value = bisect(lambda t: float(left(t).mean()), drop.left, -0.99, 1.0)
        else:
            value = bisect(lambda t: float(np.mean(space.work(layout, table, [*behind, left(t)]))), budget, -0.99, 1.0)
        methods.append(drop.method.voting(round(value, 6)))
        behind.append(left(value))
    reached = float(np.mean(space.work(layout, table, behind)))
    return methods if 0.99 * budget <= reached <= budget else None


def _lengths(selection: Selection | None, candidates: Candidates) -> np.ndarray:
    return np.array(candidates.tokens.lengths if selection is None else selection.lengths)
