"""What the callers of a pruned encoder see: padding that no pool notices, full-length maps, marks at dropped tokens.

Letters: B batch, P prefix tokens, N candidates, K survivors, G groups, C channels, D head dim.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..gathers import (
    DROPPED,
    by_length,
    fill_padding,
    full_length,
    gather_tokens,
    nearest_survivor,
    similar_survivor,
)
from ..graph import metric
from ..patch import Uncopyable, override
from ..runtime.forwards import Forwards, PerThread
from ..runtime.state import LayerState
from ..tokens import Selection, TokenMap
from ..upstream.names import ALL_STATES, Role
from ..upstream.specs import EncoderSpec, part
from .inputs import EncoderForward
from .readers import Reader


@dataclass(frozen=True)
class FullLength:
    """Gives the maps of a forward their full length back; knows no module.

    Attributes:
        output: see :class:`saint.Stage`.
        prefix: protected tokens P.
    """

    output: str
    prefix: int

    def stand_ins(self, forward: EncoderForward, layer: int) -> Tensor:
        """For each original candidate the slot in front of ``layer`` that stands for it, int64 [B, N]."""
        state, grid = forward.states[layer], forward.grid
        tokens = state.tokens
        if self.output in ("similar", "carried"):
            assert state.stand_ins is not None
            return state.stand_ins
        if grid is None or grid[0] * grid[1] != tokens.width:
            raise ValueError(
                f"the patch grid {grid} does not hold the {tokens.width} candidates, so a dropped token has no "
                'nearest survivor on it; use Stage(..., output="similar")'
            )
        return forward.once("nearest", lambda: nearest_survivor(tokens, grid), tokens)

    def expand(self, forward: EncoderForward, x: Tensor, layer: int) -> Tensor:
        """Full length again: every original candidate gets the row of the survivor that stands for it.

        Args:
            forward: whose map it is.
            x: [B, P + K, C] in front of ``layer``.
            layer: the number of layers for the map behind the last.

        Returns:
            [B, P + N, C].

        Raises:
            RuntimeError: the rows that dropped tokens had, of ``output="carried"``, are no longer there.
        """
        state = forward.states[layer]
        if state.tokens.nothing_dropped:
            return x
        full = gather_tokens(x, self.stand_ins(forward, layer), self.prefix)  # [B, P + N, C]
        if self.output != "carried":
            return full
        if state.offsets is None:
            raise RuntimeError(
                'expand() of output="carried" needs the rows that dropped tokens had, which a removed session has let go: '
                "call it inside the with block, before remove()"
            )
        return torch.cat([full[:, : self.prefix], full[:, self.prefix :] + state.offsets], 1)


def _hole() -> float:
    """Return what stands at dropped tokens in a map of full length.

    NaN shows whether anything lets a dropped token touch a kept one, but would spoil the gradients of weights.
    """
    return DROPPED if torch.is_grad_enabled() else torch.nan


class Outputs(Uncopyable):
    """Hidden states behind a block, and what final norms, pools and dense calls make of them.

    Args:
        encoder: the module that owns the blocks.
        spec: what is known of its class.
        depth: its blocks.
        output: see :class:`saint.Stage`.
        restored: layers in front of which the sequence is full length, for a merger that reads it there.
        forwards: of the encoder.
        reader: of the rows, around the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        spec: EncoderSpec,
        depth: int,
        output: str,
        restored: frozenset[int],
        forwards: Forwards[EncoderForward],
        reader: Reader | None = None,
    ) -> None:
        self.module, self.spec, self.depth = encoder, spec, depth
        self.output, self.restored = output, restored
        self.forwards = forwards
        self.prefix = spec.prefix(encoder)
        self.full = FullLength(output, self.prefix)
        self.pools_prefix = spec.pool_with_prefix(encoder)
        self.reader = reader
        self.marks = reader is not None and reader.spec.decoder is not None  # padding is marked, for a mask behind it
        self.dense = PerThread(bool)  # full-length block outputs, for callers that reshape to the grid

    def install(self, stack: ExitStack) -> None:
        """Patch what stands behind the blocks; ``stack`` undoes it."""
        final = part(self.module, self.spec.final) if self.spec.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(self._fill_hook).remove)
        for path in self.spec.pools:
            pool = part(self.module, path)
            if pool is not None:
                override(stack, pool, "forward", self._pool)
        for name, valid in self.spec.masked_pools.items():
            override(stack, self.module, name, partial(self._masked_pool, valid))
        for name in self.spec.dense_calls:
            if hasattr(self.module, name):
                override(stack, self.module, name, self._dense_call)
        config = getattr(self.module, "config", None)
        if self.output != "survivors" and ALL_STATES.of(config) is not None:
            # hidden states behind every layer, where they are asked for, are read as the last are: at full length
            self._dense_while(stack, self.module, lambda given: bool(ALL_STATES.read(given, ALL_STATES.get(config))))
        if self.reader is not None:
            self.reader.install(stack)
            if self.reader.spec.dense:
                self._dense_while(stack, self.reader.module, lambda given: True)

    # -- behind each block --------------------------------------------------------------------------------------------

    def leave(self, forward: EncoderForward, after: int, state: LayerState, y: Tensor) -> Tensor:
        """Note the state in front of layer ``after``, and give the hidden states the length that is expected there.

        Args:
            forward: the forward.
            after: the layer; the number of layers behind the last.
            state: of ``y``.
            y: hidden states, [B, P + K, C].

        Returns:
            [B, P + K, C] or full length, [B, P + N, C].
        """
        tokens, last = state.tokens, after == self.depth
        forward.states[after] = state
        if not (last or after in self.restored or self.dense.get()) or tokens.nothing_dropped:
            return y
        if after in self.restored:
            y = full_length(y, tokens, self.prefix, _hole())  # [B, P + N, C]
        elif last and self.output == "survivors" and not self.dense.get():
            return self._fill(y, tokens)
        else:
            y = self.full.expand(forward, y, after)  # [B, P + N, C]
        forward.states[after] = replace(state, full_length=True)
        return y

    # -- behind the last block ----------------------------------------------------------------------------------------

    def _behind(self) -> LayerState | None:
        """The state behind the last layer, where tokens are missing from it."""
        state = self.forwards.state.states.get(self.depth)
        return None if state is None or state.tokens.nothing_dropped else state

    def _fill_hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        state = self._behind()
        if state is None:
            return None
        tokens = state.tokens
        if state.full_length:
            full = self.depth in self.restored and output.shape[-2] == self.prefix + tokens.width
            return self._mark(output, tokens) if full else None  # the norm has blurred the rows of dropped tokens
        if output.ndim != 3 or output.shape[1] != self.prefix + tokens.slots:
            return None  # the norm of a pooled vector, or of an intermediate map
        return self._fill(output, tokens)

    def _fill(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Rows of padding that no pool notices, or that the reader can tell: x [B, P + K, C]."""
        if tokens.valid is None:
            return x
        if not self.marks:
            keys = self.forwards.state.keys_of(tokens, self.prefix)
            return fill_padding(x, tokens, self.prefix, with_prefix=self.pools_prefix, keys=keys)
        padding = torch.nn.functional.pad(~tokens.valid, (self.prefix, 0))  # [B, P + K]
        return x.masked_fill(padding.unsqueeze(-1), DROPPED)

    def _mark(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Mark the rows of dropped tokens of a full-length map, [B, P + N, C] or packed [N, C]."""
        gone = torch.nn.functional.pad(~tokens.here, (self.prefix, 0))  # [B, P + N]
        return x.masked_fill((gone[0] if x.ndim == 2 else gone).unsqueeze(-1), _hole())

    def _pool(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            state = self._behind()
            if state is None or state.full_length:
                return original(x, *args, **kwargs)
            # any mask the caller passed is full length and masks only padding, which is gone
            return by_length(state.tokens, x, lambda part_x, _: (original(part_x),))[0]

        return pool

    def _masked_pool(self, valid: Role, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(*args: Any, **kwargs: Any) -> Tensor:
            state = self._behind()
            if state is not None and not state.full_length:
                # of full length; rows behind the survivors hold their mean, which no pool notices
                kwargs = {name: value for name, value in kwargs.items() if name not in valid.spellings}
            return original(*args, **kwargs)

        return pool

    def _dense_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def dense(*args: Any, **kwargs: Any) -> Any:
            before = self.dense.get()
            self.dense.set(True)
            try:
                return original(*args, **kwargs)
            finally:
                self.dense.set(before)

        return dense

    def _dense_while(self, stack: ExitStack, module: nn.Module, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Full-length maps while ``module`` is called with keyword arguments that are ``wanted``; ``stack`` undoes it.

        By hooks: an export takes no other ``forward`` of the module it is given.
        """

        def begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            if wanted(kwargs):
                self.dense.set(True)

        def end(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            if wanted(kwargs):
                self.dense.set(False)

        stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(end, with_kwargs=True, always_call=True).remove)

    # -- full length --------------------------------------------------------------------------------------------------

    def lost(self, layer: int) -> Tensor | None:
        """Mark the groups that are gone in front of ``layer``, picture by picture, bool [groups]; None: none."""
        forward = self.forwards.state
        if layer not in forward.states or forward.states[layer].tokens.nothing_dropped:
            return None
        gone = ~forward.states[layer].tokens.here
        assert forward.origin is not None
        places = forward.origin.places  # None: every token is a group
        return self.rows(gone if places is None else gone.flatten()[places[:, :, 0]])

    def rows(self, of_groups: Tensor) -> Tensor:
        """Order what is known of the forward's groups as features follow each other, picture by picture.

        Args:
            of_groups: [B, G, ...].

        Returns:
            [groups, ...].
        """
        origin = self.forwards.state.origin
        assert origin is not None
        valid = origin.candidates.valid
        return of_groups.flatten(0, 1) if origin.places is None or valid is None else of_groups[valid]

    def stand_in(self, keys: Tensor, selection: Selection) -> Tensor | None:
        """For each current candidate the new slot that stands for it, int64 [B, N]; keys [B, N, D]; None: not asked for."""
        if self.output not in ("similar", "carried"):
            return None
        if selection.owner is None:
            return similar_survivor(metric(keys), selection)
        if selection.gone is None:
            return selection.owner
        return torch.where(selection.gone, similar_survivor(metric(keys), selection), selection.owner)

    def carry(self, state: LayerState, rows: Tensor, after: LayerState, stay: Tensor) -> LayerState:
        """``after`` with the offsets that give each original candidate that is gone the row it has now; survivors have none.

        Args:
            state: in front of a drop.
            rows: of its candidates, [B, N, C].
            after: the state behind it.
            stay: rows of the survivors, [B, K, C].
        """
        assert after.stand_ins is not None
        now = rows if state.stand_ins is None else gather_tokens(rows, state.stand_ins, 0)
        now = now if state.offsets is None else now + state.offsets
        offsets = now - gather_tokens(stay, after.stand_ins, 0)
        # a survivor that became a mean shows that
        return replace(after, offsets=offsets.masked_fill(after.tokens.here.unsqueeze(-1), 0.0))
