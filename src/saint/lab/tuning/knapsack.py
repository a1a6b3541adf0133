"""How many tokens leave where, at the least loss for a budget of work: dynamic programming over places, exact on its grid.

Pure numbers. Losses of places add up, which is an assumption: what it chooses is to be checked by joint runs.

Letters: L places, G token counts (the grid, descending), S states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST = 512  # partial solutions kept per state: beyond it, the best of each of as many slices of the work


@dataclass(frozen=True)
class Place:
    """Somewhere tokens can leave, or must pass.

    Attributes:
        loss: of going from grid count i to count j here, float64 [G, G]; infinite where that cannot be.
        work: done here by tokens that come as i and leave as j, float64 [G, G].
    """

    loss: np.ndarray
    work: np.ndarray


@dataclass(frozen=True)
class Solution:
    """A way through the places.

    Attributes:
        states: index on the grid behind each place.
        loss: added up.
        work: added up.
    """

    states: tuple[int, ...]
    loss: float
    work: float


@dataclass(frozen=True)
class _Front:
    """The partial solutions of a state that no other beats in both: work ascending, loss descending; where each came from."""

    work: np.ndarray
    loss: np.ndarray
    state: np.ndarray
    entry: np.ndarray


def front(places: Sequence[Place]) -> list[Solution]:
    """All trades between loss and work worth having, the least work first.

    Args:
        places: in the order in which tokens pass them; the first is entered with all tokens, count 0 of the grid.

    Raises:
        ValueError: no place, shapes that differ, or no way through.
    """
    if not places:
        raise ValueError("no place where tokens can leave")
    size = len(places[0].loss)
    if any(place.loss.shape != (size, size) or place.work.shape != (size, size) for place in places):
        raise ValueError(f"losses and work must be [{size}, {size}] at every place")
    start = _Front(np.zeros(1), np.zeros(1), np.zeros(1, int), np.zeros(1, int))
    steps: list[dict[int, _Front]] = [{0: start}]
    for place in places:
        before, after = steps[-1], {}
        for j in range(size):
            came = [i for i in before if i <= j and np.isfinite(place.loss[i, j])]
            if came:
                after[j] = _best(
                    np.concatenate([before[i].work + place.work[i, j] for i in came]),
                    np.concatenate([before[i].loss + place.loss[i, j] for i in came]),
                    np.concatenate([np.full(len(before[i].work), i) for i in came]),
                    np.concatenate([np.arange(len(before[i].work)) for i in came]),
                )
        steps.append(after)
    last = steps[-1]
    if not last:
        raise ValueError("no way through: at some place neither staying nor leaving is allowed")
    ends = _best(
        np.concatenate([f.work for f in last.values()]),
        np.concatenate([f.loss for f in last.values()]),
        np.concatenate([np.full(len(f.work), j) for j, f in last.items()]),
        np.concatenate([np.arange(len(f.work)) for f in last.values()]),
    )
    return [
        Solution(_trace(steps, int(state), int(entry)), float(loss), float(work))
        for work, loss, state, entry in zip(ends.work, ends.loss, ends.state, ends.entry, strict=True)
    ]


def cheapest(solutions: Sequence[Solution], budget: float) -> Solution:
    """The least loss whose work is within ``budget``.

    Raises:
        ValueError: none is; the message says what the least work is.
    """
    within = [solution for solution in solutions if solution.work <= budget * (1 + 1e-9)]
    if not within:
        least = min(solution.work for solution in solutions)
        raise ValueError(f"a budget of {budget:.3f} cannot be met: the least that these places allow is {least:.3f}")
    return min(within, key=lambda solution: (solution.loss, solution.work))


def _best(work: np.ndarray, loss: np.ndarray, state: np.ndarray, entry: np.ndarray) -> _Front:
    order = np.lexsort((loss, work))
    work, loss, state, entry = work[order], loss[order], state[order], entry[order]
    better = np.concatenate([[True], loss[1:] < np.minimum.accumulate(loss)[:-1]])
    kept = np.flatnonzero(better)
    if len(kept) > _MOST:  # losses fall with work, so the last of a slice is its best
        slices = np.floor((work[kept] - work[kept[0]]) / (work[kept[-1]] - work[kept[0]]) * (_MOST - 1))
        kept = kept[np.concatenate([slices[1:] != slices[:-1], [True]])]
    return _Front(work[kept], loss[kept], state[kept], entry[kept])


def _trace(steps: Sequence[dict[int, _Front]], state: int, entry: int) -> tuple[int, ...]:
    states = []
    for fronts in reversed(steps[1:]):
        states.append(state)
        state, entry = int(fronts[state].state[entry]), int(fronts[state].entry[entry])
    return tuple(reversed(states))
