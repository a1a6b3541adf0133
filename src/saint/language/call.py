"""The arguments of a decoder layer, by what they mean: spellings are resolved once, when a plan is applied."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..upstream.names import CACHE, MASK, POSITIONS, ROTARY, Parameters

# where there are rotary tables, they carry the true positions to the survivors; position ids are not taken by every layer
REQUIRED = (MASK, CACHE)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer behind the hidden states; None where one was not given.

    Attributes:
        cache: of keys and values.
        mask: of attention.
        rotary: rotary tables.
        positions: position ids.
        rest: all others by name.
    """

    cache: Any
    mask: Any
    rotary: Any
    positions: Any
    rest: dict[str, Any]


class Spelling:
    """How one layer spells its arguments.

    Args:
        forward: of its class.

    Attributes:
        mask: the name of that of attention.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.parameters = Parameters(forward)
        self._cache, self.mask, self._rotary, self._positions = own = [
            self.parameters.spelling(role) for role in (CACHE, MASK, ROTARY, POSITIONS)
        ]
        self._turns = self.parameters.has(ROTARY)
        known = {name for role in (CACHE, MASK, ROTARY, POSITIONS) for name in role.spellings}
        self._others = known - set(own)  # of other releases: callers may still use them

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The arguments behind the hidden states."""
        rest = self.parameters.named(args, kwargs, skip=1) if args else dict(kwargs)
        if not self._others.isdisjoint(rest):
            for role in (CACHE, MASK, ROTARY, POSITIONS):
                rest = self.parameters.put(rest, role, role.read(rest))
        return Call(
            rest.pop(self._cache, None),
            rest.pop(self.mask, None),
            rest.pop(self._rotary, None),
            rest.pop(self._positions, None),
            rest,
        )

    def write(self, call: Call) -> dict[str, Any]:
        """``call`` by the names that the layer takes."""
        given = {**call.rest, self._cache: call.cache, self.mask: call.mask}
        if self._turns or call.rotary is not None:
            given[self._rotary] = call.rotary
        if call.positions is not None:
            given[self._positions] = call.positions
        return given
