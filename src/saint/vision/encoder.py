"""A pruned encoder: what blocks on shrinking sequences need, and what callers of an encoder expect.

Letters: B batch, P prefix tokens, N candidates, K survivors, C channels, D head dim.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..gathers import (
    DROPPED,
    dropped,
    fill_padding,
    full_length,
    gather_mask,
    gather_table,
    gather_tokens,
    nearest_survivor,
    shorter,
    similar_survivor,
    visible,
)
from ..graph import metric
from ..patch import override, refuse_tracing
from ..runtime.blocks import Block
from ..runtime.forwards import Flag
from ..runtime.layer import DropPoint, LayerStack, Seen
from ..runtime.observe import Observers
from ..runtime.state import Forward, LayerState, all_tokens, packed_groups, squares
from ..tokens import Selection, TokenMap
from ..upstream.names import GRID, IMPLEMENTATION, LONGEST, TIMM_ROTARY, Parameters, Role
from ..upstream.specs import EncoderSpec, part

# attention implementations of transformers that take a dense mask; the others run samples of equal length together
_DENSE_MASK = {"sdpa", "eager"}


@dataclass
class EncoderForward(Forward):
    """What one forward of an encoder knows besides.

    Attributes:
        shown: what showed the keys of a layer, until they are scored.
        grid: rows and columns of patches.
        samples: packed: tokens per image or frame.
        order: packed: group at each place.
    """

    shown: dict[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    samples: list[int] = field(default_factory=list)
    order: Tensor | None = None


class PrunedEncoder(LayerStack[EncoderForward]):
    """The vision stage of a session.

    Args:
        path: where the encoder sits in the user's model, for messages.
        encoder: the module that owns the blocks.
        spec: what is known of its class.
        points: drop points; a placement of "" means "mid" where every such point has a place between attention and MLP, else
            "post".
        output: see :class:`saint.Stage`.
        observers: of the session.
        merge_size: side of the square of patches that a merger behind the encoder joins into one token. Those squares are the
            candidates then: a method sees their mean keys, and their tokens stay or go together.
        restored: layers in front of which the sequence is full length again, for a merger that reads it there.

    Raises:
        UnsupportedModelError: an unknown block class, ``placement="mid"`` at a block without a place for it, parameters on
            ``meta``, a compiled model.
        ParityError: the blocks are not what the table says.
    """

    stage = "vision"

    def __init__(
        self,
        path: str,
        encoder: nn.Module,
        spec: EncoderSpec,
        points: Sequence[DropPoint],
        *,
        output: str = "survivors",
        observers: Observers,
        merge_size: int | None = None,
        restored: frozenset[int] = frozenset(),
    ) -> None:
        self.spec, self.output = spec, output
        self.merge_size, self.restored = merge_size, restored
        blocks = list(part(encoder, spec.blocks))
        self.prefix, self.packed = spec.prefix(encoder), spec.packed
        self.parameters = Parameters(type(encoder).forward)
        self.dense = Flag()  # full-length block outputs, for callers that reshape to the grid
        super().__init__(path, encoder, blocks, _placed(spec, blocks, points), EncoderForward, observers)
        self._check()

    # -- checks (before anything is touched) --------------------------------------------------------------------------

    def _check(self) -> None:
        name = type(self.module).__name__
        for parameter in self.module.parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(
                    f"{name} has parameters on the meta device: load its weights before applying a plan "
                    "(no offloading of vision weights)"
                )
        for index, module in enumerate(self.modules):
            spec = _block_spec(self.spec, module)
            self.blocks[index] = None if spec is None else Block(module, spec, f"{self.spec.blocks}.{index}")
        first = min((0, *self.points) if self.entries else self.points, default=self.depth)
        unknown = [i for i, block in enumerate(self.blocks) if block is None and i >= first]
        if unknown:
            kind = type(self.modules[unknown[0]]).__name__
            raise UnsupportedModelError(
                f"{self.spec.blocks}.{unknown[0]} is a {kind}; known: {', '.join(self.spec.block_specs)}"
            )
        for index, point in self.points.items():
            block = self.blocks[index]
            if point.placement == "mid" and block is not None and not block.spec.seam:
                raise UnsupportedModelError(
                    f"{block.name} is a {type(block.module).__name__}, between whose attention and MLP there is no place to "
                    'drop tokens: use placement="post", or leave placement out'
                )
        beta = max((p.method.size_bias() for p in self.points.values() if p.method is not None), default=0.0)
        for index in range(self.first_short, self.depth) if beta else ():
            self._check_bias(index, beta)
        if self.output == "nearest" and self.spec.patch is None:
            raise UnsupportedModelError(f'{name} shows no patch grid: output="nearest" is not possible, use "similar"')
        self._prove()
        count = self.spec.candidates(self.module)
        first_point = next((p for p in (*self.entries, *self.points.values()) if p.method is not None), None)
        if count is not None and first_point is not None and first_point.method is not None:
            first_point.method.validate(count, first_point.steps)

    def _check_bias(self, layer: int, beta: float) -> None:
        block = self.blocks[layer]
        if block is not None and block.spec.padding is None and not self._masks(block):
            raise UnsupportedModelError(
                f"{self.spec.blocks}.{layer} ({type(block.module).__name__}) takes no dense attention mask, through which "
                f"beta={beta:g} weighs merged tokens: set beta=0, or load the model with SDPA or eager attention"
            )

    def _prove(self) -> None:
        for index, point in self.points.items():
            if point.placement != "mid":
                continue
            block = self.blocks[index]
            assert block is not None
            assert block.spec.attn is not None
            unit = block.units[0][0]
            attn = part(unit, block.spec.attn)
            norm = part(unit, block.spec.norm1 or block.spec.norm2 or "norm1")
            width = norm.weight.shape[-1]
            # timm 1.0.20 keeps no head_dim
            dim = getattr(attn, "head_dim", None) or width // getattr(attn, "num_heads", width)
            block.prove(width, self.prefix, partial(_probe_table, dim, self.prefix))

    # -- installation -------------------------------------------------------------------------------------------------

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        self.replace_layers(stack)
        for index in range(self.depth):
            block = self.blocks[index]
            if block is None:
                continue
            if index in self.points:
                stack.callback(block.watch_keys(partial(self._keep_keys, index)))
            if index >= self.first_short and block.spec.padding:
                attention = part(block.module, block.spec.padding)
                hook = attention.register_forward_pre_hook(self._padding_hook(index), with_kwargs=True)
                stack.callback(hook.remove)
            if index >= self.first_short and block.bias is not None:
                holder, _, method = block.bias.rpartition(".")
                override(stack, part(block.module, holder), method, partial(self._pairs, index))
        if self.packed:
            stack.callback(self.module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        if self.spec.order is not None and (reorder := self.spec.order.of(self.module)) is not None:
            override(stack, self.module, reorder, self._see_order)
        if self.spec.patch is not None:
            stack.callback(part(self.module, self.spec.patch).register_forward_hook(self._see_grid).remove)
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

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = GRID.read(self.parameters.named(args, kwargs))
        forward = self.forwards.prelude()
        forward.samples = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0]).tolist()
        forward.order = None

    def _see_order(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def permute(x: Tensor, order: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.forwards.prelude().order = order
            return original(x, order, *args, **kwargs)

        return permute

    def _see_grid(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self.forwards.prelude().grid = output[1] and tuple(output[1])  # None: every sample has its own
        elif output.ndim == 4:
            self.forwards.prelude().grid = (output.shape[-2], output.shape[-1])

    def _keep_keys(self, layer: int, index: int, shown: Tensor) -> None:
        keys = self.forward.shown
        # heads of parallel attentions are heads like any other: [B, units * H, N, D]
        keys[layer] = shown if index == 0 else torch.cat([keys[layer], shown], 1)

    def _padding_hook(self, layer: int) -> Callable[..., Any]:
        def add_padding(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = self.forward.states[layer]
            keys, bias = visible(state.tokens, self.prefix), self._bias(layer, state)
            if bias is not None:
                hidden = bias if keys is None else bias.masked_fill(~keys, -torch.inf)
                return args, {**kwargs, "key_padding_mask": hidden}
            return None if keys is None else (args, {**kwargs, "key_padding_mask": ~keys})

        return add_padding

    def _behind(self) -> LayerState | None:
        """The state behind the last layer, where tokens are missing from it."""
        state = self.forward.states.get(self.depth)
        return None if state is None or state.tokens.whole else state

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
        return fill_padding(output, tokens, self.prefix, with_prefix=self.spec.pool_with_prefix(self.module))

    def _pool(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            state = self._behind()
            if state is None or state.full_length:
                return original(x, *args, **kwargs)
            # any mask the caller passed is full length and masks only padding, which is gone
            return _by_length(state.tokens, x, lambda part_x, _: (original(part_x),))[0]

        return pool

    def _masked_pool(self, valid: Role, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(*args: Any, **kwargs: Any) -> Tensor:
            state = self._behind()
            if state is not None and not state.full_length:
                # of full length; rows behind the survivors hold their mean, which no pool notices
                kwargs = {name: value for name, value in kwargs.items() if name not in valid.spellings}
            return original(*args, **kwargs)

        return pool

    def _pairs(self, layer: int, original: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
        def pairs(*args: Any, **kwargs: Any) -> Tensor | None:
            bias, state = original(*args, **kwargs), self.forward.states.get(layer)
            if state is None or state.tokens.whole:
                return bias
            return _mask(bias, state.tokens, self.prefix, bias.dtype, self._bias(layer, state))

        return pairs

    def _dense_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def dense(*args: Any, **kwargs: Any) -> Any:
            before = self.dense.set(True)
            try:
                return original(*args, **kwargs)
            finally:
                self.dense.set(before)

        return dense

    # -- one layer ----------------------------------------------------------------------------------------------------

    def named(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        block = self.blocks[layer]
        return (args, kwargs) if block is None else ((), block.named(args, kwargs))

    def arrive(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[EncoderForward, LayerState | None]:
        again = self.forwards.enter(layer, x)
        if layer == 0 and not (again and self.forward.states):
            block = self.blocks[layer]
            mask = None if block is None or block.spec.bias or block.mask is None else kwargs.get(block.mask)
            self._begin(x.unsqueeze(0) if self.packed else x, mask)  # a bias hides no token
        self.forwards.remember(layer, x)
        forward = self.forward
        if layer not in forward.states:
            raise RuntimeError(f"block {layer} ran without the blocks before it; the plan prunes whole forwards only")
        return forward, forward.states[layer]

    def _begin(self, x: Tensor, mask: Tensor | None) -> None:
        """Start of a forward: nothing is missing. x [B, P + N, C]."""
        refuse_tracing()
        forward = self.forwards.start()
        if not torch.compiler.is_exporting() and x.shape[0] == 0:
            raise ValueError("empty batch: got 0 samples, expected at least one image")
        count = x.shape[1] - self.prefix
        if count < 1:
            raise ValueError(f"no candidates: {x.shape[1]} tokens of which {self.prefix} are protected")
        forward.origin = self._origin(forward, x, count, mask)
        self.enter(forward, forward.origin, x[:, self.prefix :])

    def _origin(self, forward: EncoderForward, x: Tensor, count: int, mask: Tensor | None) -> LayerState:
        if self.merge_size is not None:
            if mask is not None and mask.ndim != 4:
                raise ValueError(
                    f"{type(self.module).__name__} masks the padding of its images in a way that cannot follow dropped tokens; "
                    'load the model with attn_implementation="sdpa"'
                )
            # padding of an image is a candidate as well: the language model would receive it
            if not self.packed:
                return squares(x.shape[0], count, self.merge_size, x.device)
            if sum(forward.samples) != count:
                raise ValueError(f"grid_thw announces {sum(forward.samples)} patches, and there are {count}")
            return packed_groups(forward.samples, self.merge_size**2, forward.order, x.device)
        valid = None
        if mask is not None and mask.ndim == 4:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen.any(2).any(1)[:, self.prefix :].expand(x.shape[0], -1)  # keys that some query may see
            if (
                torch.compiler.is_exporting()
            ):  # no graph for both: the exported one is for inputs without padding, and asserts it
                torch._assert_async(seen.all(), "exported for inputs without padding, and the mask hides some tokens")
            else:
                valid = None if bool(seen.all()) else seen
        return all_tokens(x.shape[0], count, x.device, valid)

    def stand_in(self, keys: Tensor, selection: Selection) -> Tensor | None:
        if self.output != "similar":
            return None
        return similar_survivor(metric(keys), selection) if selection.owner is None else selection.owner

    def where(self, point: DropPoint) -> str:
        if point.placement == "input":
            return f"the patch embeddings of {self.path or type(self.module).__name__}"
        return f"the attention keys of {self.spec.blocks}.{point.layer}"

    def _bias(self, layer: int, state: LayerState) -> Tensor | None:
        """What proportional attention adds to the logits of each key, [B, P + K]; None when all count alike."""
        dtype = next(self.modules[layer].parameters()).dtype
        bias = state.key_bias(dtype)
        if bias is None:
            return None
        self._check_bias(layer, state.beta)  # the attention implementation may have been switched since
        return torch.nn.functional.pad(bias, (self.prefix, 0)).to(dtype)

    def arguments(
        self, forward: EncoderForward, layer: int, state: LayerState, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The block's arguments for the tokens that are left."""
        tokens, block = state.tokens, self.blocks[layer]
        assert block is not None
        out = dict(kwargs)
        for name in block.tables:
            value = kwargs.get(name)
            if value is not None:
                out[name] = forward.once(name, partial(_map_tables, value, tokens), tokens, value)
        if block.segments is not None:
            ends = kwargs[block.segments]
            short = out[block.segments] = forward.once("segments", partial(shorter, ends, tokens), tokens, ends)
            if LONGEST.read(kwargs) is not None:  # flash attention
                longest = forward.once("longest", lambda: int((short[1:] - short[:-1]).max()), short)
                out = block.parameters.put(out, LONGEST, longest)
        mask = block.mask
        if mask is not None and block.spec.padding is None:
            given = kwargs.get(mask)
            own = block.bias is not None  # hides padding and weighs merged tokens: once is enough
            if given is not None or (not own and (tokens.valid is not None or state.sizes is not None)):
                dtype = next(self.modules[layer].parameters()).dtype

                def short_mask() -> Tensor | None:
                    m = given
                    if m is not None and m.ndim == 3 and block.spec.bias:
                        m = m.unsqueeze(0)  # [1, H, P + N, P + N]
                    return _mask(m, tokens, self.prefix, dtype, None if own else self._bias(layer, state))

                out[mask] = forward.once(mask, short_mask, tokens, given)
        return out

    def run(
        self,
        forward: EncoderForward,
        layer: int,
        state: LayerState,
        call: Callable[..., Any],
        x: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Seen | None]:
        block, tokens, shows = self.blocks[layer], state.tokens, layer in self.points

        def on_part(part_x: Tensor, part_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
            y = call(part_x[0], **part_kwargs)[None] if self.packed else call(part_x, **part_kwargs)
            return (y, self.keys(forward, layer)) if shows else (y,)

        if block is None or tokens.whole:
            out = on_part(x, kwargs)
        elif tokens.valid is None or block.spec.padding is not None or block.spec.bias or self._masks(block):
            out = on_part(x, self.arguments(forward, layer, state, kwargs))
        else:

            def short(part_x: Tensor, part_tokens: TokenMap) -> tuple[Tensor, ...]:
                part_kwargs = dict(kwargs)
                for name in block.tables:
                    if kwargs.get(name) is not None:
                        part_kwargs[name] = _map_tables(kwargs[name], part_tokens)
                if block.mask in kwargs:
                    part_kwargs[block.mask] = None  # it hides padding, of which nothing is left
                return on_part(part_x, part_kwargs)

            # this attention takes no dense mask: samples of equal length run together, nothing is padded
            out = _by_length(tokens, x, short)
        return out[0], Seen(out[1]) if shows else None

    def keys(self, forward: EncoderForward, layer: int) -> Tensor:
        """Head-mean keys of the call of a layer that has just run, [B, N, D]."""
        block = self.blocks[layer]
        assert block is not None
        return block.head_mean_keys(forward.shown.pop(layer, None), self.prefix)

    def _masks(self, block: Block) -> bool:
        implementation = IMPLEMENTATION.get(getattr(self.module, "config", None))
        return block.mask is not None and (implementation is None or implementation in _DENSE_MASK)

    def leave(
        self, forward: EncoderForward, layer: int, state: LayerState, y: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        after, tokens = layer + 1, state.tokens
        forward.states[after] = state
        if tokens.whole:
            return y
        last = after == self.depth
        if after in self.restored:
            y = full_length(y, tokens, self.prefix, DROPPED)  # survivors at their places, marks elsewhere
        elif self.dense.up or (last and self.output != "survivors"):
            y = self.expand(y, after)
        elif last:
            return fill_padding(y, tokens, self.prefix, with_prefix=self.spec.pool_with_prefix(self.module))
        else:
            return y
        forward.states[after] = replace(state, full_length=True)
        return y

    # -- results ------------------------------------------------------------------------------------------------------

    def _mark(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Mark the rows of dropped tokens of a full-length map, [B, P + N, C] or packed [N, C]."""
        gone = torch.nn.functional.pad(dropped(tokens), (self.prefix, 0))
        return x.masked_fill((gone[0] if self.packed else gone).unsqueeze(-1), DROPPED)

    def lost(self, layer: int) -> Tensor | None:
        """Which groups are gone in front of ``layer``, in the order of the merger's output, bool [B, G]; None: none is."""
        forward = self.forward
        if layer not in forward.states or forward.states[layer].tokens.whole:
            return None
        gone = dropped(forward.states[layer].tokens)
        assert forward.origin is not None
        assert forward.origin.places is not None
        places = forward.origin.places
        return gone[:, :: places.shape[2]] if self.packed else gone.flatten()[places[:, :, 0]]

    def stand_ins(self, layer: int) -> Tensor:
        """For each original candidate the slot in front of ``layer`` that stands for it, int64 [B, N]."""
        forward = self.forward
        state, grid = forward.states[layer], forward.grid
        tokens = state.tokens
        if self.output == "similar":
            assert state.stand_ins is not None
            return state.stand_ins
        if grid is None or grid[0] * grid[1] != tokens.width:
            raise ValueError(
                f"the patch grid {grid} does not hold the {tokens.width} candidates, so a dropped token has no "
                'nearest survivor on it; use Stage(..., output="similar")'
            )
        return forward.once("nearest", lambda: nearest_survivor(tokens, grid), tokens)

    def expand(self, x: Tensor, layer: int) -> Tensor:
        """Full length again: every original candidate gets the row of the survivor that stands for it.

        Args:
            x: [B, P + K, C] in front of ``layer``.

        Returns:
            [B, P + N, C].
        """
        if self.forward.states[layer].tokens.whole:
            return x
        return gather_tokens(x, self.stand_ins(layer), self.prefix)


def _block_spec(spec: EncoderSpec, module: nn.Module) -> Any:
    return next((spec.block_specs[c.__name__] for c in type(module).__mro__ if c.__name__ in spec.block_specs), None)


def _placed(spec: EncoderSpec, modules: Sequence[nn.Module], points: Sequence[DropPoint]) -> list[DropPoint]:
    """The drop points, with the placement that the plan leaves to the model."""
    known = (_block_spec(spec, modules[p.layer]) for p in points if not p.placement and p.method is not None)
    placement = "mid" if all(found is not None and found.seam for found in known) else "post"
    return [point if point.placement else replace(point, placement=placement) for point in points]


def _probe_table(dim: int, prefix: int, name: str, like: Tensor) -> Any:
    count = like.shape[-2] - prefix
    values = torch.randn(count, 2 * dim, generator=torch.Generator().manual_seed(1)).to(like)
    return values if name in TIMM_ROTARY.spellings else (values[:, :dim], values[:, dim:])


def _map_tables(value: Any, tokens: TokenMap) -> Any:
    if isinstance(value, tuple):
        return tuple(_map_tables(table, tokens) for table in value)
    return gather_table(value, tokens) if value.shape[-2] == tokens.width else value


def _mask(
    given: Tensor | None, tokens: TokenMap, prefix: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor | None:
    """Additive mask of the survivors, [B, 1, 1 or Q, P + K]; None when nothing is masked. bias [B, P + K] is added."""
    keys = visible(tokens, prefix)
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


def _by_length(
    tokens: TokenMap, x: Tensor, run: Callable[[Tensor, TokenMap], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Run samples of equal length together, without their padding, and put the results back in order.

    Results that keep the token axis are padded with zeros again.
    """
    if tokens.valid is None:  # all are equally long, however many: an exported graph has one length for all
        return run(x, tokens)
    groups: dict[int, list[int]] = {}
    for sample, length in enumerate(tokens.lengths):
        groups.setdefault(length, []).append(sample)
    head = x.shape[1] - tokens.slots
    order: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    for length, samples in groups.items():
        pick = torch.tensor(samples, device=x.device)
        total = tuple(tokens.total[i] for i in samples)
        # survivors come first in a row, so cutting the row cuts the padding
        short = TokenMap(tokens.index[pick, :length], (length,) * len(samples), total, tokens.width)
        missing = tokens.slots - length
        parts.append(
            tuple(
                torch.nn.functional.pad(y, (0, 0, 0, missing))
                if y.ndim == 3 and y.shape[1] in (length, head + length)
                else y
                for y in run(x[pick, : head + length], short)
            )
        )
        order += samples
    back = torch.argsort(torch.tensor(order, device=x.device))
    return tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))
