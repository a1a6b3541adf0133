"""A pruned decoder: runs the layers of one language model on shrinking sequences.

The ``forward`` of each layer from the first drop point on is replaced, on the instance, by a :class:`PrunedLayer`, which
gives the layer what its tokens need (hidden states, rotary tables, mask), runs it, and at a drop point lets the method choose
among the visual tokens. Outside the layers every sequence has its full length: a dropped position shows the nearest
survivor before it, the token whose prediction continues the text at that place once the dropped ones are gone. Logits of
text positions, ``logits_to_keep`` and losses therefore mean what they meant.

Only a prompt is pruned. Steps that add no visual tokens cost one look at the cache per patched layer.

Letters: B batch, L positions of the forward, S survivors of the longest sample, N visual candidates, H KV heads, D head dim.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, UnsupportedModelError
from ..forwards import Forwards
from ..patch import Uncopyable, override, refuse_replicas, refuse_tracing
from ..tokens import Candidates, LayerTrace, Selection, TokenMap, gather_tokens, is_dropped, reads_are_free
from ..upstream.names import (
    ALL_STATES,
    ATTENTION,
    CACHE,
    EMBEDDINGS,
    IMPLEMENTATION,
    MASK,
    POSITIONS,
    ROTARY,
    Parameters,
)
from ..upstream.versions import known_from
from .attention import check_attention, last_row
from .cache import (
    CachePositions,
    CacheView,
    RaggedLayer,
    SessionToken,
    check_cache,
    extended,
    ragged_layer,
    remaining,
    stored_bytes,
)
from .masks import DENSE, FLASH, survivors_mask
from .positions import gather_ids, gather_rotary

Select = Callable[[Candidates], Selection | None]
Validate = Callable[[int, int], None]

# what a decoder layer must take by name; the rotary tables carry the true positions to the survivors
_ARGUMENTS = (MASK, CACHE, ROTARY)


@dataclass(frozen=True)
class Drop:
    """Who decides at one stage, and where: ``layers`` is empty for the connector, which drops in front of layer 0.

    ``needs`` may hold "last_query": the decision takes the attention of the last prompt token.
    """

    select: Select
    validate: Validate
    layers: tuple[int, ...] = ()
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Front:
    """Who is there in front of a layer.

    Attributes:
        tokens: the sequence, positions 0..L-1 of this forward.
        visual: the visual tokens among them; indices count the visual tokens of the prompt.
        where: slot in the sequence of each slot of ``visual``, int64 [B, N].
        slots: slot each token had in front of the last drop, int64 [B, S].
    """

    tokens: TokenMap
    visual: TokenMap
    where: Tensor
    slots: Tensor

    @property
    def short(self) -> bool:
        return self.tokens.slots != self.tokens.width or self.tokens.valid is not None


class Handover(threading.local):
    """What the glue of a model learns of a prompt before its language model starts, on each thread.

    Attributes:
        visual: the visual tokens, bool [B, L]; None when the prompt brings none.
        marked: rows of features that the encoder dropped are among them (``tokens.is_dropped``).
        waiting: images came in, and their places are not known yet.
    """

    visual: Tensor | None = None
    marked: bool = False
    waiting: bool = False


@dataclass
class Prompt:
    """What is told of the last prompt; decode steps pass it on.

    Attributes:
        trace: by stage and layer, so that a layer that is run again for its gradients says it once.
        memory: bytes of the cache behind it.
    """

    trace: dict[tuple[str, int], LayerTrace] = field(default_factory=dict)
    memory: "KVMemory | None" = None


@dataclass
class DecoderState:
    """What one forward knows.

    Attributes:
        fronts: by layer, what is in front of it; empty in a forward without visual tokens.
        whole: layers whose input is full length although tokens were dropped.
        full_outputs: the caller wants every hidden state.
        memo: masks and tables that layers share.
        prompt: what is told of it.
        views: of layers that run, the cache as they see it.
        calls: how the attention of layers that run spells its arguments, and those it got.
    """

    fronts: dict[int, Front] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    full_outputs: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)
    prompt: Prompt = field(default_factory=Prompt)
    views: dict[int, CacheView] = field(default_factory=dict)
    calls: dict[int, tuple[Parameters, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class KVMemory:
    """Bytes of keys and values cached by the last prompt, and what the unpruned model would cache."""

    kept: int
    unpruned: int


class PrunedDecoder(Uncopyable):
    """The language and connector stages of a session.

    Args:
        path: where the decoder sits in the user's model, for messages.
        model: the module that owns the layers.
        layers: the layers.
        connector: drops in front of layer 0, or None.
        language: drops after layers, or None.
        between: layers behind which the model itself works on the full sequence (DeepStack).
        evict: behind a prompt, no layer's cache keeps a token that any layer dropped.
        handover: where the model's glue says which tokens are visual.
        enters: tokens may have been dropped by the encoder.

    Raises:
        UnsupportedModelError: the layers cannot be given shortened sequences.
    """

    def __init__(
        self,
        path: str,
        model: nn.Module,
        layers: list[nn.Module],
        *,
        connector: Drop | None,
        language: Drop | None,
        handover: Handover,
        between: int = 0,
        evict: bool = False,
        enters: bool = False,
    ) -> None:
        self.path, self.model, self.modules = path, model, layers
        self.connector, self.language, self.between, self.evict = connector, language, between, evict
        self.depth = len(layers)
        self.steps = {} if language is None else {layer: step for step, layer in enumerate(language.layers)}
        self.rows = language is not None and "last_query" in language.needs
        self.owner = SessionToken()
        self.parameters = Parameters(type(model).forward)
        self.handover, self.enters = handover, enters
        self.forwards = Forwards(DecoderState, path)
        self._checked: weakref.ref[Any] | None = None
        self._check()

    def _check(self) -> None:
        for index, module in enumerate(self.modules):
            missing = Parameters(type(module).forward).missing(*_ARGUMENTS)
            if missing:
                raise UnsupportedModelError(
                    f"{self.path}.{index} ({type(module).__name__}) takes no {', '.join(missing)}: shortened sequences cannot "
                    f"be given their masks and positions; {known_from('transformers')}"
                )
        implementation = IMPLEMENTATION.get(self.model.config)
        if implementation not in DENSE | FLASH:
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} of the language model cannot be given the masks of shortened "
                f"sequences; load the model with one of {', '.join(sorted(DENSE | FLASH))}"
            )
        for index in self.steps if self.rows else ():
            check_attention(self.modules[index], f"{self.path} layer {index}", implementation in FLASH)

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        refuse_replicas(stack, self.model)
        for index in self.steps:
            attention = ATTENTION.get(self.modules[index])
            if attention is not None:
                parameters = Parameters(type(attention).forward)
                hook = attention.register_forward_pre_hook(partial(self._attend, index, parameters), with_kwargs=True)
                stack.callback(hook.remove)
        first = 0 if self.enters or self.connector is not None or self.evict else min(self.steps)
        for index in range(first, self.depth):
            refuse_replicas(stack, self.modules[index])
            override(stack, self.modules[index], "forward", partial(PrunedLayer, self, index))
        stack.callback(self._close)

    def _attend(
        self, layer: int, parameters: Parameters, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In front of the attention of a drop point: note its call, and give it a cache that shows its keys.

        Gradient checkpointing takes any cache away from a layer. Whether it does depends on the release and on whether
        gradients are recorded; here it is seen, not predicted.
        """
        state = self.state
        view = state.views.get(layer)
        if view is None:
            return None
        given = parameters.named(args, kwargs)
        if self.rows:
            state.calls[layer] = parameters, given
        if CACHE.read(given) is not None:
            return None
        view.cache = None
        return (), parameters.put(given, CACHE, view)

    def _close(self) -> None:
        self.owner.closed = True
        self.reset()

    def reset(self) -> None:
        """Forget all forwards."""
        self.forwards.forget()

    @property
    def state(self) -> DecoderState:
        return self.forwards.state

    @property
    def trace(self) -> list[LayerTrace]:
        """The drop points of the last prompt, in order."""
        return list(self.state.prompt.trace.values())

    @property
    def memory(self) -> KVMemory | None:
        """Bytes of the cache behind the last prompt."""
        return self.state.prompt.memory

    # -- start of a forward -------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_tracing()
        visual, marked = self.handover.visual, self.handover.marked
        self.handover.visual, self.handover.marked = None, False
        before, state = self.state, self.forwards.begin()
        kwargs = self.parameters.named(args, kwargs)
        cache = CACHE.read(kwargs)
        if cache is not None and (self._checked is None or self._checked() is not cache):
            check_cache(cache, self.owner)
            self._checked = weakref.ref(cache)
        if visual is None:
            if cache is not None and cache.get_seq_length():  # no new prompt
                state.prompt = before.prompt
            return None
        x = EMBEDDINGS.read(kwargs)
        if x is None:
            raise HookNeverFiredError(
                f"{self.path} ({type(module).__name__}) was not given {EMBEDDINGS}; this version of the model passes "
                "its embeddings differently"
            )
        wanted = ALL_STATES.read(kwargs, ALL_STATES.get(self.model.config))
        state.full_outputs = wanted is not None and wanted is not False
        batch, length = x.shape[:2]
        gone = is_dropped(x) & visual if marked else None
        # the one look at the device: which numbers of visual tokens there are, and are left of the encoder
        there = visual.sum(1)
        both = (there if gone is None else torch.cat([there, (visual & ~gone).sum(1)])).tolist()
        lengths, left = tuple(both[:batch]), tuple(both[batch:])
        picked = Selection.from_mask(visual, lengths)
        count = picked.slots.shape[1]
        index = torch.arange(count, device=x.device).expand(batch, count)
        tokens = TokenMap.full(batch, length, x.device)
        front = Front(tokens, TokenMap(index, lengths, lengths, count, picked.valid), picked.slots, tokens.index)
        if gone is not None:
            x = torch.where(gone.unsqueeze(-1), torch.zeros_like(x), x)
            here = ~gone.gather(1, front.where)
            here = here if picked.valid is None else here & picked.valid
            if left != lengths:
                front = _drop(front, Selection.from_mask(here, left))
                front = _restart(front)
        if self.connector is not None:
            _validate(self.connector, front.visual, 1)
            at = _at(x, front)
            if reads_are_free(at.device) and not bool(torch.isfinite(at).all()):
                raise ValueError(
                    "image features are NaN or Inf in front of the language model: check the pixels for NaN or Inf, and fp16 "
                    "overflow"
                )
            front = self._choose("connector", self.connector, 0, front, at, at)
            front = _restart(front)
        if self.language is not None:
            _validate(self.language, front.visual, len(self.language.layers))
        state.fronts[0] = front
        if front.short:
            state.whole.add(0)
        return ((), self.parameters.put(kwargs, EMBEDDINGS, x)) if marked else None

    # -- one layer ----------------------------------------------------------------------------------------------------

    def front(self, layer: int) -> Front | None:
        """Who is there in front of ``layer``; None in a forward without visual tokens."""
        fronts = self.state.fronts
        if not fronts:
            return None
        while layer not in fronts:  # layers in front of the first drop point are not patched
            layer -= 1
        return fronts[layer]

    def choose(self, layer: int, front: Front, keys: Tensor, x: Tensor, row: Tensor | None) -> Front:
        """The front behind a drop point. keys [B, H, S, D], x [B, S, C], row [B, S] for methods that need it."""
        assert self.language is not None
        if keys.shape[2] != front.tokens.slots:
            raise HookNeverFiredError(
                f"{self.path} layer {layer} cached {keys.shape[2]} keys for a sequence of {front.tokens.slots} tokens"
            )
        mean = keys.detach().mean(1, dtype=torch.float32)
        at = _at(mean, front)
        step = self.steps[layer]
        if step == 0 and reads_are_free(at.device) and not bool(torch.isfinite(at).all()):
            raise ValueError(
                f"the keys of {self.path} layer {layer} are NaN or Inf: check the inputs, and fp16 overflow"
            )
        seen = None if row is None else row.gather(1, front.where)
        return self._choose("language", self.language, layer, front, at, _at(x.detach(), front), seen)

    def _choose(
        self,
        stage: str,
        drop: Drop,
        layer: int,
        front: Front,
        keys: Tensor,
        features: Tensor,
        attention: Tensor | None = None,
    ) -> Front:
        visual = front.visual
        step, steps = (0, 1) if stage == "connector" else (self.steps[layer], len(self.steps))
        some = [sample for sample, n in enumerate(visual.lengths) if n]
        selection = None
        if len(some) == len(visual.lengths):
            selection = drop.select(Candidates(keys, features, visual, step, steps, attention))
        elif some:
            # samples without visual tokens have nothing to decide: the method sees the others
            pick = torch.tensor(some, device=keys.device)
            part = TokenMap(
                visual.index[pick],
                tuple(visual.lengths[i] for i in some),
                tuple(visual.total[i] for i in some),
                visual.width,
                None if visual.valid is None else visual.valid[pick],
            )
            seen = None if attention is None else attention[pick]
            chosen = drop.select(Candidates(keys[pick], features[pick], part, step, steps, seen))
            if chosen is not None:
                keep = torch.zeros_like(visual.index, dtype=torch.bool)
                keep[pick] = _mask(chosen, visual.slots)
                lengths = [0] * len(visual.lengths)
                for sample, n in zip(some, chosen.lengths, strict=True):
                    lengths[sample] = n
                selection = Selection.from_mask(keep, tuple(lengths))
        after = front if selection is None else _drop(front, selection)
        self.state.prompt.trace[stage, layer] = LayerTrace(
            stage, layer, torch.tensor(visual.lengths), torch.tensor(after.visual.lengths), after.visual.kept()
        )
        return after

    def shorten(self, layer: int, front: Front, x: Tensor) -> Tensor:
        """The layer's input [B, S, C], from the full sequence where the model works on it between layers."""
        return gather_tokens(x, front.tokens.index, 0) if layer in self.state.whole else x

    def arguments(
        self, layer: int, front: Front, parameters: Parameters, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], CachePositions | None]:
        """Rotary tables, positions and mask of the survivors, and what their cache layer holds with them."""
        tokens, cache = front.tokens, CACHE.read(kwargs)
        entry = None if cache is None else ragged_layer(cache, layer, self.owner)
        out = parameters.put(kwargs, ROTARY, self._once("rotary", tokens, ROTARY.read(kwargs), gather_rotary))
        if isinstance(ids := POSITIONS.read(kwargs), Tensor):
            out = parameters.put(out, POSITIONS, self._once("ids", tokens, ids, gather_ids))
        out = parameters.put(out, MASK, self._mask(MASK.read(kwargs), tokens, entry, tokens.width))
        if entry is None:
            return out, None
        before = entry.length
        return out, self._once("keys", tokens, entry.map, lambda past, t: extended(past, before, t))

    def whole_arguments(
        self, layer: int, queries: int, parameters: Parameters, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The mask of a sequence that is all there, over a cache that is not."""
        cache = CACHE.read(kwargs)
        if cache is None or layer >= len(cache.layers):
            return kwargs
        entry = cache.layers[layer]
        if not isinstance(entry, RaggedLayer) or entry.map is None:
            return kwargs
        return parameters.put(kwargs, MASK, self._mask(MASK.read(kwargs), None, entry, queries))

    def _mask(self, mask: Any, tokens: TokenMap | None, entry: RaggedLayer | None, queries: int) -> Any:
        past, before, first = None, 0, 0
        if entry is not None:
            past, before, (_, first) = entry.map, entry.length, entry.get_mask_sizes(queries)
        flash = IMPLEMENTATION.get(self.model.config) in FLASH
        # layers with the same mask, survivors and cache content share the result
        key = ("mask", id(mask), id(tokens), id(past), first)
        memo = self.state.memo
        if key not in memo:
            cut = survivors_mask(mask, tokens, past, before=before, first=first, queries=queries, flash=flash)
            memo[key] = (cut, mask, tokens, past)  # kept alive, so that the ids stay theirs
        return memo[key][0]

    def _once(self, name: str, tokens: TokenMap, source: Any, make: Callable[[Any, TokenMap], Any]) -> Any:
        key = (name, id(tokens), id(source))
        memo = self.state.memo
        if key not in memo:
            memo[key] = (make(source, tokens), tokens, source)
        return memo[key][0]

    def hand_on(self, layer: int, after: Front, y: Tensor) -> Tensor:
        """The layer's output for whoever comes next: full length at the end and where the model looks at it."""
        state = self.state
        state.whole.discard(layer + 1)
        if not after.short or not (layer + 1 == self.depth or state.full_outputs or layer < self.between):
            return y
        state.whole.add(layer + 1)
        return gather_tokens(y, self._once("owners", after.tokens, None, lambda _, t: owners(t)), 0)

    def finish(self, cache: Any) -> None:
        """Behind the last layer of a prompt: what its cache takes."""
        if cache is None:
            return
        state = self.state
        if self.evict:
            left = state.fronts[self.depth].tokens
            for layer in range(self.depth):
                entry = ragged_layer(cache, layer, self.owner)
                if state.fronts[layer].tokens is not left and entry.is_initialized:
                    before = entry.length - left.width
                    entry.evict(*self._once("left", left, entry.map, partial(remaining, before=before)))
        sizes = [stored_bytes(layer) for layer in cache.layers]
        kept, whole = (sum(size) for size in zip(*sizes, strict=True))
        state.prompt.memory = KVMemory(kept, whole) if whole else None  # gradient checkpointing takes the cache away


class PrunedLayer(Uncopyable):
    """Stands in for ``layer.forward`` on one instance."""

    def __init__(self, decoder: PrunedDecoder, layer: int, original: Callable[..., Any]) -> None:
        self.decoder, self.layer, self.original = decoder, layer, original
        self.parameters = Parameters(type(decoder.modules[layer]).forward)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoder, layer, parameters = self.decoder, self.layer, self.parameters
        kwargs = parameters.named(args, kwargs, skip=1)
        decoder.forwards.enter(layer, hidden_states)
        decoder.forwards.remember(layer, hidden_states)
        front = decoder.front(layer)
        if front is None:
            kwargs = decoder.whole_arguments(layer, hidden_states.shape[1], parameters, kwargs)
            return self.original(hidden_states, **kwargs)
        module, cache = decoder.modules[layer], CACHE.read(kwargs)
        x, positions = hidden_states, None
        if front.short:
            x = decoder.shorten(layer, front, x)
            kwargs, positions = decoder.arguments(layer, front, parameters, kwargs)
        else:
            kwargs = decoder.whole_arguments(layer, x.shape[1], parameters, kwargs)
        view, chooses = CacheView(cache, positions), layer in decoder.steps
        if chooses or positions is not None:
            kwargs = parameters.put(kwargs, CACHE, view)
        state = decoder.state
        if chooses:
            state.views[layer] = view
        try:
            out = self.original(x, **kwargs)
        finally:
            state.views.pop(layer, None)
            call = state.calls.pop(layer, None)
        y = out[0] if isinstance(out, tuple) else out
        after = front
        if chooses:
            if view.keys is None:
                raise HookNeverFiredError(
                    f"{decoder.path} layer {layer} put no keys into its cache, so there is nothing to score"
                )
            row = None
            if decoder.rows:
                row = last_row(module, f"{decoder.path} layer {layer}", call, view.held, front.tokens.valid)
            after = decoder.choose(layer, front, view.keys, y, row)
            if after is not front:
                y = gather_tokens(y, after.slots, 0)
        decoder.state.fronts[layer + 1] = after
        y = decoder.hand_on(layer, after, y)
        if layer + 1 == decoder.depth:
            decoder.finish(cache)
        return (y, *out[1:]) if isinstance(out, tuple) else y


def owners(tokens: TokenMap) -> Tensor:
    """For each position the slot of the nearest survivor at or before it (the first one where none is), int64 [B, L]."""
    batch = tokens.index.shape[0]
    index = tokens.index if tokens.valid is None else tokens.index.masked_fill(~tokens.valid, tokens.width)
    here = torch.zeros(batch, tokens.width + 1, dtype=torch.long, device=index.device).scatter_(1, index, 1)
    return (here[:, : tokens.width].cumsum(1) - 1).clamp_min(0)


def _at(x: Tensor, front: Front) -> Tensor:
    """Rows of x [B, S, C] of the visual tokens, [B, N, C]."""
    return x.gather(1, front.where.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _mask(selection: Selection, count: int) -> Tensor:
    """bool [B, N], True for the slots that stay."""
    slots = selection.slots if selection.valid is None else selection.slots.masked_fill(~selection.valid, count)
    keep = torch.zeros(slots.shape[0], count + 1, dtype=torch.bool, device=slots.device)
    return keep.scatter_(1, slots, True)[:, :count]


def _stays(front: Front, selection: Selection) -> Selection:
    """What a choice among the visual tokens means for the sequence."""
    tokens, visual = front.tokens, front.visual
    here = tokens.valid if tokens.valid is not None else torch.ones_like(tokens.index, dtype=torch.bool)
    # one column more, for the padding among the visual slots
    keep = torch.cat([here, here.new_zeros(here.shape[0], 1)], 1)
    where = front.where if visual.valid is None else front.where.masked_fill(~visual.valid, tokens.slots)
    keep = keep.scatter(1, where, _mask(selection, visual.slots))[:, : tokens.slots]
    lengths = tuple(
        n - before + after for n, before, after in zip(tokens.lengths, visual.lengths, selection.lengths, strict=True)
    )
    return Selection.from_mask(keep, lengths)


def _drop(front: Front, selection: Selection) -> Front:
    chosen = _stays(front, selection)
    count = front.tokens.slots
    slots = chosen.slots if chosen.valid is None else chosen.slots.masked_fill(~chosen.valid, count)
    new = torch.zeros(slots.shape[0], count + 1, dtype=torch.long, device=slots.device)
    new.scatter_(1, slots, torch.arange(slots.shape[1], device=slots.device).expand_as(slots))
    where = new.gather(1, front.where.gather(1, selection.slots))
    return Front(front.tokens.select(chosen), front.visual.select(selection), where, chosen.slots)


def _restart(front: Front) -> Front:
    """The next stage counts its candidates from here."""
    visual = front.visual
    fresh = TokenMap(visual.index, visual.lengths, visual.lengths, visual.width, visual.valid)
    return Front(front.tokens, fresh, front.where, front.slots)


def _validate(drop: Drop, visual: TokenMap, steps: int) -> None:
    for total in sorted({n for n in visual.lengths if n}):
        drop.validate(total, steps)
