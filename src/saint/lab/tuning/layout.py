"""Where tokens leave and how many stay, as numbers that a search can move; and the plan that says the same.

Letters: N tokens of an image, D layers. Places are numbered in the order in which tokens pass them: 0 is in front of the layers
("input" of an encoder, the connector of a vision-language model), 1 + l is layer l.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...methods.base import Method, step_possible
from ...methods.resize import Resize
from ...needs import PROVIDES
from ...plans import Output, Plan, Stage
from .work import Table


@dataclass(frozen=True)
class Drop:
    """Tokens leave at a place.

    Attributes:
        place: its number.
        method: that chooses them; its budget is set by ``left``.
        left: tokens behind it, of an image of N.
    """

    place: int
    method: Method
    left: int


Layout = tuple[Drop, ...]


@dataclass(frozen=True)
class Space:
    """What a layout can be in a model.

    Attributes:
        slot: of the layers, "vision" or "language".
        entry: whether tokens can leave in front of them.
        mid: whether tokens leave between attention and MLP of a layer.
        depth: D.
        tokens: N; of the smaller picture, where there is one.
        output: of a vision stage, see :class:`saint.Stage`.
        logn: likewise.
        pixels: share that pictures are shrunk to in front of everything; None: they stay as they are.
    """

    slot: str
    entry: bool
    mid: bool
    depth: int
    tokens: int
    output: Output = "survivors"
    logn: float = 0.0
    pixels: int | float | None = None

    def usable(self, method: Method, place: int) -> bool:
        """Tell whether ``method`` can choose at ``place``."""
        slot = "connector" if self.slot == "language" and not place else self.slot
        if not place and (not self.entry or (slot == "connector" and method.merges)):
            return False
        return slot in method.stages and method.asks(slot) <= PROVIDES[slot]

    def possible(self, layout: Layout) -> bool:
        """Tell whether every method can do its step: some take at most half of what is there."""
        came, last = self.tokens, -1
        for drop in layout:
            if not (1 <= drop.left < came and drop.place > last and self.usable(drop.method, drop.place)):
                return False
            if not step_possible(drop.method, came, drop.left):
                return False
            came, last = drop.left, drop.place
        return bool(layout)

    def plan(self, layout: Layout, methods: Sequence[Method] | None = None) -> Plan:
        """The layout as a plan; ``methods``, one for each drop, where budgets are set already."""
        slots: dict[str, Any] = {}
        came = self.tokens
        for number, drop in enumerate(layout):
            method = drop.method.keeping(drop.left / came) if methods is None else methods[number]
            came = drop.left
            layers = None if not drop.place else [drop.place - 1]
            if self.slot == "vision":
                placement: Any = None if drop.place else "input"
                stage = Stage(method, layers=layers, placement=placement, output=self.output, logn=self.logn)
            else:
                stage = Stage(method, layers=layers)
            slots.setdefault("connector" if self.slot == "language" and not drop.place else self.slot, []).append(stage)
        if self.pixels is not None:
            first = Stage(Resize(self.pixels), output=self.output, logn=self.logn)
            slots["vision"] = [first, *slots.get("vision", ())]
        return Plan(**slots)

    def work(self, layout: Layout, table: Table, left: Sequence[Any] | None = None) -> Any:
        """Work that is left, by ``table``; ``left`` behind each drop point, numbers or arrays, instead of the layout's."""
        behind = dict(zip((d.place for d in layout), [d.left for d in layout] if left is None else left, strict=True))
        now = behind.get(0, self.tokens)
        entering, leaving = [], []
        for layer in range(self.depth):
            entering.append(now)
            now = behind.get(layer + 1, now)
            leaving.append(now)
        return table.total(entering, leaving, self.mid)

    def fitted(self, layout: Layout, table: Table, budget: float) -> Layout | None:
        """The layout with its drops made larger or smaller alike until the work is at most ``budget``; None: it cannot be."""
        low, high = 0.02, 30.0  # exponents of the shares that stay
        for _ in range(40):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.work(self._scaled(layout, middle), table) <= budget else (middle, high)
        found = self._scaled(layout, high)
        last = found[-1]
        while True:  # what rounding left over
            more = (*found[:-1], dataclasses.replace(last, left=last.left + 1))
            if more[-1].left >= (found[-2].left if len(found) > 1 else self.tokens):
                break
            if self.work(more, table) > budget:
                break
            found, last = more, more[-1]
        return found if self.work(found, table) <= budget and self.possible(found) else None

    def _scaled(self, layout: Layout, exponent: float) -> Layout:
        scaled = [max(1, round(self.tokens * (drop.left / self.tokens) ** exponent)) for drop in layout]
        return tuple(dataclasses.replace(drop, left=n) for drop, n in zip(layout, scaled, strict=True))

    def even(self, method: Method, places: Sequence[int]) -> Layout:
        """The same share leaves at each of ``places``, half of the tokens in all."""
        ratio = 0.5 ** (1 / len(places))
        return tuple(
            Drop(place, method, max(1, round(self.tokens * ratio ** (i + 1)))) for i, place in enumerate(places)
        )

    def moves(self, layout: Layout, last: int) -> Iterator[Layout]:
        """Neighbours of a layout: a drop point elsewhere, two joined, one split, or tokens that leave earlier or later.

        ``last`` is the last place they may use.
        """
        for i, drop in enumerate(layout):
            if i + 1 < len(layout):
                came = layout[i - 1].left if i else self.tokens
                yield (*layout[:i], *layout[i + 1 :])
                for weight in (0.5, 1.5):  # of the drop's share in logarithms; what follows makes up for it
                    left = round(came * (drop.left / came) ** weight)
                    if layout[i + 1].left < left < came:
                        yield (*layout[:i], dataclasses.replace(drop, left=left), *layout[i + 1 :])
            for place in (drop.place - 1, drop.place + 1):
                if 0 <= place <= last and place not in {other.place for other in layout}:
                    yield (*layout[:i], dataclasses.replace(drop, place=place), *layout[i + 1 :])
        end = layout[-1]
        if end.place < last:
            came = layout[-2].left if len(layout) > 1 else self.tokens
            half = round(math.sqrt(came * end.left))
            if end.left < half < came:
                yield (*layout[:-1], dataclasses.replace(end, left=half), dataclasses.replace(end, place=end.place + 1))
