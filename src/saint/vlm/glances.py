"""What the vision tower showed of each visual token of a prompt, for methods in front of the language model.

The tower, the connector and the prompt run one after the other, and often in calls of their own: ``generate`` encodes in front of
the forward and copies features for its beams, users encode once and ask several times, prompts come in pieces. Features are
copied into a prompt, so what was noted of a row is found again by what the row holds, as in ``merged.py``.

Letters: B prompts, N visual tokens of the longest prompt, R features of a call, C channels.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..gathers import full_length
from ..patch import Uncopyable
from ..tokens import Tower
from ..vision.encoder import PrunedEncoder
from ..vision.inputs import EncoderForward
from .merged import numbers

_CALLS = 64  # of the tower, whose features are known again


@dataclass(frozen=True)
class _Call:
    """One call of the tower: a number of each of its features, ascending, int64 [R], and what it showed of them, [R, ...].

    The forward is not held: its maps and masks may be freed.
    """

    forward: "ref[EncoderForward]"
    numbers: Tensor
    tower: Tower


class Glances(Uncopyable):
    """What methods of the connector stage asked of the vision tower.

    Args:
        encoder: the tower.
        read: the 0-based layer behind which the language model's features are read.
    """

    def __init__(self, encoder: PrunedEncoder, read: int) -> None:
        self.encoder, self.read = encoder, read
        self._calls: deque[_Call] = deque(maxlen=_CALLS)

    def forget(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def note(self, features: Iterable[Tensor], packs: bool = False) -> None:
        """Note whose features the last call of the tower became.

        Args:
            features: one for each candidate of the tower, in order, [..., C] each.
            packs: they may have been packed with others since, and were noted before that.

        Raises:
            UnsupportedModelError: there are more or fewer.
        """
        encoder, forward = self.encoder, self.encoder.forward
        assert forward.origin is not None
        rows = [one.detach().flatten(0, -2) for one in features]
        count, tower = sum(map(len, rows)), self._tower(forward)
        if count != len(tower.place):
            if packs:
                return
            raise UnsupportedModelError(
                f"the {type(encoder.module).__name__} showed {len(tower.place)} tokens, and they became {count} features, so "
                "what a method asks of the tower is not known of each: use a method that looks at features alone"
            )
        own = torch.cat([numbers(one) for one in rows]).sort()
        calls = list(self._calls)
        if calls and calls[-1].forward() is forward:  # the same features, further on their way
            self._calls.pop()
        self._calls.append(_Call(ref(forward), own.values, tower[own.indices]))

    def _tower(self, forward: EncoderForward) -> Tower:
        """Lay out what a forward of the encoder showed of its candidates, in the order of the features, [R, ...]."""
        encoder, origin = self.encoder, forward.origin
        assert origin is not None
        tokens, order = origin.candidates, encoder.outputs.rows
        shown = {
            (what, layer): order(full_length(value, glance.tokens, 0, 0.0))
            for layer, glance in forward.glances.items()
            for what, value in glance.shown.items()
        }
        grids = encoder.inputs.grids(forward)
        grid = torch.tensor(grids or [(0, 0)] * len(tokens.index), device=tokens.index.device)
        grid = grid.unsqueeze(1).expand(*tokens.index.shape, 2)
        return Tower(shown, encoder.depth, self.read, order(tokens.index), order(grid), encoder.prefix)

    def recall(self, rows: Tensor, real: Tensor) -> Tower | None:
        """Tell what the tower showed of visual tokens; None where there are none.

        Args:
            rows: that enter the language model, [B, N, C].
            real: bool [B, N]; what is shown of others is anything.

        Raises:
            UnsupportedModelError: some of them are no features of the tower.
        """
        wanted, missing, found = numbers(rows), real, None
        for call in reversed(list(self._calls)):
            place = torch.searchsorted(call.numbers, wanted).clamp_max(len(call.numbers) - 1)
            fresh = missing & (call.numbers[place] == wanted)
            found = call.tower[place] if found is None else _joined(found, call.tower[place], fresh)
            missing = missing & ~fresh
            if not bool(missing.any()):
                return found
        if not bool(missing.any()):
            return None
        unknown, name = f"{int(missing.sum())} of {int(real.sum())}", type(self.encoder.module).__name__
        raise UnsupportedModelError(
            f"{unknown} visual tokens are no features that the {name} showed (newlines between rows of a picture, or pooled "
            "ones), so what a method asks of it is not known: use a method that looks at features alone"
        )


def _joined(one: Tower, other: Tower, where: Tensor) -> Tower:
    """``other`` where bool [B, N], else ``one``."""
    rows = where.unsqueeze(-1)
    shown = {what: torch.where(rows, other.shown[what], value) for what, value in one.shown.items()}
    place, grid = torch.where(where, other.place, one.place), torch.where(rows, other.grid, one.grid)
    return Tower(shown, one.depth, one.read, place, grid, one.prefix)
