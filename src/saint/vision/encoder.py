"""A pruned encoder: runs the blocks of one model on shrinking sequences.

Each block's ``forward`` is replaced, on the instance, by a :class:`PrunedBlock`, which gives the block what its tokens
need (mask, positional tables), runs it, and at a drop point gathers the survivors. The state of a forward is one token
map per layer, so a layer can be run again (gradient checkpointing) and does the same; `forwards.Forwards` finds the right one.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..forwards import Flag, Forwards
from ..graph import metric
from ..patch import Uncopyable, refuse_replicas, refuse_tracing
from ..patch import override as _override
from ..tokens import (
    DROPPED,
    Candidates,
    Groups,
    LayerTrace,
    Selection,
    TokenMap,
    dropped,
    fill_padding,
    full_length,
    gather_mask,
    gather_table,
    gather_tokens,
    merge_tokens,
    nearest_survivor,
    packed_groups,
    reads_are_free,
    shorter,
    similar_survivor,
    square_groups,
    visible,
)
from ..upstream.autograd import checkpointed
from ..upstream.names import GRID, IMPLEMENTATION, LONGEST, TIMM_ROTARY, Parameters, Role
from ..upstream.specs import EncoderSpec, part
from .blocks import Block

Select = Callable[[Candidates], Selection | None]

# attention implementations of transformers that take a dense mask; the others run samples of equal length together
_DENSE_MASK = {"sdpa", "eager"}


@dataclass
class EncoderState:
    """What one forward knows. Keys of the dictionaries are layers: what holds in front of them; the depth: behind the last.

    Attributes:
        maps: token map.
        owners: for each original candidate the slot that stands for it, int64 [B, N].
        sizes: merging: original candidates in each slot, float32 [B, K].
        merged: merging: for each original candidate the slot it is part of, int64 [B, N].
        groups: where groups of tokens are the candidates.
        expanded: layers whose input is full length although tokens were dropped.
        shown: what showed the keys of a layer, until they are scored.
        memo: masks and tables that layers share.
        grid: rows and columns of patches.
        samples: packed: tokens per image or frame.
        order: packed: group at each place.
    """

    maps: dict[int, TokenMap] = field(default_factory=dict)
    owners: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    merged: dict[int, Tensor] = field(default_factory=dict)
    groups: dict[int, Groups] = field(default_factory=dict)
    expanded: set[int] = field(default_factory=set)
    shown: dict[int, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    samples: list[int] = field(default_factory=list)
    order: Tensor | None = None


class PrunedEncoder(Uncopyable):
    """The vision stage of a session.

    Args:
        path: where the encoder sits in the user's model, for messages.
        encoder: the module that owns the blocks.
        spec: what is known of its class.
        layers: drop points, ascending.
        placement: "mid", "post", or None: "mid" where every drop point has a seam between attention and MLP.
        output: see :class:`saint.Stage`.
        select: the method's decision.
        validate: the method's check of numbers of candidates.
        beta: of merging methods: attention adds beta * log(size) to the logits of a merged token's key.
        merge_size: side of the square of patches that a merger behind the encoder joins into one token. Those squares are the
            candidates then: a method sees their mean keys, and their tokens stay or go together.
        restored: layers in front of which the sequence is full length again, for a merger that reads it there.

    Raises:
        UnsupportedModelError: an unknown block class, ``placement="mid"`` at a block without a seam, parameters on
            ``meta``, a compiled model.
        ParityError: the blocks are not what the table says.
    """

    def __init__(
        self,
        path: str,
        encoder: nn.Module,
        spec: EncoderSpec,
        *,
        layers: list[int],
        placement: str | None,
        output: str,
        select: Select,
        validate: Callable[[int, int], None],
        beta: float = 0.0,
        merge_size: int | None = None,
        restored: frozenset[int] = frozenset(),
    ) -> None:
        self.path, self.encoder, self.spec = path, encoder, spec
        self.layers, self.output = layers, output
        self.select, self.validate, self.beta, self.merge_size = select, validate, beta, merge_size
        self.restored = restored  # layers whose input is full length, with holes (see `restore`)
        self.modules: list[nn.Module] = list(part(encoder, spec.blocks))
        self.depth = len(self.modules)
        self.prefix = spec.prefix(encoder)
        self.parameters = Parameters(type(encoder).forward)
        self.steps = {layer: step for step, layer in enumerate(layers)}
        self.forwards = Forwards(EncoderState, path or type(encoder).__name__)
        self.dense = Flag()  # full-length block outputs, for callers that reshape to the grid
        self.placement = self._check(placement)

    @property
    def state(self) -> EncoderState:
        return self.forwards.state

    # -- checks (before anything is touched) --------------------------------------------------------------------------

    def _check(self, placement: str | None) -> str:
        name = type(self.encoder).__name__
        for parameter in self.encoder.parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(
                    f"{name} has parameters on the meta device: load its weights before applying a plan "
                    "(no offloading of vision weights)"
                )
        self.blocks: list[Block | None] = []
        for index, module in enumerate(self.modules):
            spec = next(
                (
                    self.spec.block_specs[c.__name__]
                    for c in type(module).__mro__
                    if c.__name__ in self.spec.block_specs
                ),
                None,
            )
            label = f"{self.spec.blocks}.{index}"
            self.blocks.append(None if spec is None else Block(module, spec, label))
        unknown = [i for i, block in enumerate(self.blocks) if block is None and i >= self.layers[0]]
        if unknown:
            kind = type(self.modules[unknown[0]]).__name__
            raise UnsupportedModelError(
                f"{self.spec.blocks}.{unknown[0]} is a {kind}; known: {', '.join(self.spec.block_specs)}"
            )
        whole = next((b for i in self.layers if (b := self.blocks[i]) is not None and not b.spec.seam), None)
        if whole is not None and placement == "mid":
            raise UnsupportedModelError(
                f"{whole.name} is a {type(whole.module).__name__}, between whose attention and MLP there is no place to "
                'drop tokens: use placement="post", or leave placement out'
            )
        placement = placement or ("mid" if whole is None else "post")
        if self.beta:
            for index in range(self.layers[0] + 1, self.depth):
                self._check_bias(index)
        if self.output == "nearest" and self.spec.patch is None:
            raise UnsupportedModelError(f'{name} shows no patch grid: output="nearest" is not possible, use "similar"')
        if placement == "mid":
            self._prove()
        count = self.spec.candidates(self.encoder)
        if count is not None:
            self.validate(count, len(self.layers))
        return placement

    def _check_bias(self, layer: int) -> None:
        block = self.blocks[layer]
        if block is not None and block.spec.padding is None and not self._masks(block):
            raise UnsupportedModelError(
                f"{self.spec.blocks}.{layer} ({type(block.module).__name__}) takes no dense attention mask, through which "
                f"beta={self.beta:g} weighs merged tokens: set beta=0, or load the model with SDPA or eager attention"
            )

    def _prove(self) -> None:
        for index in self.layers:
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
        refuse_replicas(stack, self.encoder)
        for index in range(self.depth):
            block = self.blocks[index]
            refuse_replicas(stack, self.modules[index])
            _override(stack, self.modules[index], "forward", partial(PrunedBlock, self, index))
            if block is not None and index in self.steps:
                stack.callback(block.watch_keys(partial(self._keep_keys, index)))
            if block is not None and index > self.layers[0] and block.spec.padding:
                attention = part(block.module, block.spec.padding)
                hook = attention.register_forward_pre_hook(self._padding_hook(index), with_kwargs=True)
                stack.callback(hook.remove)
            if block is not None and index > self.layers[0] and block.bias is not None:
                holder, _, method = block.bias.rpartition(".")
                _override(stack, part(block.module, holder), method, partial(self._pairs, index))
        if self.spec.packed:
            stack.callback(self.encoder.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        if self.spec.order is not None and (reorder := self.spec.order.of(self.encoder)) is not None:
            _override(stack, self.encoder, reorder, self._see_order)
        if self.spec.patch is not None:
            stack.callback(part(self.encoder, self.spec.patch).register_forward_hook(self._see_grid).remove)
        final = part(self.encoder, self.spec.final) if self.spec.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(self._fill_hook).remove)
        for path in self.spec.pools:
            pool = part(self.encoder, path)
            if pool is not None:
                _override(stack, pool, "forward", self._pool)
        for name, valid in self.spec.masked_pools.items():
            _override(stack, self.encoder, name, partial(self._masked_pool, valid))
        for name in self.spec.dense_calls:
            if hasattr(self.encoder, name):
                _override(stack, self.encoder, name, self._dense_call)
        stack.callback(self.reset)

    def reset(self) -> None:
        """Forget all forwards."""
        self.forwards.forget()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = GRID.read(self.parameters.named(args, kwargs))
        state = self.forwards.prelude()
        state.samples = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0]).tolist()
        state.order = None

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
        keys = self.state.shown
        # heads of parallel attentions are heads like any other: [B, units * H, N, D]
        keys[layer] = shown if index == 0 else torch.cat([keys[layer], shown], 1)

    def _padding_hook(self, layer: int) -> Callable[..., Any]:
        def add_padding(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            keys, bias = visible(self.state.maps[layer], self.prefix), self._bias(layer)
            if bias is not None:
                hidden = bias if keys is None else bias.masked_fill(~keys, -torch.inf)
                return args, {**kwargs, "key_padding_mask": hidden}
            return None if keys is None else (args, {**kwargs, "key_padding_mask": ~keys})

        return add_padding

    def _fill_hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        state = self.state
        tokens = state.maps.get(self.depth)
        if tokens is None or tokens.whole:
            return None
        if self.depth in state.expanded:
            full = self.depth in self.restored and output.shape[-2] == self.prefix + tokens.width
            return self._mark(output, tokens) if full else None  # the norm has blurred the rows of dropped tokens
        if output.ndim != 3 or output.shape[1] != self.prefix + tokens.slots:
            return None  # the norm of a pooled vector, or of an intermediate map
        return fill_padding(output, tokens, self.prefix, with_prefix=self.spec.pool_with_prefix(self.encoder))

    def _pool(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            state = self.state
            tokens = state.maps.get(self.depth)
            if tokens is None or self.depth in state.expanded or tokens.whole:
                return original(x, *args, **kwargs)
            # any mask the caller passed is full length and masks only padding, which is gone
            return _by_length(tokens, x, lambda part_x, _: (original(part_x),))[0]

        return pool

    def _masked_pool(self, valid: Role, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pool(*args: Any, **kwargs: Any) -> Tensor:
            state = self.state
            tokens = state.maps.get(self.depth)
            if tokens is not None and self.depth not in state.expanded and not tokens.whole:
                # of full length; rows behind the survivors hold their mean, which no pool notices
                kwargs = {name: value for name, value in kwargs.items() if name not in valid.spellings}
            return original(*args, **kwargs)

        return pool

    def _pairs(self, layer: int, original: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
        def pairs(*args: Any, **kwargs: Any) -> Tensor | None:
            bias, tokens = original(*args, **kwargs), self.state.maps.get(layer)
            if tokens is None or tokens.whole:
                return bias
            return _mask(bias, tokens, self.prefix, bias.dtype, self._bias(layer))

        return pairs

    def _dense_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def dense(*args: Any, **kwargs: Any) -> Any:
            before = self.dense.set(True)
            try:
                return original(*args, **kwargs)
            finally:
                self.dense.set(before)

        return dense

    # -- one forward --------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, mask: Tensor | None) -> None:
        """Start of a forward: everything is there. x [B, P + N, C]."""
        refuse_tracing()
        state = self.forwards.start()
        if x.shape[0] == 0:
            raise ValueError("empty batch: got 0 samples, expected at least one image")
        count = x.shape[1] - self.prefix
        if count < 1:
            raise ValueError(f"no candidates: {x.shape[1]} tokens of which {self.prefix} are protected")
        if self.merge_size is not None:
            self._begin_groups(x, count, mask)
            return
        valid = None
        if mask is not None and mask.ndim == 4:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen.any(2).any(1)[:, self.prefix :].expand(x.shape[0], -1)  # keys that some query may see
            valid = None if bool(seen.all()) else seen
        state.maps[0] = TokenMap.full(x.shape[0], count, x.device, valid)
        for total in set(state.maps[0].total):
            self.validate(total, len(self.layers))

    def _begin_groups(self, x: Tensor, count: int, mask: Tensor | None) -> None:
        assert self.merge_size is not None
        if mask is not None and mask.ndim != 4:
            raise ValueError(
                f"{type(self.encoder).__name__} masks the padding of its images in a way that cannot follow dropped tokens; "
                'load the model with attn_implementation="sdpa"'
            )
        state = self.state
        if self.spec.packed:
            if sum(state.samples) != count:
                raise ValueError(f"grid_thw announces {sum(state.samples)} patches, and there are {count}")
            state.groups[0] = packed_groups(state.samples, self.merge_size**2, state.order, x.device)
        else:
            state.groups[0] = square_groups(x.shape[0], count, self.merge_size, x.device)
        # padding of an image is a candidate as well: the language model would receive it
        state.maps[0] = TokenMap.full(x.shape[0], count, x.device)
        for total in set(state.groups[0].map.total):
            self.validate(total, len(self.layers))

    def prune(self, layer: int, x: Tensor, keys: Tensor) -> Tensor:
        """Drop or merge tokens at a drop point and set the map in front of the next layer.

        Args:
            layer: the drop point.
            x: [B, P + N, C].
            keys: head-mean keys of the candidates, [B, N, D].

        Returns:
            [B, P + K, C].
        """
        state = self.state
        tokens = state.maps[layer]
        step = self.steps[layer]
        if step == 0 and reads_are_free(keys.device):
            _refuse_non_finite(keys, f"{self.spec.blocks}.{layer}")
        selection = self._select(layer, keys, x.detach()[:, self.prefix :])
        if selection is None:
            return x
        after = tokens.select(selection)
        state.maps[layer + 1] = after
        state.owners.pop(layer + 1, None)
        owner = selection.owner
        if owner is not None:
            earlier = state.merged.get(layer)
            state.merged[layer + 1] = owner if earlier is None else owner.gather(1, earlier)
        if self.output == "similar":
            owner = similar_survivor(metric(keys), selection) if owner is None else owner
            earlier = state.owners.get(layer)
            state.owners[layer + 1] = owner if earlier is None else owner.gather(1, earlier)
        if selection.owner is None:
            return gather_tokens(x, selection.slots, self.prefix)
        sizes = state.sizes.get(layer)
        if sizes is None:
            like = torch.ones_like(tokens.index) if tokens.valid is None else tokens.valid
            sizes = like.to(torch.float32)
        x, state.sizes[layer + 1] = merge_tokens(x, sizes, selection, self.prefix)
        return x

    def _bias(self, layer: int) -> Tensor | None:
        """What proportional attention adds to the logits of each key, [B, P + K]; None when all count alike."""
        sizes = self.state.sizes.get(layer)
        if sizes is None or not self.beta:
            return None
        self._check_bias(layer)  # the attention implementation may have been switched since
        dtype = next(self.modules[layer].parameters()).dtype
        bias = self.beta * sizes.to(torch.promote_types(dtype, torch.float32)).clamp_min(1).log()
        return torch.nn.functional.pad(bias, (self.prefix, 0)).to(dtype)

    def _select(self, layer: int, keys: Tensor, features: Tensor) -> Selection | None:
        """The method's decision, for tokens."""
        state, step = self.state, self.steps[layer]
        tokens, groups = state.maps[layer], state.groups.get(layer)
        if groups is None:
            return self.select(Candidates(keys, features, tokens, step, len(self.layers)))
        slots = groups.slots(tokens)
        keys, features = (y.flatten(0, 1)[slots].mean(2) for y in (keys, features))
        chosen = self.select(Candidates(keys, features, groups.map, step, len(self.layers)))
        if chosen is None:
            return None
        state.groups[layer + 1], selection = groups.select(chosen, slots, tokens)
        return selection

    def attention_inputs(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's arguments for the tokens that are still there."""
        tokens, block = self.state.maps[layer], self.blocks[layer]
        assert block is not None
        out = dict(kwargs)
        for name in block.tables:
            value = kwargs.get(name)
            if value is not None:
                out[name] = self._cached(name, layer, value, lambda v: _map_tables(v, tokens))
        if block.segments is not None:
            ends = kwargs[block.segments]
            short = out[block.segments] = self._cached("segments", layer, ends, lambda v: shorter(v, tokens))
            if LONGEST.read(kwargs) is not None:  # flash attention
                longest = self._cached("longest", layer, short, lambda v: int((v[1:] - v[:-1]).max()))
                out = block.parameters.put(out, LONGEST, longest)
        mask = block.mask
        if mask is not None and block.spec.padding is None:
            given = kwargs.get(mask)
            own = block.bias is not None  # hides padding and weighs merged tokens: once is enough
            if given is not None or (not own and (tokens.valid is not None or layer in self.state.sizes)):
                dtype = next(self.modules[layer].parameters()).dtype

                def short_mask(m: Tensor | None) -> Tensor | None:
                    if m is not None and m.ndim == 3 and block.spec.bias:
                        m = m.unsqueeze(0)  # [1, H, P + N, P + N]
                    return _mask(m, tokens, self.prefix, dtype, None if own else self._bias(layer))

                out[mask] = self._cached(mask, layer, given, short_mask)
        return out

    def _cached(self, name: str, layer: int, source: Any, make: Callable[[Any], Any]) -> Any:
        # blocks behind the last drop point share one map: gather once, not once a layer
        state = self.state
        key = (name, id(state.maps[layer]), None if source is None else id(source))  # dynamo of torch 2.11: no id(None)
        hit = state.memo.get(key)
        if hit is None:
            hit = state.memo[key] = (make(source), source)  # kept alive, so that the id stays its own
        return hit[0]

    def run(
        self, layer: int, forward: Callable[[Tensor, dict[str, Any]], Tensor], x: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Run a block, or its attention half, on the survivors in front of ``layer``.

        Returns:
            The output [B, P + N, C] and, at a drop point, the head-mean keys [B, N, D].
        """
        state, block = self.state, self.blocks[layer]
        tokens = state.maps[layer]

        def with_keys(part_x: Tensor, part_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
            y = forward(part_x[0], part_kwargs)[None] if self.spec.packed else forward(part_x, part_kwargs)
            if layer not in self.steps:
                return (y,)
            assert block is not None
            return y, block.head_mean_keys(state.shown.pop(layer, None), self.prefix)

        if block is None or tokens.whole:
            return with_keys(x, kwargs)
        if tokens.valid is None or block.spec.padding is not None or block.spec.bias or self._masks(block):
            return with_keys(x, self.attention_inputs(layer, kwargs))

        def short(part_x: Tensor, part_tokens: TokenMap) -> tuple[Tensor, ...]:
            part_kwargs = dict(kwargs)
            for name in block.tables:
                if kwargs.get(name) is not None:
                    part_kwargs[name] = _map_tables(kwargs[name], part_tokens)
            if block.mask in kwargs:
                part_kwargs[block.mask] = None  # it hides padding, of which nothing is left
            return with_keys(part_x, part_kwargs)

        # this attention takes no dense mask: samples of equal length run together, nothing is padded
        return _by_length(tokens, x, short)

    def _masks(self, block: Block) -> bool:
        implementation = IMPLEMENTATION.get(getattr(self.encoder, "config", None))
        return block.mask is not None and (implementation is None or implementation in _DENSE_MASK)

    # -- results ------------------------------------------------------------------------------------------------------

    def restore(self, x: Tensor, layer: int) -> Tensor:
        """Full length again for a merger: survivors at their places, marks elsewhere. [B, P + K, C] -> [B, P + N, C]."""
        return full_length(x, self.state.maps[layer], self.prefix, DROPPED)

    def _mark(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Mark the rows of dropped tokens of a full-length map, [B, P + N, C] or packed [N, C]."""
        gone = torch.nn.functional.pad(dropped(tokens), (self.prefix, 0))
        return x.masked_fill((gone[0] if self.spec.packed else gone).unsqueeze(-1), DROPPED)

    def lost(self, layer: int) -> Tensor | None:
        """Which groups are gone in front of ``layer``, in the order of the merger's output, bool [B, G]; None: nobody."""
        state = self.state
        if layer not in state.maps or state.maps[layer].whole:
            return None
        gone, members = dropped(state.maps[layer]), state.groups[layer].members
        return gone[:, :: members.shape[2]] if self.spec.packed else gone.gather(1, members[:, :, 0])

    def owner(self, layer: int) -> Tensor:
        """For each original candidate the slot in front of ``layer`` that stands for it, int64 [B, N]."""
        state = self.state
        tokens = state.maps[layer]
        if self.output == "similar":
            return state.owners[layer]
        if state.grid is None or state.grid[0] * state.grid[1] != tokens.width:
            raise ValueError(
                f"the patch grid {state.grid} does not hold the {tokens.width} candidates, so a dropped token has no "
                'nearest survivor on it; use Stage(..., output="similar")'
            )
        return nearest_survivor(tokens, state.grid)

    def expand(self, x: Tensor, layer: int) -> Tensor:
        """Full length again: every original candidate gets the row of the survivor that stands for it.

        Args:
            x: [B, P + K, C] in front of ``layer``.

        Returns:
            [B, P + N, C].
        """
        state = self.state
        if state.maps[layer].whole:
            return x
        if layer not in state.owners:
            state.owners[layer] = self.owner(layer)
        return gather_tokens(x, state.owners[layer], self.prefix)

    def trace(self) -> list[LayerTrace]:
        """One entry per drop point of the last forward."""
        out, state = [], self.state
        for layer in self.layers:
            if layer + 1 not in state.maps:
                continue
            before, after = (
                state.groups[at].map if at in state.groups else state.maps[at] for at in (layer, layer + 1)
            )
            merged = state.merged.get(layer + 1)
            into = None if merged is None else list(after.index.gather(1, merged).unbind(0))
            if into is not None and (real := state.maps[0].valid) is not None:
                into = [row[ok] for row, ok in zip(into, real, strict=True)]
            out.append(
                LayerTrace(
                    "vision", layer, torch.tensor(before.lengths), torch.tensor(after.lengths), after.kept(), into
                )
            )
        return out


class PrunedBlock(Uncopyable):
    """Stands in for ``block.forward`` on one instance."""

    def __init__(self, stage: PrunedEncoder, layer: int, original: Callable[..., Any]) -> None:
        self.stage, self.layer, self.original = stage, layer, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stage, layer = self.stage, self.layer
        block = stage.blocks[layer]
        if block is not None:
            kwargs = block.named(args, kwargs)
            args = ()
        given = x
        if stage.spec.packed:
            x = x.unsqueeze(0)
        again = stage.forwards.enter(layer, given)
        if layer == 0 and not (again and stage.state.maps):
            mask = None if block is None or block.spec.bias else block.mask  # a bias hides nobody
            stage.begin(x, None if mask is None else kwargs.get(mask))
        stage.forwards.remember(layer, given)
        state = stage.state
        if layer not in state.maps:
            raise RuntimeError(f"block {layer} ran without the blocks before it; the plan prunes whole forwards only")
        if layer in state.expanded:
            x = gather_tokens(x, state.maps[layer].index, stage.prefix)
        state.maps[layer + 1] = state.maps[layer]
        carried: tuple[dict[int, Any], ...] = (state.owners, state.sizes, state.merged, state.groups)
        for values in carried:
            if layer in values:
                values[layer + 1] = values[layer]
        if layer in stage.steps and stage.placement == "mid":
            assert block is not None
            y, keys = stage.run(layer, checkpointed(block.module, block.first), x, kwargs)
            y = checkpointed(block.module, block.second)(stage.prune(layer, y, keys))
        else:
            y, *shown = stage.run(layer, lambda part_x, given: self.original(part_x, *args, **given), x, kwargs)
            if layer in stage.steps:
                y = stage.prune(layer, y, shown[0])
        y = self._hand_on(y)
        return y.squeeze(0) if stage.spec.packed else y

    def _hand_on(self, y: Tensor) -> Tensor:
        stage, state, after = self.stage, self.stage.state, self.layer + 1
        tokens = state.maps[after]
        state.expanded.discard(after)
        if tokens.whole:
            return y
        if after in stage.restored:
            state.expanded.add(after)
            return stage.restore(y, after)
        last = after == stage.depth
        if stage.dense.up or (last and stage.output != "survivors"):
            state.expanded.add(after)
            return stage.expand(y, after)
        if last:
            return fill_padding(y, tokens, stage.prefix, with_prefix=stage.spec.pool_with_prefix(stage.encoder))
        return y


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
    """Additive mask of the survivors, [B, 1, 1 or Q, P + K]; None when everyone sees everyone. bias [B, P + K] is added."""
    keys = visible(tokens, prefix)
    mask = None if bias is None else bias[:, None, None]
    if mask is not None and keys is not None:
        mask = mask.masked_fill(~keys[:, None, None], -torch.inf)
    elif keys is not None:
        # the key axis of a dense mask must be a multiple of 8 wide for no kernel torch has today; plain is fine
        mask = torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill_(~keys, -torch.inf)[:, None, None]
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


def _refuse_non_finite(keys: Tensor, name: str) -> None:
    bad = ~torch.isfinite(keys).flatten(1).all(1)
    if bool(bad.any()):
        samples = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"the attention keys of {name} are NaN or Inf for sample(s) {samples}: check the pixels of these images for NaN "
            "or Inf, and fp16 overflow"
        )
