"""From what leaving costs to the plan: joint runs of what the knapsack proposes, and of its neighbours.

Letters: D layers, n images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ...errors import UnsupportedModelError
from ...methods.base import Method
from .costs import Costs, grid, measured, proposals
from .layout import Drop, Layout, Space
from .trials import Trial, Trials
from .work import Meter, Table

FEW = 12  # images of the first look at methods and layouts
COSTED = 8  # images of the costs of single places, which only propose
KEPT = 1.25  # a kind of method is looked at further where its first look loses at most so many times the best
METHODS = 3  # at most so many methods are measured at every place
JOINT = 8  # layouts that are run on all images: the best of the first look
MOVES = 6  # neighbours that are run
_CLOSE = 0.004  # of the target: as near as counts of tokens get
_NEAR = 0.01  # of the target: near enough not to change a layout any more
# shares of the work at which methods are looked at where the target is out of reach
_LOOSER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIZES = 4  # smaller pictures that are looked at for a target: those that leave between so much more work, and so much
_LEAST, _MOST = 1.04, 2.3
_RANGES = 3  # methods whose even layouts are looked at behind them
SOFTER = (0.5, 0.75)  # powers of softer attention that are looked at
_SOFTER = 0.97  # and taken for all layouts where they lose at most so many times as much


@dataclass(frozen=True)
class Tried:
    """A layout that was run.

    Attributes:
        search: the size of pictures that it is for.
        layout: where and how many.
        trial: on the images of the search.
    """

    search: "Search"
    layout: Layout
    trial: Trial


@dataclass
class Search:
    """Finds layouts for budgets; what it measured for one it uses for the next.

    Attributes:
        trials: runs plans.
        space: what layouts can be.
        meter: counts or times plans.
        table: work by tokens.
        which: the images.
        kinds: methods that can go together; those that merge go alone. Of those whose costs are measured.
        near: methods of which even layouts are looked at, however many.
        costs: of each kind, once measured.
        factor: measured work over that of the table.
        sizes: searches over smaller pictures, the largest first.
        tried: layouts that were run, for the record.
        softens: attention can be softer.
        softs: the same search by the softness of attention.
    """

    trials: Trials
    space: Space
    meter: Meter
    table: Table
    which: Sequence[int]
    kinds: list[list[Method]]
    near: list[Method] = field(default_factory=list)
    costs: list[Costs] = field(default_factory=list)
    factor: float = 1.0
    sizes: "list[Search]" = field(default_factory=list)
    tried: dict[Layout, Tried] = field(default_factory=dict)
    softens: bool = False
    softs: "dict[float, Search]" = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last place that is looked at: behind two thirds of the layers little is left to save."""
        return math.ceil(2 * self.space.depth / 3)

    @property
    def few(self) -> Sequence[int]:
        """The images of the first look: the last ones, which layouts were not fitted to."""
        return self.which[-FEW:]

    @property
    def costed(self) -> Sequence[int]:
        """The images of the costs of single places."""
        return self.which[:COSTED]

    def budget(self, target: float) -> float:
        """Return what the table should say of a layout that is to leave ``target``: a little less, not to end above it."""
        return target * (1 - _CLOSE / 2) / self.factor

    def published(self, method: Method) -> Layout:
        """Say where SAINT drops as published, the first half of the layers; in front of all where ``method`` works only there."""
        places = [p for p in range(1, self.space.depth // 2 + 1) if self.space.usable(method, p)]
        return self.space.even(method, places or [0])

    def ranges(self, method: Method) -> list[Layout]:
        """Even layouts: the published one, all layers or those behind the second, the first two, every other one; and in front
        and at every fourth of the depth, as plans that are made without measuring.
        """
        depth = self.space.depth
        spans = (range(1, 3), range(1, depth + 1), range(3, depth + 1), range(2, depth + 1, 2),
                 (0, *range(depth // 3, depth, max(1, depth // 4))))  # fmt: skip
        found = [[p for p in span if self.space.usable(method, p)] or [0] for span in spans]
        return [self.published(method), *(self.space.even(method, places) for places in found)]

    def look(self, target: float) -> None:
        """Choose the kinds of methods worth measuring, by even layouts for ``target``; then measure what leaving costs."""
        best: list[tuple[float, list[Method]]] = []
        first: list[tuple[float, Method]] = []
        for kind in self.kinds:
            losses = [(loss, method) for method in kind if (loss := self._first(method, target)) is not None]
            losses.sort(key=lambda entry: entry[0])
            first += losses
            if losses:  # two methods that go together at most: each is measured at every place
                best.append((losses[0][0], [m for loss, m in losses if loss <= KEPT * losses[0][0]][:2]))
        if not best:
            raise ValueError(self._impossible(target))
        least = min(loss for loss, _ in best)
        self.near = [method for loss, method in sorted(first, key=lambda one: one[0]) if loss <= KEPT * least]
        self._soften(target)
        best.sort(key=lambda entry: entry[0])
        self.kinds, room = [], METHODS
        for loss, kind in best:
            if loss <= KEPT * least and room:
                self.kinds.append(kind[:room])
                room -= len(self.kinds[-1])
        self.costs = [measured(self.trials, self.space, kind, self.last, self.costed) for kind in self.kinds]

    def shrink(self, sizes: Sequence[tuple[int | float, int]]) -> None:
        """Look at smaller pictures, too: shares of their pixels, and the tokens that they then have."""
        self.sizes = [
            replace(self, space=replace(self.space, pixels=share, tokens=tokens), sizes=[], tried={}, softs={},
                    table=self.table.over(grid(tokens)), near=self.near[:_RANGES])
            for share, tokens in sizes
        ]  # fmt: skip

    def _soften(self, target: float) -> None:
        """Take softer attention where the best even layout loses less with it."""
        layout = min(self._evenly(self.near[0], target), key=self._look)
        best = self._look(layout) * _SOFTER
        for logn in SOFTER if self.space.slot == "vision" else ():
            space = replace(self.space, logn=logn)
            try:
                loss = self.trials.run(space.plan(layout), self.few).score
            except UnsupportedModelError:
                return
            self.softens = True
            if loss < best:
                best, self.space = loss, space

    def soft(self, logn: float) -> "Search":
        """Return the same search with attention of another softness."""
        self.softs.setdefault(self.space.logn, self)
        if logn not in self.softs:
            self.softs[logn] = replace(self, space=replace(self.space, logn=logn), tried={})
        return self.softs[logn]

    def softened(self, layout: Layout) -> "Search":
        """The same search with attention as soft as ``layout`` likes it best, beyond noise."""
        now = self
        for step in (-0.25, 0.25) if self.space.logn else ():
            other = self.soft(self.space.logn + step)
            if gains(other.run(layout).trial, now.run(layout).trial):
                now = other
        return now

    def _evenly(self, method: Method, target: float) -> list[Layout]:
        """The published layout and that of all layers, those of them that can be."""
        published, _, everywhere, *_ = self.ranges(method)
        fits = (self.space.fitted(layout, self.table, self.budget(target)) for layout in (published, everywhere))
        return [fit for fit in fits if fit is not None]

    def _first(self, method: Method, target: float) -> float | None:
        """The lesser loss of the published layout and of all layers; None where neither can be."""
        return min(map(self._look, self._evenly(method, target)), default=None)

    def _look(self, layout: Layout) -> float:
        return self.trials.run(self.space.plan(layout), self.few).score

    def _impossible(self, target: float) -> str:
        least = 1.0
        for method in (m for kind in self.kinds for m in kind):
            left, layout = self.space.tokens, []
            for place in range(self.last + 1):
                half = math.ceil(left / 2)
                if self.space.usable(method, place) and half < left and half > 1:
                    layout.append(Drop(place, method, half))
                    left = half
            if layout:
                least = min(least, float(self.space.work(tuple(layout), self.table)) * self.factor)
        return (
            f"no plan leaves {target:.3f} of the {'FLOPs' if self.table.unit == 'flops' else 'time'} of this model with these "
            f"methods; about {least:.2f} is the least"
        )

    def candidates(self, target: float) -> "list[Proposal]":
        """Return what is worth a look for ``target``: the knapsack's layouts, and even ones over ranges of layers."""
        budget = self.budget(target)
        found: list[Layout] = []
        for kind, costs in zip(self.kinds, self.costs, strict=True):
            found += proposals(self.space, costs, kind, self.table, budget)
        spread = (layout for method in self.near for layout in self.ranges(method))
        even = [fit for layout in spread if (fit := self.space.fitted(layout, self.table, budget)) is not None]
        if not found and not even:
            raise ValueError(self._impossible(target))
        return [Proposal(self, layout, layout in even) for layout in dict.fromkeys([*found, *even])]

    def run(self, layout: Layout) -> Tried:
        """A joint run on all images of the search."""
        if layout not in self.tried:
            self.tried[layout] = Tried(self, layout, self.trials.run(self.space.plan(layout), self.which))
        return self.tried[layout]

    def alone(self, target: float) -> Tried | None:
        """The largest of the smaller pictures that leave ``target``, without anything else; None: none does."""
        for size in self.sizes:
            # a time is measured once it is chosen: of every size that would take minutes
            counted = self.table.unit == "flops"
            if (size.measured(()) if counted else float(size.space.work((), size.table)) * self.factor) <= target:
                return size.run(())
        return None

    def pruning(self, target: float) -> Tried | None:
        """The best layout for pictures as they are, not moved; None: none leaves ``target``."""
        try:
            found = self.candidates(target)
        except ValueError:
            return None
        best = _joint(self._ranked(found))
        return best.search.run(best.search.settled(best.layout, target))

    def _ranked(self, found: "list[Proposal]") -> "list[Proposal]":
        """Return the best of the first look first, even layouts of the best method with attention of any softness."""
        softer = [
            one._replace(search=one.search.soft(logn))
            for one in (found if self.softens else ())
            if one.even and one.layout and one.layout[0].method == one.search.near[0]
            for logn in (0.0, *SOFTER)
            if logn != one.search.space.logn
        ]
        return sorted([*found, *softer], key=lambda one: one.search._look(one.layout))

    def _everywhere(self, target: float) -> "list[Proposal]":
        """Layouts for pictures as they are, and for smaller ones."""
        whole = [(size, float(size.space.work((), size.table)) * self.factor / target) for size in self.sizes]
        worth = [size for size, share in whole if _LEAST <= share <= _MOST]
        step = max(1, -(-len(worth) // SIZES))
        found: list[Proposal] = []
        for search in (self, *worth[::-1][::step]):
            try:
                found += search.candidates(target)
            except ValueError:  # it cannot be had at this size
                continue
        if (alone := self.alone(target)) is not None:
            found.append(Proposal(alone.search, (), even=True))
        if not found:
            raise ValueError(self._impossible(target))
        return found

    def best(self, target: float, moves: int = MOVES) -> Tried:
        """The layout that loses the least for ``target``: the best proposal, moved as long as that helps beyond noise.

        All proposals are run on few images, the best of them on all.
        """
        now = _joint(self._ranked(self._everywhere(target)))
        search, seen, order = now.search, {now.layout}, np.random.default_rng(0)
        while moves > 0 and now.layout:
            near = search._near(now.layout, order)
            fits = (search.space.fitted(one, search.table, search.budget(target)) for one in near)
            fresh = [layout for layout in dict.fromkeys(fits) if layout is not None and layout not in seen]
            if not fresh:
                break
            for layout in fresh[:moves]:
                seen.add(layout)
                moves -= 1
                tried = search.run(layout)
                if gains(tried.trial, now.trial):
                    now = tried  # and on from there
                    break
            else:
                break
        return now

    def _near(self, layout: Layout, order: np.random.Generator) -> list[Layout]:
        """The neighbours in random order: not all can be run."""
        near = list(self.space.moves(layout, self.last))
        return [near[i] for i in order.permutation(len(near))]

    def settled(self, layout: Layout, target: float) -> Layout:
        """``layout`` as it is where its measured work is close below ``target``, else with other counts.

        A layout was found by its loss, and a token more or less at one place makes others leave at the next.
        """
        if not layout:
            return layout
        best = layout, self.measured(layout)
        if self._off(best[1], target) < _NEAR:
            return layout
        budget = self.budget(target)
        for _ in range(4):
            fit = self.space.fitted(layout, self.table, budget)
            if fit is None:
                break
            share = self.measured(fit)
            if self._off(share, target) < self._off(best[1], target):
                best = fit, share
            if self._off(share, target) < _CLOSE:
                break
            budget *= target * (1 - _CLOSE / 2) / share
        found, share = best
        while share > target and self.table.unit == "flops":  # the last token that is too many
            fewer = (
                (*found[:i], replace(drop, left=drop.left - 1), *found[i + 1 :])
                for i, drop in reversed(list(enumerate(found)))
            )
            less = next((layout for layout in fewer if self.space.possible(layout)), None)
            if less is None:
                raise ValueError(self._impossible(target))
            found, share = less, self.measured(less)
        return found

    def _off(self, share: float, target: float) -> float:
        """Tell how far a share of the work is from the target; of FLOPs, which are to stay below, too much counts ten times."""
        off = abs(share / target - 1)
        return 10 * off if share > target and self.table.unit == "flops" else off

    def measured(self, layout: Layout) -> float:
        """The work that a layout leaves: FLOPs counted, or time measured."""
        plan = self.space.plan(layout)
        return self.meter.flops(plan) if self.table.unit == "flops" else self.meter.times([plan], 15)[0]

    def calibrate(self, target: float, *, shrinks: bool = False) -> float:
        """Find by how much the table is off: it knows nothing of what choosing tokens takes.

        Args:
            target: share of the work.
            shrinks: smaller pictures may leave it where pruning alone cannot.

        Returns:
            The target, or where pruning alone cannot leave it, and need not, the next larger share that it can.
        """
        for share in (target, *(one for one in _LOOSER if one > target)) if shrinks else (target,):
            for method in (m for kind in self.kinds for m in kind):
                layout = self.space.fitted(self.published(method), self.table, share)
                if layout is not None:
                    self.factor = self.measured(layout) / float(self.space.work(layout, self.table))
                    return share
        raise ValueError(self._impossible(target))


class Proposal(NamedTuple):
    """A layout that is worth a look.

    Attributes:
        search: the size of pictures that it is for, and the softness of attention.
        layout: where and how many.
        even: it was spread over layers, and not fitted to costs.
    """

    search: Search
    layout: Layout
    even: bool


def _joint(ranked: Sequence[Proposal]) -> Tried:
    """Run the best of the first look on all images, half of them even; one that was fitted must gain beyond noise.

    It was fitted to what single places cost on a few images, and is the best of many partly by chance.
    """
    best = [
        min((one.search.run(one.layout) for one in some[: JOINT // 2]), key=lambda t: t.trial.score)
        for even in (True, False)
        if (some := [one for one in ranked if one.even is even])
    ]
    return best[-1] if len(best) == 1 or gains(best[1].trial, best[0].trial) else best[0]


def gains(new: Trial, old: Trial) -> bool:
    """Tell whether ``new`` is closer than ``old`` on the same images, beyond noise: by two standard errors of the difference."""
    difference = new.distances - old.distances
    if len(difference) < 2:
        return bool(difference.mean() < 0)
    return bool(difference.mean() < -2 * difference.std(ddof=1) / np.sqrt(len(difference)))
