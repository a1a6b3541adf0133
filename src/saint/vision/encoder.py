"""A pruned encoder: what blocks on shrinking sequences need.

What stands in front of the blocks is in ``inputs.py``, what stands behind them in ``outputs.py``, and what is checked before
anything is touched in ``checks.py``.

Letters: B batch, P prefix tokens, N candidates, K survivors, C channels, D head dim.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..gathers import by_length, gather_mask, gather_table, shorter
from ..needs import TOWER, TOWER_ATTENTION, TOWER_KEYS
from ..patch import override
from ..runtime.blocks import Block, refuse_meta
from ..runtime.deciding import Seen
from ..runtime.layer import LayerStack, PrunedLayer
from ..runtime.observe import Observers
from ..runtime.points import DropPoint
from ..runtime.received import Received, is_sum
from ..runtime.state import LayerState
from ..tokens import Selection, TokenMap
from ..upstream.names import LONGEST
from ..upstream.specs import EncoderSpec, part
from .checks import (
    check_attention,
    check_bias,
    check_output,
    check_seams,
    check_softer,
    placed,
    prove,
    read_blocks,
    takes_dense_mask,
)
from .inputs import EncoderForward, Glance, Inputs
from .outputs import Outputs
from .readers import Reader


@dataclass(frozen=True)
class Settings:
    """What a plan says of the vision slot as a whole: see :class:`saint.Stage`."""

    output: str = "survivors"
    guard: float = 0.0
    logn: float = 0.0


class PrunedEncoder(LayerStack[EncoderForward, dict[str, Any]]):
    """The vision stage of a session.

    Args:
        path: where the encoder sits in the user's model, for messages.
        encoder: the module that owns the blocks.
        spec: what is known of its class.
        points: drop points; a placement of "" means "mid" where every such point has a place between attention and MLP, else
            "post".
        settings: of the plan.
        observers: of the session.
        merge_size: side of the square of patches that a merger behind the encoder joins into one token. Those squares are the
            candidates then: a method sees their mean keys, and their tokens stay or go together.
        restored: layers in front of which the sequence is full length again, for a merger that reads it there.
        reader: of the rows, around the encoder.

    Raises:
        UnsupportedModelError: an unknown block class, ``placement="mid"`` at a block without a place for it, parameters on
            ``meta``, a compiled model.
        ParityError: the blocks are not what the table says.
    """

    slot = "vision"

    def __init__(
        self,
        path: str,
        encoder: nn.Module,
        spec: EncoderSpec,
        points: Sequence[DropPoint],
        *,
        settings: Settings = Settings(),
        observers: Observers,
        merge_size: int | None = None,
        restored: frozenset[int] = frozenset(),
        reader: Reader | None = None,
    ) -> None:
        refuse_meta(encoder)
        self.spec, self.merge_size = spec, merge_size
        blocks = list(part(encoder, spec.blocks))
        self.prefix, self.packed = spec.prefix(encoder), spec.packed
        super().__init__(path, encoder, blocks, placed(spec, blocks, points), EncoderForward, observers)
        first = 0 if self.entries else min(self.points, default=self.depth)
        self.blocks = read_blocks(encoder, spec, blocks, first)
        check_seams(self.blocks, self.points)
        beta = max((p.method.size_bias() for p in self.points.values() if p.method is not None), default=0.0)
        for block in self.blocks[self.first_short :] if beta else ():
            check_bias(block, block is not None and self._masks(block), beta)
        output, self.logn = settings.output, settings.logn
        if self.logn:
            check_softer(encoder, spec, self.blocks[self.first_short :], self.logn)
        check_output(encoder, spec, output)
        prove(self.blocks, self.points, self.prefix)
        self.inputs = Inputs(
            encoder,
            spec,
            merge_size,
            self.forwards,
            settings.guard,
            frames=self.wants_frames,
            pixels=self.wants_pixels,
            channels=self.wants_channels,
            resize=self.resize,
        )
        self.carries = output == "carried"
        self.outputs = Outputs(encoder, spec, self.depth, output, restored, self.forwards, reader)
        self.patched, self.marked = encoder if reader is None else reader.module, (encoder,)
        self.stacks = (self,)
        self.alone, self.handover = encoder, None
        # blocks of one form take the same arguments in the same way
        forms: dict[Any, int] = {}
        self.forms = [-1] * self.depth
        for index, block in enumerate(self.blocks):
            if block is not None:
                key = (
                    block.spec,
                    block.mask,
                    block.bias is None,
                    tuple(block.tables),
                    block.segments,
                    type(block.module),
                )
                self.forms[index] = forms.setdefault(key, len(forms))
        self.restored = restored
        self.attends: list[tuple[str, ...]] = [()] * self.depth  # what is asked of each layer's attention
        for index, point in self.points.items():
            self.attends[index] = tuple(sorted(point.needs & TOWER_ATTENTION))
        if any(self.attends):
            check_attention(encoder)

    @property
    def layer_kinds(self) -> Sequence[type[PrunedLayer]]:
        if self.observers.layer or self.observers.attention:
            return super().layer_kinds
        inner = [
            0 < i < self.depth - 1 and i not in self.points and i + 1 not in self.restored for i in range(self.depth)
        ]
        return [EncoderLayer if one else PrunedLayer for one in inner]

    # -- installation -------------------------------------------------------------------------------------------------

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        self.replace_layers(stack)
        first_short = self.first_short
        for index in range(self.depth):
            block = self.blocks[index]
            if block is None:
                continue
            if index in self.points:
                stack.callback(block.watch_keys(partial(self._keep_keys, index)))
            if index >= first_short and block.spec.padding:
                attention = part(block.module, block.spec.padding)
                hook = attention.register_forward_pre_hook(self._padding_hook(index), with_kwargs=True)
                stack.callback(hook.remove)
            if index >= first_short and block.bias is not None:
                holder, _, method = block.bias.rpartition(".")
                override(stack, part(block.module, holder), method, partial(self._pairs, index))
            if index >= first_short and self.logn:  # behind what keeps the keys: methods see them as they are
                stack.callback(block.scale_keys(partial(self._softer, index)))
        self.inputs.install(stack)
        self.outputs.install(stack)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _keep_keys(self, layer: int, index: int, shown: Any) -> None:
        keys = self.forward.captured_keys
        # heads of parallel attentions are heads like any other: [B, units * H, N, D]
        keys[layer] = shown if index == 0 else torch.cat([keys[layer], shown], 1)

    def _padding_hook(self, layer: int) -> Callable[..., Any]:
        def add_padding(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state, x = self.forward.states[layer], args[0] if args else kwargs["query"]
            keys, bias = self.forward.keys_of(state.tokens, self.prefix), self._bias(layer, state, x.dtype)
            if bias is not None:
                hidden = bias if keys is None else bias.masked_fill(~keys, -torch.inf)
                return args, {**kwargs, "key_padding_mask": hidden}
            return None if keys is None else (args, {**kwargs, "key_padding_mask": ~keys})

        return add_padding

    def _pairs(self, layer: int, original: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
        def pairs(*args: Any, **kwargs: Any) -> Tensor | None:
            bias, state = original(*args, **kwargs), self.forward.states.get(layer)
            if state is None or state.tokens.nothing_dropped:
                return bias
            keys = self.forward.keys_of(state.tokens, self.prefix)
            return _mask(bias, state.tokens, keys, self.prefix, bias.dtype, self._bias(layer, state, bias.dtype))

        return pairs

    def _softer(self, layer: int) -> float | Tensor | None:
        """Return what multiplies the logits of a layer, of all samples or of each, [B]; see :attr:`saint.Stage.logn`."""
        state = self.forward.states.get(layer)
        if state is None or state.tokens.nothing_dropped:
            return None
        tokens = self.forward.part or state.tokens
        pairs = zip(tokens.lengths, tokens.total, strict=True)
        factors = [_softened(self.prefix + n, self.prefix + total, self.logn) for n, total in pairs]
        return factors[0] if len(set(factors)) == 1 else torch.tensor(factors, device=tokens.index.device)

    # -- one layer ----------------------------------------------------------------------------------------------------

    def named(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        block = self.blocks[layer]
        return ((), block.named(args, kwargs)) if args and block is not None else (args, kwargs)

    def arrive(self, layer: int, x: Tensor, call: dict[str, Any]) -> tuple[EncoderForward, LayerState | None]:
        forward = self.forwards.enter(layer, x, begins=layer == 0)
        if layer == 0 and not forward.states:  # else it is run again for its gradients
            block = self.blocks[layer]
            mask = None if block is None or block.spec.bias or block.mask is None else call.get(block.mask)
            x_samples = x.unsqueeze(0) if x.ndim == 2 else x  # [B, P + N, C]
            if self.packed and mask is None and (block is None or block.segments is None):
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} lays all pictures in one sequence, and nothing tells its blocks where each "
                    'ends: load the model with attn_implementation="sdpa"'
                )
            origin = self.inputs.begin(forward, x_samples, mask)  # a bias hides no token
            forward.full = self.outputs.dense.get()
            self.begin_layers(forward, origin, x_samples[:, self.prefix :])
        if layer not in forward.states:
            raise RuntimeError(
                f"block {layer} ran without the blocks before it; the plan prunes complete forwards only"
            )
        return forward, forward.states[layer]

    def stand_in(self, keys: Tensor, selection: Selection) -> Tensor | None:
        return self.outputs.stand_in(keys, selection)

    def carry(self, state: LayerState, rows: Tensor, after: LayerState, stay: Tensor) -> LayerState:
        return self.outputs.carry(state, rows, after, stay) if self.carries else after

    def where(self, point: DropPoint) -> str:
        if point.placement == "input":
            return f"the patch embeddings of {self.path or type(self.module).__name__}"
        return f"the attention keys of {self.spec.blocks}.{point.layer}"

    def _bias(self, layer: int, state: LayerState, dtype: torch.dtype) -> Tensor | None:
        """Give what proportional attention adds to the logits of each key, [B, P + K]; None when all count alike."""
        bias = state.key_bias(dtype)
        if bias is None:
            return None
        block = self.blocks[layer]
        # once more: the attention implementation may have been switched since
        check_bias(block, block is not None and self._masks(block), state.beta)
        return torch.nn.functional.pad(bias, (self.prefix, 0)).to(dtype)

    def takes_padding(self, block: Block) -> bool:
        """Tell whether a block runs on padded samples: there is a way to hide padding."""
        return block.spec.padding is not None or bool(block.spec.bias) or self._masks(block)

    def arguments(
        self, forward: EncoderForward, layer: int, state: LayerState, dtype: torch.dtype, call: dict[str, Any]
    ) -> dict[str, Any]:
        """The block's arguments for the tokens that are left, which are of ``dtype``; weights may be of another."""
        tokens, block = state.tokens, self.blocks[layer]
        assert block is not None
        out = dict(call)
        for name in block.tables:
            value = call.get(name)
            if value is not None:
                out[name] = forward.once(name, partial(_map_tables, value, tokens), tokens, value)
        if block.segments is not None:
            ends = call[block.segments]
            short = out[block.segments] = forward.once("segments", partial(shorter, ends, tokens), tokens, ends)
            if LONGEST.read(call) is not None:  # flash attention
                longest = forward.once("longest", lambda: int((short[1:] - short[:-1]).max()), short)
                out = block.parameters.put(out, LONGEST, longest)
        mask = block.mask
        if mask is not None and block.spec.padding is None:
            given = call.get(mask)
            own = block.bias is not None  # hides padding and weighs merged tokens: once is enough
            if given is not None or (not own and (tokens.valid is not None or state.sizes is not None)):

                def short_mask() -> Tensor | None:
                    m = given
                    if m is not None and m.ndim == 3 and block.spec.bias:
                        m = m.unsqueeze(0)  # [1, H, P + N, P + N]
                    keys = forward.keys_of(tokens, self.prefix)
                    return _mask(m, tokens, keys, self.prefix, dtype, None if own else self._bias(layer, state, dtype))

                out[mask] = forward.once(mask, short_mask, tokens, given)
        forward.shortened[id(tokens), self.forms[layer]] = tokens, call, out
        return out

    def run(
        self,
        forward: EncoderForward,
        layer: int,
        state: LayerState,
        original: Callable[..., Any],
        x: Tensor,
        call: dict[str, Any],
    ) -> tuple[Any, Seen | None]:
        block, tokens, shows = self.blocks[layer], state.tokens, layer in self.points
        kinds = self.attends[layer]

        def on_part(part_x: Tensor, part_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
            flat = block is not None and block.segments is not None
            received = None
            if kinds:
                real = None if forward.part is not None else forward.keys_of(tokens, self.prefix)
                received = Received(kinds, self.prefix, state, real)
            with nullcontext() if received is None else received.listening:
                y = original(part_x[0], **part_kwargs)[None] if flat else original(part_x, **part_kwargs)
            if not shows:
                return (y,)
            keys = self.keys(forward, layer)
            if received is None:
                return y, keys
            return y, keys, received.take(keys.shape[1], f"{self.spec.blocks}.{layer}")

        if block is None or tokens.nothing_dropped:
            out = on_part(x, call)
        elif tokens.valid is None or self.takes_padding(block):
            with self.gathering:
                short_call = self.arguments(forward, layer, state, x.dtype, call)
            out = on_part(x, short_call)
        else:

            def short(part_x: Tensor, part_tokens: TokenMap) -> tuple[Tensor, ...]:
                part_kwargs = dict(call)
                for name in block.tables:
                    if call.get(name) is not None:
                        part_kwargs[name] = _map_tables(call[name], part_tokens)
                if block.mask in call:
                    part_kwargs[block.mask] = None  # it hides padding, of which nothing is left
                forward.part = part_tokens
                try:
                    return on_part(part_x, part_kwargs)
                finally:
                    forward.part = None

            # this attention takes no dense mask: samples of equal length run together, nothing is padded
            out = by_length(tokens, x, short)
        return out[0], Seen(out[1], received=out[2] if kinds else None) if shows else None

    def rows(self, forward: EncoderForward, point: DropPoint, state: LayerState, seen: Seen) -> dict[str, Tensor]:
        if asked := point.needs & TOWER:
            forward.glances[point.layer] = self._glance(point, state, seen, asked)
        kinds = self.attends[point.layer] if seen.received is not None else ()
        return {kind: forward.glances[point.layer].shown[kind].squeeze(-1) for kind in kinds}

    def _glance(self, point: DropPoint, state: LayerState, seen: Seen, asked: frozenset[str]) -> Glance:
        """Note what a layer showed of its candidates, for a method there or behind the encoder that asked for it."""
        tokens = state.candidates
        shown: dict[str, Tensor] = {}  # no call of dict[...]: torch.compile would break the graph there
        if seen.received is not None:
            members = 1 if state.places is None else state.places.shape[2]
            queries = torch.tensor([self.prefix + n * members for n in tokens.lengths], device=tokens.index.device)
            for kind, own in zip(self.attends[point.layer], seen.received.unbind(-1), strict=True):
                own = state.of_candidates(own.unsqueeze(-1))  # [B, N, 1]
                shown[kind] = own / queries.view(-1, 1, 1) if is_sum(kind, self.prefix) else own
        if TOWER_KEYS in asked:
            shown[TOWER_KEYS] = state.of_candidates(seen.keys).float()
        return Glance(tokens, shown)

    def keys(self, forward: EncoderForward, layer: int) -> Tensor:
        """Head-mean keys of the call of a layer that has just run, [B, N, D]."""
        block = self.blocks[layer]
        assert block is not None
        with self.scoring:
            return block.head_mean_keys(forward.captured_keys.pop(layer, None), self.prefix)

    def _masks(self, block: Block) -> bool:
        return takes_dense_mask(self.module, block)

    def leave(self, forward: EncoderForward, layer: int, state: LayerState, y: Tensor, call: dict[str, Any]) -> Tensor:
        return self.outputs.leave(forward, layer + 1, state, y)


class EncoderLayer(PrunedLayer):
    """An inner one of an encoder: it runs as if nothing stood in for it, on the arguments that a block in front of it made."""

    stack: PrunedEncoder

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.layer
        if args or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().__call__(x, *args, **kwargs)
        forward = None if stack.forwards.compiled else stack.forwards.here.state
        state = None if forward is None or forward.full else forward.states.get(layer)
        if forward is None or state is None or state.full_length or x.ndim == 2:
            return super().__call__(x, **kwargs)
        tokens = state.tokens
        if tokens.lengths != tokens.total:  # no call: this is asked of every layer
            known = forward.shortened.get((id(tokens), stack.forms[layer]))
            made = known is not None and len(known[1]) == len(kwargs)
            for name, value in known[1].items() if known is not None and made else ():
                made = made and name in kwargs and kwargs[name] is value
            if known is not None and made:
                kwargs = known[2]
            else:
                block = stack.blocks[layer]
                if block is None or not (tokens.valid is None or stack.takes_padding(block)):
                    return super().__call__(x, **kwargs)
                kwargs = stack.arguments(forward, layer, state, x.dtype, kwargs)
        forward.states[layer + 1] = state
        return self.original(x, **kwargs)


def _map_tables(value: Any, tokens: TokenMap) -> Any:
    if isinstance(value, tuple):
        return tuple(_map_tables(table, tokens) for table in value)
    return gather_table(value, tokens) if value.shape[-2] == tokens.width else value


def _mask(
    given: Tensor | None,
    tokens: TokenMap,
    keys: Tensor | None,
    prefix: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Additive mask of the survivors, [B, 1, 1 or Q, P + K]; None when nothing is masked.

    Args:
        given: that of the original tokens.
        tokens: the survivors.
        keys: which of them are no padding, bool [B, P + K]; None: all.
        prefix: P.
        dtype: of the mask.
        bias: is added, [B, P + K].
    """
    mask = None if bias is None else bias[:, None, None]
    if mask is not None and keys is not None:
        mask = mask.masked_fill(~keys[:, None, None], -torch.inf)
    elif keys is not None:
        # log of True and False: 0 and -inf. No kernel of torch needs the key axis padded to a multiple of 8.
        mask = keys.log().to(dtype)[:, None, None]  # [B, 1, 1, P + K]
    if given is None:
        return mask
    if given.ndim != 4:
        raise ValueError(
            f"an attention mask of shape {tuple(given.shape)} was passed; [B, heads, queries, keys] is expected"
        )
    kept = gather_mask(given, tokens, prefix)
    if kept.dtype == torch.bool:
        kept = torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill_(~kept, -torch.inf)
    return kept if mask is None else kept + mask


def _softened(left: int, total: int, power: float) -> float:
    """(ln n / ln N) ** power; of one or two tokens there is nothing to soften."""
    return (math.log(left) / math.log(total)) ** power if left > 1 and total > 2 else 1.0
