"""A pruned decoder: the language stage.

The layers behind the first drop point run on the tokens that are left (``runtime.layer``). Outside the layers every sequence has
the length that entered (``doorway``): a dropped position shows the nearest survivor before it.

Letters: B batch, L positions of the forward, S survivors of the longest sample, N visual candidates, H KV heads, D head dim.
"""

import math
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from ..errors import HookNeverFiredError, ParityError, UnsupportedModelError
from ..gathers import gather_tokens
from ..needs import QUERIES, RATERS
from ..runtime.blocks import Block, refuse_meta
from ..runtime.deciding import Seen
from ..runtime.layer import LayerStack, PrunedLayer
from ..runtime.observe import Observers
from ..runtime.points import DropPoint
from ..runtime.state import Forward, LayerState
from ..tokens import Facts, TokenMap
from ..upstream.decoders import anatomies
from ..upstream.names import (
    ALL_STATES,
    ATTENTION,
    CACHE,
    EMBEDDINGS,
    IDS,
    IMPLEMENTATION,
    JOINED,
    LAST_ROWS,
    PAIRWISE,
    ROTARY,
    SCALED_FROM,
    SCALES,
    STREAMS,
    TURNS,
    Parameters,
)
from ..upstream.versions import known_from
from .attention import check_attention, rows
from .cache import CacheView, RaggedLayer, check_cache, filled, filled_of, ragged_layer
from .call import REQUIRED, Call, Spelling
from .entries import CachePositions, SessionToken, extended, remaining
from .layers import Keeps
from .masks import DENSE, FLASH, survivors_mask, weighed
from .positions import gather_beside, gather_ids, gather_rotary, rotary_like
from .queries import Askers, askers, raters
from .recurrent import filled_state, in_front
from .static import StaticRagged, places_by


class Held(NamedTuple):
    """What a layer of a cache holds in front of a forward.

    Attributes:
        past: which positions its entries are of; None: every one.
        before: positions that are cached.
        first: the first position that a mask of the layer shows.
        places: of a static layer, the first entry that it shows to the sequence that comes, and how many places.
    """

    past: CachePositions | None = None
    before: int = 0
    first: int = 0
    places: tuple[int, int] | None = None

    @staticmethod
    def by(entry: Any, queries: int, *, counted: bool = True) -> "Held":
        """Read it off a layer of a cache, None where there is none.

        Args:
            entry: the layer.
            queries: length of the sequence that comes.
            counted: say also of a static layer how many positions are cached, for which the device is asked.
        """
        if entry is None:
            return Held()
        count, first = entry.get_mask_sizes(queries)
        if isinstance(entry, StaticRagged):
            return Held(entry.map, entry.length if counted else 0, first, entry.shown(queries))
        if isinstance(entry, StaticLayer):
            return Held(None, int(entry.get_seq_length()), first, (first, count))
        return Held(entry.map if isinstance(entry, RaggedLayer) else None, entry.get_seq_length(), first)


@dataclass
class Gaps:
    """A forward over a cache from which tokens are missing.

    Attributes:
        entries: by layer, what holds its keys and misses some, and which it had in front of the forward.
        masks: of layers from whose own sequence nothing is missing, by what can be missing and the window: the model's own, and
            that over the gaps.
    """

    entries: dict[int, tuple[RaggedLayer | StaticRagged, CachePositions]] = field(default_factory=dict)
    masks: dict[tuple[int, int | None], list[tuple[Any, Any]]] = field(default_factory=dict)


class Running:
    """The forward in which nothing is decided that runs; None in any other, and outside of forwards."""

    def __init__(self) -> None:
        self.step: Gaps | None = None


class RunningHere(Running, threading.local):
    """The same of every thread."""


@dataclass
class DecoderForward(Forward):
    """What one forward of a decoder knows besides; decode steps go on telling the ``drops`` of their prompt.

    Attributes:
        all_states: the caller wants every hidden state.
        views: of layers that run, the cache as they see it.
        calls: how the attention of layers that run spells its arguments, and those it got.
        joined: layers behind which the model itself works on the full sequence (DeepStack).
        held: of layers whose keys others read, what they held in front of this forward.
        gaps: of the cache in front of this forward.
        embeddings: what enters, [B, S, C], where methods ask tokens that are chosen by it.
        answer: last tokens that are none of the prompt.
    """

    all_states: bool = False
    joined: frozenset[int] = frozenset()
    held: dict[int, Held] = field(default_factory=dict)
    gaps: Gaps | None = None
    views: dict[int, CacheView] = field(default_factory=dict)
    calls: dict[int, tuple[Parameters, dict[str, Any]]] = field(default_factory=dict)
    embeddings: Tensor | None = None
    answer: int = 0

    def told(self) -> Self:
        return replace(super().told(), embeddings=None)


class PrunedDecoder(LayerStack[DecoderForward, Call]):
    """The language stage of a session.

    Args:
        path: where the decoder sits in the user's model, for messages.
        model: the module that owns the layers.
        layers: the layers.
        points: drop points, in and behind layers.
        observers: of the session.
        token: identity of the plan.
        keeps: what each layer keeps of a sequence.
        evict: behind a prompt, no layer's cache keeps a token that any layer dropped.

    Raises:
        UnsupportedModelError: the layers cannot be given shortened sequences.
        ParityError: ``placement="mid"``, and a layer is not what the table says.
    """

    slot = "language"

    def __init__(
        self,
        path: str,
        model: nn.Module,
        layers: Sequence[nn.Module],
        points: Sequence[DropPoint],
        *,
        observers: Observers,
        token: SessionToken,
        keeps: Sequence[Keeps],
        evict: bool = False,
    ) -> None:
        points = [point for point in points if point.method is not None or keeps[point.layer].keys]
        super().__init__(path, model, layers, points, DecoderForward, observers)
        self.keeps, self.evict = keeps, evict
        looks = observers.everywhere and not any(point.method is not None for point in points)
        if not (evict or looks):
            self.first = min(self.points, default=self.depth)
        behind = [one.shared for one in keeps[self.first :] if one.shared is not None]
        self.sources = frozenset(behind if any(point.method is not None for point in points) else ())
        self.first = min(self.first, *self.sources, self.depth)
        self.token = token
        spelled = {kind: Spelling(kind.forward) for kind in {type(module) for module in self.modules}}
        self.spelling = [spelled[type(module)] for module in self.modules]
        one_of_each = {type(module): module for module in self.modules}
        scaling = [kind for kind, one in one_of_each.items() if SCALES.get(ATTENTION.get(one), False)]
        some = [module for module in self.modules if type(module) in scaling] if scaling else []
        self.exact = min(map(_scaled_from, some), default=math.inf)
        self._checked: weakref.ref[Any] | None = None
        self._running, self._traced = RunningHere(), Running()  # compiled code knows no thread
        own = [(layer, keeps[layer].shared) for layer in range(self.first, self.depth)]
        self._read = [(layer, layer if source is None else source) for layer, source in own]
        # drop points in front of what a layer reads: layers with as many miss the same tokens
        places = sorted(self.points)
        self._behind = {layer: bisect_left(places, source) for layer, source in self._read}
        self._step = places_by(point.method.fixed for point in points if point.method is not None)
        self._check()

    def _check(self) -> None:
        known: dict[type, str] = {}
        for index, module in enumerate(self.modules):
            if type(module) not in known:
                known[type(module)] = self._unable(index, module)
            if why := self.keeps[index].refusal or known[type(module)]:
                raise UnsupportedModelError(
                    f"{self.path}.{index} ({type(module).__name__}) cannot be given shortened sequences: {why}. Drop tokens in "
                    f"front of the language model (vision and connector stages); {known_from('transformers')}"
                )
        implementation = IMPLEMENTATION.get(self.module.config)
        if self.sources and implementation in FLASH:
            raise UnsupportedModelError(
                f"layers of {self.path} read keys of earlier layers, where more tokens are left, and flash attention takes no "
                'mask that says which: load the model with attn_implementation="sdpa"'
            )
        if implementation not in DENSE | FLASH:
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} of the language model cannot be given the masks of shortened "
                f"sequences; load the model with one of {', '.join(sorted(DENSE | FLASH))}"
            )
        for index, point in self.points.items():
            if point.needs & QUERIES:
                check_attention(self.modules[index], f"{self.path} layer {index}", implementation in FLASH)
            if point.method is not None and point.method.size_bias() and implementation in FLASH:
                raise UnsupportedModelError(
                    "flash attention takes no mask through which merged tokens are weighed: set beta=0, or load the model "
                    'with attn_implementation="sdpa"'
                )
            if point.placement == "mid":
                self.blocks[index] = self._proved(index)

    def _unable(self, index: int, module: nn.Module) -> str:
        """Say why layers of a class cannot run on fewer tokens, given one of them; "" where they can."""
        parameters = self.spelling[index].parameters
        if missing := parameters.missing(*REQUIRED):
            return f"it takes no {', '.join(missing)}, which shows what its tokens see"
        if STREAMS.of(module) is not None:
            return "its hidden states are several streams, of which the first alone chooses"
        if parameters.has(PAIRWISE):
            return f"it takes a {PAIRWISE.among(parameters.names)} of every pair of places"
        if not parameters.has(ROTARY) and any("RotaryEmbedding" in type(part).__name__ for part in module.modules()):
            return f"it takes no {ROTARY} and makes them itself, by place among its tokens"
        return ""

    def _proved(self, index: int) -> Block:
        """The layer seen through its parts, once these were seen to make up the layer."""
        module, name = self.modules[index], f"{self.path}.{index}"
        refuse_meta(module)
        failed = None
        for spec in anatomies(module):
            block, norm = Block(module, spec, name), spec.norm1 or spec.branch1[0]
            width = block.module.get_parameter(f"{norm}.weight").shape[-1]
            for table in rotary_like(ATTENTION.get(module)):
                try:
                    block.prove(width, 0, table)
                    return block
                except ParityError as error:
                    failed = failed or error
        if failed is None:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, of which the place between attention and MLP is not known: use "
                'placement="post"'
            )
        raise ParityError(
            f"{name} ({type(module).__name__}) does not compute what its parts alone would, so the place between attention and "
            f'MLP is not known: use placement="post" ({failed})'
        )

    @property
    def drops(self) -> bool:
        """Tell whether tokens may leave here."""
        return any(point.method is not None and not point.method.keeps_everything for point in self.points.values())

    @property
    def needs(self) -> frozenset[str]:
        """Return what is computed on demand at some drop point."""
        return frozenset().union(*(point.needs for point in self.points.values()))

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        for index in self.points:
            attention = ATTENTION.get(self.modules[index])
            if attention is not None:
                parameters = Parameters(type(attention).forward)
                hook = attention.register_forward_pre_hook(partial(self._attend, index, parameters), with_kwargs=True)
                stack.callback(hook.remove)
        self.replace_layers(stack)

    def _attend(
        self, layer: int, parameters: Parameters, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In front of the attention of a drop point: note its call, and give it a cache that shows its keys.

        Gradient checkpointing takes any cache away from a layer. Whether it does depends on the release and on whether
        gradients are recorded; here it is read off the call, not predicted.
        """
        forward = self.forward
        view = forward.views.get(layer)
        if view is None:
            return None
        given = parameters.named(args, kwargs)
        if self.points[layer].needs & QUERIES:
            forward.calls[layer] = parameters, given
        if CACHE.read(given) is not None:
            return None
        view.cache = None
        return (), parameters.put(given, CACHE, view)

    # -- start of a forward -------------------------------------------------------------------------------------------

    def begin(
        self, state: LayerState | None, kwargs: dict[str, Any], facts: Facts | None, answer: int = 0
    ) -> dict[str, Any]:
        """A forward begins.

        Args:
            state: what enters; None in a forward in which nothing can go.
            kwargs: arguments of the decoder.
            facts: of the candidates, see :class:`saint.runtime.state.Forward`.
            answer: last tokens that are none of the prompt.

        Returns:
            The arguments with which it shall run.
        """
        before, forward = self.forward, self.forwards.begin()
        cache = CACHE.read(kwargs)
        if self.drops and cache is not None and not torch.compiler.is_compiling() and not self._known(cache):
            check_cache(cache, self.token)
            self._checked = weakref.ref(cache)
        forward.gaps = self._gaps(cache)
        if state is None:
            if filled(cache):  # no new prompt
                forward.drops, forward.origin = before.drops, before.origin
            self.running.step = forward.gaps
            return kwargs
        if self.sources:
            entries = () if cache is None else cache.layers
            for source in self.sources:
                entry = entries[source] if source < len(entries) else None
                forward.held[source] = Held.by(entry, state.tokens.width)
        wanted = ALL_STATES.read(kwargs, ALL_STATES.get(self.module.config))
        forward.all_states = wanted is not None and wanted is not False
        forward.origin, forward.facts, forward.joined = state, facts, _joined(JOINED.read(kwargs))
        forward.answer = answer
        if RATERS in self.needs:
            x, module = EMBEDDINGS.read(kwargs), cast(Any, self.module)
            forward.embeddings = module.get_input_embeddings()(IDS.read(kwargs)) if x is None else x
        self._refuse_scaled(state.tokens.width + (0 if cache is None else int(cache.get_seq_length())))
        self.begin_layers(forward, state, None)
        # between layers the model would cut the last rows off a sequence that is shortened
        return {name: 0 if name in LAST_ROWS.spellings else value for name, value in kwargs.items()}

    def _known(self, cache: Any) -> bool:
        """Tell whether the cache has been checked."""
        return self._checked is not None and self._checked() is cache

    def end(self) -> None:
        """The forward is over."""
        self.running.step = None

    @property
    def running(self) -> Running:
        """Return where the step of this thread is."""
        return self._traced if torch.compiler.is_compiling() else self._running

    def _gaps(self, cache: Any) -> Gaps:
        """Note what is missing from a cache in front of a forward."""
        entries, gaps = () if cache is None else cache.layers, Gaps()
        count = len(entries)
        for layer, source in self._read:  # no call for a layer: this runs in every step of an answer
            entry = entries[source] if source < count else None
            if isinstance(entry, (RaggedLayer, StaticRagged)) and entry.map is not None:
                gaps.entries[layer] = entry, entry.map
        return gaps

    def _refuse_scaled(self, end: int) -> None:
        if self.drops and end > self.exact:
            raise ValueError(
                f"this prompt ends at position {end}, and attention of {self.path} scales its queries by place from "
                f"{self.exact:g} on, which is not the position of a token once others have left in the language model: drop "
                "tokens in front of it (vision and connector stages), or pass a shorter prompt"
            )

    # -- one layer ----------------------------------------------------------------------------------------------------

    @property
    def layer_kinds(self) -> Sequence[type[PrunedLayer]]:
        return [DecoderLayer] * self.depth

    def named(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Call]:
        return (), self.spelling[layer].read(args, kwargs)

    def arrive(self, layer: int, x: Tensor, call: Call) -> tuple[DecoderForward, LayerState | None]:
        forward = self.forwards.enter(layer, x)
        return forward, forward.states[layer] if forward.states else None

    def run(
        self,
        forward: DecoderForward,
        layer: int,
        state: LayerState,
        original: Callable[..., Any],
        x: Tensor,
        call: Call,
    ) -> tuple[Any, Seen | None]:
        point, cache, positions = self.points.get(layer), call.cache, None
        if self.keeps[layer].recurrent and not state.tokens.nothing_dropped:
            return self._recurrent(forward, layer, state, original, x, call), None
        if state.tokens.nothing_dropped:
            call = replace(call, mask=self.over_gap(forward.gaps, layer, x, call.mask))
        else:
            with self.gathering:
                call, positions = self._of_survivors(forward, layer, state, x.dtype, call)
        view = CacheView(cache, positions)
        if point is not None or positions is not None:
            call = replace(call, cache=view)
        if point is not None:
            forward.views[layer] = view
        try:
            out = original(x, **self.spelling[layer].write(call))
        finally:
            forward.views.pop(layer, None)
            attended = forward.calls.pop(layer, None)
        if point is None:
            return out, None
        name, count = f"{self.path} layer {layer}", state.tokens.slots
        if view.keys is None:
            raise HookNeverFiredError(f"{name} put no keys into its cache, so there is nothing to score")
        if view.keys.shape[2] != count:
            raise HookNeverFiredError(f"{name} cached {view.keys.shape[2]} keys for a sequence of {count} tokens")
        found = {}
        if point.needs & QUERIES:
            who = partial(self._askers, forward, point.needs, state)
            held = filled_of(view.held, cache, layer)
            found = rows(self.modules[layer], name, attended, held, state.tokens.valid, who)
        return out, Seen(view.keys.detach().mean(1, dtype=torch.float32), found)

    @staticmethod
    def _askers(forward: DecoderForward, needs: frozenset[str], state: LayerState, real: Tensor) -> Askers:
        """Of the tokens that are no padding, bool [B, S], those that methods want asked."""
        origin, embeddings = forward.origin, forward.embeddings
        assert origin is not None
        if forward.answer:
            real = real.clone()
            real[:, real.shape[1] - forward.answer :] = False

        def near(text: Tensor) -> Tensor:
            assert embeddings is not None
            found: Tensor = forward.once("raters", partial(raters, embeddings, origin, text), origin)
            return found

        return askers(needs, real, state, origin, near)

    def unpruned(self, forward: DecoderForward, layer: int, original: Callable[..., Any], x: Tensor, call: Call) -> Any:
        call = replace(call, mask=self.over_gap(forward.gaps, layer, x, call.mask))
        return original(x, **self.spelling[layer].write(call))

    def over_gap(self, gaps: Gaps | None, layer: int, x: Tensor, mask: Any) -> Any:
        """The mask of a sequence from which nothing is missing, over what a layer's cache has left.

        Args:
            gaps: of the cache in front of the forward; None: of none.
            layer: the layer.
            x: hidden states, [B, Q, C].
            mask: what the model made, over every position.
        """
        if gaps is None or layer not in gaps.entries:
            return mask
        entry = gaps.entries[layer][0]
        made = gaps.masks.setdefault((self._behind[layer], entry.sliding_window), [])
        for known, mine in made:  # no id is asked for: a compiled step would be compiled anew for every one
            if known is mask:
                return mine
        held = Held.by(entry, x.shape[1], counted=False)  # of the first of these layers, in front of what it appends
        mine = self._made(mask, None, held, x.shape[1], None, None, x.dtype)
        made.append((mask, mine))
        return mine

    def _of_survivors(
        self, forward: DecoderForward, layer: int, state: LayerState, dtype: torch.dtype, call: Call
    ) -> tuple[Call, CachePositions | None]:
        """The arguments with rotary tables, positions and mask of the survivors; what their cache layer holds with them."""
        tokens, source = state.tokens, self.keeps[layer].shared
        call = _of_rows(forward, call, tokens)
        if source is not None:
            held, state = forward.held[source], forward.states[source]
            return replace(call, mask=self._mask(forward, call.mask, tokens, held, tokens.width, state, dtype)), None
        if not self.keeps[layer].keys:
            return call, None
        entry = None if call.cache is None else ragged_layer(call.cache, layer, self.token, self._step)
        held, positions = Held.by(entry, tokens.width), None
        if entry is not None:
            make = partial(extended, held.past, held.before, tokens, self._bias(forward, state, dtype))
            positions = forward.once("keys", make, tokens, held.past)
            if isinstance(entry, StaticRagged):
                held = held._replace(places=entry.expect(positions, tokens.slots))
                if layer in self.sources:
                    forward.held[layer] = held
        call = replace(call, mask=self._mask(forward, call.mask, tokens, held, tokens.width, state, dtype))
        return call, positions

    @staticmethod
    def _bias(forward: DecoderForward, state: LayerState, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the logits of the keys of merged tokens."""
        if state.sizes is None:
            return None
        return forward.once("bias", partial(state.key_bias, dtype), state.tokens, state.sizes)

    def _recurrent(
        self,
        forward: DecoderForward,
        layer: int,
        state: LayerState,
        original: Callable[..., Any],
        x: Tensor,
        call: Call,
    ) -> Any:
        """Run a layer whose state every token passes through: padding must stand in front of them."""
        tokens, spelling = state.tokens, self.spelling[layer]
        if tokens.valid is None:
            call = replace(_of_rows(forward, call, tokens), mask=gather_beside(call.mask, tokens))
            return original(x, **spelling.write(call))
        if filled_state(call.cache, layer):
            raise ValueError(
                f"samples of this batch keep different numbers of tokens, and padding in front of the shorter ones would go "
                f"through the state that {self.path} layer {layer} ({type(self.modules[layer]).__name__}) holds of earlier "
                'turns: give the method a fixed number of tokens (keep=64) or budget="batch", or one sample at a time'
            )
        order, back, front = forward.once("front", partial(in_front, tokens), tokens)
        shown = gather_beside(call.mask, front)
        shown = front.valid.long() if shown is None else shown * front.valid
        call = replace(_of_rows(forward, call, front), mask=shown)
        out = original(gather_tokens(x, order, 0), **spelling.write(call))
        if isinstance(out, tuple):
            return gather_tokens(out[0], back, 0), *out[1:]
        return gather_tokens(out, back, 0)

    def _mask(
        self,
        forward: DecoderForward,
        mask: Any,
        tokens: TokenMap,
        held: Held,
        queries: int,
        state: LayerState,
        dtype: torch.dtype,
    ) -> Any:
        """The mask of ``tokens`` over what is ``held`` and the keys of the sequence, of the tokens of ``state``."""
        keys, bias = state.tokens, self._bias(forward, state, dtype)
        make = partial(self._made, mask, tokens, held, queries, keys, bias, dtype)
        # layers with the same mask, survivors and cache content share the result
        return forward.once(f"mask from {held.first} over {held.places}", make, mask, tokens, keys, held.past)

    def _made(
        self,
        mask: Any,
        tokens: TokenMap | None,
        held: Held,
        queries: int,
        keys: TokenMap | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Any:
        """The mask over what is ``held`` and ``keys`` of the sequence; without ``keys``, all of it."""
        past, before, first, places = held
        flash = IMPLEMENTATION.get(self.module.config) in FLASH
        shown = None if keys is tokens else keys
        cut = survivors_mask(
            mask, tokens, past, before=before, first=first, queries=queries, flash=flash, shown=shown, places=places
        )
        entries = past if keys is None else extended(past, before, keys, bias)
        if entries is None or entries.bias is None:
            return cut
        added = entries.biases(before + queries) if places is None else entries.biases_shown(*places)
        assert added is not None
        more = queries if tokens is None else tokens.slots
        ahead = added.shape[1] - more if places is None else 0  # a static layer is empty where causality masks alone
        return weighed(cut, added, queries=more, ahead=ahead, dtype=dtype, flash=flash)

    def leave(self, forward: DecoderForward, layer: int, state: LayerState, y: Tensor, call: Call) -> Tensor:
        after, tokens = layer + 1, state.tokens
        forward.states[after] = state
        if not tokens.nothing_dropped and (after == self.depth or forward.all_states or layer in forward.joined):
            forward.states[after] = replace(state, full_length=True)
            y = gather_tokens(y, forward.once("shown", partial(nearest_before, tokens), tokens), 0)  # [B, L, C]
        if after == self.depth and call.cache is not None and self.evict:
            self._evict(forward, call.cache)
        return y

    def _evict(self, forward: DecoderForward, cache: Any) -> None:
        """Behind the last layer of a prompt: no entry of a token that any layer dropped stays."""
        left = forward.states[self.depth].tokens
        for layer in range(self.depth):
            if not self.keeps[layer].keys:
                continue
            entry = ragged_layer(cache, layer, self.token, self._step)
            if forward.states[layer].tokens is not left and entry.is_initialized:
                past, before = entry.map, entry.length - left.width
                entry.keep(*forward.once("left", partial(remaining, past, left, before=before), left, past))


class DecoderLayer(PrunedLayer):
    """Of a decoder: in a step of an answer the layer runs as if nothing stood in for it, but for its mask where it needs one."""

    stack: PrunedDecoder

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.layer
        gaps = (stack._traced if torch.compiler.is_compiling() else stack._running).step
        if gaps is None or args or torch.is_grad_enabled():
            return super().__call__(x, *args, **kwargs)
        gap = gaps.entries.get(layer)
        if gap is None:
            return self.original(x, **kwargs)
        name = stack.spelling[layer].mask
        mask = kwargs.get(name)
        if mask is None and gap[0].plain:
            return self.original(x, **kwargs)
        return self.original(x, **{**kwargs, name: stack.over_gap(gaps, layer, x, mask)})


def _scaled_from(layer: nn.Module) -> float:
    """The place from which on the attention of a layer scales queries by their place among its tokens (Llama 4)."""
    attention = ATTENTION.get(layer)
    if not SCALES.get(attention, False) or TURNS.get(attention, False):
        return math.inf
    return float(SCALED_FROM.get(attention, math.inf))


def _joined(features: Any) -> frozenset[int]:
    """The layers behind which the model adds to the full sequence: the first ones, or those in front of layers it names."""
    if isinstance(features, Mapping):
        return frozenset(layer - 1 for layer in features)
    return frozenset(range(len(features or ())))


def _of_rows(forward: DecoderForward, call: Call, tokens: TokenMap) -> Call:
    """The arguments of a layer with what comes with each token of the sequence cut to ``tokens``; not the mask."""
    table, ids = call.rotary, call.positions
    rotary = forward.once("rotary", partial(gather_rotary, table, tokens), tokens, table)
    if isinstance(ids, Tensor):
        ids = forward.once("ids", partial(gather_ids, ids, tokens), tokens, ids)
    rest = {name: gather_beside(value, tokens) for name, value in call.rest.items()}
    return replace(call, rotary=rotary, positions=ids, rest=rest)


def nearest_before(tokens: TokenMap) -> Tensor:
    """For each position the slot of the nearest survivor at or before it (the first one where none is), int64 [B, L]."""
    return (tokens.here.cumsum(1) - 1).clamp_min(0)
