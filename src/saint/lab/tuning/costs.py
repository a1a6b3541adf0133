"""What leaving costs, measured one drop point at a time, and what the knapsack makes of it.

Letters: N tokens, n of them left, G counts of a grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...methods.base import Method, step_possible
from .knapsack import Place, cheapest, front
from .layout import Drop, Layout, Space
from .trials import Trials
from .work import Table

SHARES = (0.2, 0.5)  # of the tokens that leave at a place; SAINT and ToMe take at most half in one step
_STEEPEST = 4.0
_LEAST = 1e-9  # a loss of nothing has no logarithm


@dataclass(frozen=True)
class Cost:
    """Loss when tokens leave at one place: ``scale * x ** power`` of x = -ln(n / N)."""

    scale: float
    power: float

    @staticmethod
    def fit(shares: Sequence[float], losses: Sequence[float]) -> "Cost":
        """Least squares in logarithms.

        Args:
            shares: of the tokens that leave, in (0, 1).
            losses: then.
        """
        x = np.log(-np.log1p(-np.array(shares)))
        y = np.log(np.maximum(losses, _LEAST))
        power = 1.0 if len(x) == 1 else float(np.clip(np.polyfit(x, y, 1)[0], 0.3, _STEEPEST))
        return Cost(float(np.exp((y - power * x).mean())), power)

    def at(self, x: np.ndarray) -> np.ndarray:
        """Losses at x >= 0."""
        return self.scale * np.maximum(x, 0.0) ** self.power


Costs = Mapping[tuple[int, int], Cost]  # by place and number of the method


def measured(trials: Trials, space: Space, methods: Sequence[Method], last: int, which: Sequence[int]) -> Costs:
    """The costs of ``methods`` at the places up to ``last``, on the images ``which``."""
    costs = {}
    for number, method in enumerate(methods):
        for place in range(last + 1):
            if not space.usable(method, place):
                continue
            if left := counts(method, space):
                losses = [trials.run(space.plan((Drop(place, method, n),)), which).score for n in left]
                costs[place, number] = Cost.fit([1 - n / space.tokens for n in left], losses)
    return costs


def counts(method: Method, space: Space) -> list[int]:
    """Tell how many tokens stay where a place is measured alone, ascending: those of ``SHARES`` that the method can do."""
    left = {round(space.tokens * (1 - share)) for share in SHARES}
    return sorted(n for n in left if 1 <= n < space.tokens and step_possible(method, space.tokens, n))


def grid(tokens: int) -> np.ndarray:
    """The counts that the knapsack chooses among, descending from N, at most about 64."""
    step = max(1, tokens // 64)
    return np.arange(tokens, max(0, tokens // 16), -step)


def proposals(
    space: Space, costs: Costs, methods: Sequence[Method], table: Table, budget: float, singles: int = 2
) -> list[Layout]:
    """Layouts that should lose the least within ``budget``, by two readings of "losses add up", and the best single drops.

    One reading: tokens that have left in front of a place would have left there too, so going on from i to j tokens costs the
    difference of what both cost there. The other: what has left before does not matter, only the share that leaves.
    """
    counts = table.counts
    x = -np.log(counts / space.tokens)
    steps = [_steps(method, counts) for method in methods]
    found: list[Layout] = []
    for relative in (False, True):
        losses, chosen = [], []
        for place in range(space.depth + 1):
            options = np.full((len(methods), len(counts), len(counts)), np.inf)
            for number in range(len(methods)):
                if (cost := costs.get((place, number))) is not None:
                    loss = cost.at(x[None] - x[:, None]) if relative else cost.at(x)[None] - cost.at(x)[:, None]
                    options[number] = np.where(steps[number], np.maximum(loss, 0.0), np.inf)
            best = options.min(0)
            np.fill_diagonal(best, 0.0)
            losses.append(best)
            chosen.append(options.argmin(0))
        nothing = np.zeros((len(counts), len(counts)))
        layers = table.layer(space.mid)
        places = [Place(loss, layers if place else nothing) for place, loss in enumerate(losses)]
        try:
            states = cheapest(front(places), budget - table.fixed).states
        except ValueError:
            continue
        came, layout = 0, []
        for place, state in enumerate(states):
            if state != came:
                layout.append(Drop(place, methods[chosen[place][came, state]], int(counts[state])))
            came = state
        found.append(tuple(layout))
    found += _singles(space, costs, methods, table, budget)[:singles]
    return list(dict.fromkeys(fit for one in found if one and (fit := space.fitted(one, table, budget))))


def _steps(method: Method, counts: np.ndarray) -> np.ndarray:
    """Tell whether the method can go from count i to count j in one step, bool [G, G]."""
    values = [int(n) for n in counts]
    return np.array([[b < a and step_possible(method, a, b) for b in values] for a in values])


def _singles(space: Space, costs: Costs, methods: Sequence[Method], table: Table, budget: float) -> list[Layout]:
    ranked = []
    for (place, number), cost in costs.items():
        layout = space.fitted((Drop(place, methods[number], space.tokens // 2),), table, budget)
        if layout is not None:
            ranked.append((float(cost.at(-np.log(np.array(layout[0].left / space.tokens)))), place, layout))
    return [layout for *_, layout in sorted(ranked, key=lambda entry: entry[:2])]
