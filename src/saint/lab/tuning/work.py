"""How much work is left when tokens leave: FLOPs, counted, or time, measured on this machine.

Letters: N tokens (candidates) of an image, n of them left, D layers.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import nn

from ...errors import SaintError
from ...flops import count_flops
from ...methods.random import Random
from ...plans import Output, Plan, Stage
from ...session import pruned
from ..bench.timing import interleave
from ..kinds import Subject
from ..variants import BASE, variants

Unit = Literal["flops", "time"]
_LADDER = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2, 0.12)  # shares of N whose time is measured
_ROUNDS, _WARMUP = 7, 1


@dataclass(frozen=True)
class Table:
    """Work of a layer by its number of tokens, as a share of the unpruned model's.

    Attributes:
        unit: what work is.
        counts: numbers of tokens, descending from N, int64 [G].
        first: of a layer's part in front of a "mid" drop point, float64 [G].
        second: of its part behind it, [G].
        depth: D.
        fixed: of everything but the layers.
    """

    unit: Unit
    counts: np.ndarray
    first: np.ndarray
    second: np.ndarray
    depth: int
    fixed: float

    def over(self, counts: np.ndarray) -> "Table":
        """The same table over other counts, descending."""
        first, second = (self._at(values)(counts) for values in (self.first, self.second))
        return replace(self, counts=counts, first=first, second=second)

    def layer(self, mid: bool) -> np.ndarray:
        """Work of a layer that count i enters and count j leaves, [G, G]."""
        behind = self.second[None, :] if mid else self.second[:, None]
        return self.first[:, None] + behind + np.zeros((len(self.counts), len(self.counts)))

    def total(self, entering: Sequence[Any], leaving: Sequence[Any], mid: bool) -> Any:
        """Work of the model when numbers of tokens (or arrays of them) enter and leave its layers."""
        first, second = (self._at(values) for values in (self.first, self.second))
        behind = leaving if mid else entering
        layers = zip(entering, behind, strict=True)
        return self.fixed + sum(first(a) + second(b) for a, b in layers)

    def _at(self, values: np.ndarray) -> Callable[[Any], Any]:
        if self.unit == "flops":
            return lambda n: np.interp(n, self.counts[::-1], values[::-1])
        up = self.counts[::-1]  # a staircase: what lies between two measured counts takes as long as the larger
        return lambda n: values[::-1][np.minimum(np.searchsorted(up, n), len(up) - 1)]


class Meter:
    """Counts and times forwards of plans, batch 1.

    Args:
        subject: the model, unpruned.
        run: a model's forward on one image.
        slot: the stage whose layers tables are about.
        depth: their number.
        tokens: N.
        output: of a vision stage, see :class:`saint.Stage`.

    Raises:
        ValueError: fewer than two layers.
    """

    def __init__(
        self,
        subject: Subject,
        run: Callable[[nn.Module], Any],
        slot: str,
        depth: int,
        tokens: int,
        output: Output = "survivors",
    ) -> None:
        if depth < 2:
            raise ValueError(f"plans are tuned for models of at least 2 layers, this one has {depth}")
        model = subject.model
        self.model, self.run, self.slot, self.depth, self.tokens, self.output = model, run, slot, depth, tokens, output
        self.device = next(model.parameters()).device
        path = subject.counted
        self._module = f"{type(model).__name__}.{path}" if path else "Global"
        self.whole = self._counted(None, run)

    def flops(self, plan: Plan, run: Callable[[nn.Module], Any] | None = None) -> float:
        """Share of the FLOPs that ``plan`` leaves; of another image with its ``run``.

        Those of :attr:`saint.lab.kinds.Subject.counted`, with what choosing tokens takes: of an encoder all but a head that is no
        part of it, of a vision-language model its language model's for the prompt.
        """
        if run is None:
            return self._counted(plan, self.run) / self.whole
        return self._counted(plan, run) / self._counted(None, run)

    def times(self, plans: Sequence[Plan], rounds: int) -> list[float]:
        """Share of the time that each plan leaves: medians over interleaved rounds."""
        with variants(self.model, {str(number): plan for number, plan in enumerate(plans)}) as made:
            runs = {name: partial(self.run, variant.model) for name, variant in made.items()}
            times = interleave(runs, self.device, rounds, _WARMUP)
        base = times.pop(BASE)
        return [statistics.median(b / a for a, b in zip(base, times[name], strict=True)) for name in times]

    def table(self, unit: Unit, grid: np.ndarray) -> Table:
        """The table over the counts ``grid``, descending from N."""
        n = self.tokens
        some = sorted({n, max(1, round(0.75 * n)), max(1, round(0.5 * n))}, reverse=True)
        if len(some) < 3:
            raise ValueError(f"plans are tuned for images of at least 4 tokens, these have {n}")
        totals = [self.whole, *(self._counted(self._probe(count, "post"), self.run) for count in some[1:])]
        # T(n) = fixed + L(N) + (D - 1) L(n), and L(n) = linear n + square n^2
        square, linear, _ = np.polyfit(some, np.array(totals, dtype=float), 2) / (self.depth - 1)
        half = self._second(some[2], totals[2])
        grid = np.asarray(grid)
        first, second = ((linear - half) * grid + square * grid**2.0) / self.whole, half * grid / self.whole
        fixed = 1 - self.depth * float(first[0] + second[0])
        flops = Table("flops", grid, first, second, self.depth, fixed)
        return flops if unit == "flops" else self._timed(flops)

    def _second(self, count: int, post: int) -> float:
        """FLOPs per token of a layer's part behind a "mid" drop point; 0 where there is no such place."""
        if self.slot != "vision":
            return 0.0
        try:
            mid = self._counted(self._probe(count, "mid"), self.run)
        except (SaintError, ValueError):
            return 0.0
        return (post - mid) / (self.tokens - count)

    def _timed(self, flops: Table) -> Table:
        """``flops`` with the measured time of layers, split at "mid" as their FLOPs are."""
        counts = sorted({max(1, round(share * self.tokens)) for share in _LADDER}, reverse=True)
        probes = [self._probe(count, "post") for count in counts[1:]]
        shares = [1.0, *self.times(probes, _ROUNDS)]
        rising = np.maximum.accumulate(np.array(shares)[::-1])[::-1]  # fewer tokens never take longer: noise
        step = np.array([counts.index(min(c for c in counts if c >= n)) for n in flops.counts])
        saved = (rising[0] - rising[step]) / (self.depth - 1)  # of one layer
        gone = flops.first[0] + flops.second[0] - flops.first - flops.second
        part = (flops.first[0] - flops.first) / np.where(gone > 0, gone, 1.0)
        first, second = flops.first[0] - saved * part, flops.second[0] - saved * (1 - part)
        return replace(flops, unit="time", first=first, second=second)

    def _probe(self, count: int, placement: Literal["mid", "post"]) -> Plan:
        stage = Stage(Random(keep=count), layers=[0], placement=placement, output=self.output)
        slots: dict[str, Any] = {self.slot: stage}
        return Plan(**slots)

    def _counted(self, plan: Plan | None, run: Callable[[nn.Module], Any]) -> int:
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(pruned(self.model, plan))
            found = count_flops(lambda: run(self.model))[1]
        return sum(found.by_module[self._module].values())
