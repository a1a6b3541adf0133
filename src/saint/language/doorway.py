"""The door of a language model: visual tokens that leave in front of it leave its input.

The input of the decoder is shortened once and its output lengthened; nothing inside is touched, and the cache is the model's
own, of any class. So nothing is known here of layers: attention of any kind, recurrent layers, tokens that look at each other,
features that are added between layers. Tokens that leave *in* the language model (``decoder.PrunedDecoder``) leave behind this.

What is dropped was marked by the encoder (``gathers.DROPPED``) or is chosen here (the connector stage). Survivors keep their true
positions and see of each other what they saw; a dropped place shows the nearest survivor before it, the token whose prediction
continues the text there once the dropped ones are gone. Logits of text, ``logits_to_keep`` and losses therefore mean what they
meant. Steps that bring no visual tokens cost one look at the cache, and the columns of the survivors where a mask is needed.

Letters: B samples, L places of the sequence, K rows that enter, N visual tokens, C channels.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from ..errors import HookNeverFiredError, UnsupportedModelError
from ..gathers import full_length, gather_tokens, is_dropped
from ..needs import QUERIES
from ..patch import override, refuse_replicas, refuse_tracing
from ..runtime.deciding import Decider
from ..runtime.forwards import PerThread
from ..runtime.observe import Observers
from ..runtime.points import DropPoint, Pruner
from ..runtime.state import Forward, LayerState, packed_tokens, some_tokens
from ..tokens import Facts, Selection, TokenMap, Tower
from ..upstream.names import CACHE, EMBEDDINGS, IDS, IMPLEMENTATION, LAYERS, MASK, POSITIONS, Parameters
from ..work import Stack, read_decoder
from .cache import KVMemory, filled, memory
from .decoder import PrunedDecoder
from .entries import CachePositions, SessionToken
from .logical import Held, held_by, hold, inside
from .masks import DENSE, FLASH
from .shortening import RECURRENT, Reach, Short, Span, documents, masks_of, reaches, real_tokens, shown_before
from .static import fitted, places_by


@dataclass
class Note:
    """What the glue of a model learns of a sequence before its language model starts.

    Attributes:
        visual: the candidates, the visual tokens of a vision-language model, bool [B, L]; None when there are none.
        marked: rows of features that the encoder dropped may be among them (``gathers.is_dropped``).
        mask: the padding mask that the caller gave, [B, T], or None.
        cells: where methods need them, see :class:`saint.tokens.Facts`, of each position, int64 [B, L]; None: no video.
        ids: the token ids that the model was given, beside embeddings or in their place, [B, L], or None.
        brings: features come with the sequence, for the model to merge.
        plain: the embeddings are those of token ids, and of features that the model itself merges.
        waiting: images came in, and their places are not known yet.
    """

    visual: Tensor | None = None
    marked: bool = False
    mask: Tensor | None = None
    cells: Tensor | None = None
    ids: Tensor | None = None
    brings: bool = False
    plain: bool = False
    waiting: bool = False


class Pieces:
    """A prompt that comes in pieces.

    Args:
        keep: which of its places enter, bool [B, L].
        rows: embeddings of its visual tokens where a method has changed them, [B, L, C]; None: they are as they come.
        visual: where those are, bool [B, L].
    """

    def __init__(self, keep: Tensor, rows: Tensor | None = None, visual: Tensor | None = None) -> None:
        self.keep, self.rows, self.visual, self.start = keep, rows, visual, 0

    def next(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which places of the next piece enter, and its embeddings, from those that came: x [B, l, C]."""
        piece = slice(self.start, self.start + x.shape[1])
        self.start = piece.stop
        if self.rows is not None and self.visual is not None:
            x = torch.where(self.visual[:, piece, None], self.rows[:, piece].to(x), x)
        return self.keep[:, piece], x

    @property
    def done(self) -> bool:
        return self.start >= self.keep.shape[1]


class Handover:
    """The note of the forward that runs on a thread.

    Attributes:
        complete: called by the door with the note and the arguments of the decoder, before it reads the note.
        recall: where methods ask what the vision tower showed, told by the rows of visual tokens [B, N, C] and which of them
            are real, bool [B, N].
    """

    def __init__(self) -> None:
        self._own, self._note = threading.local(), PerThread(Note)
        self._compiled_pieces: Pieces | None = None
        self.complete: Callable[[Note, Mapping[str, Any]], None] = lambda note, given: None
        self.recall: Callable[[Tensor, Tensor], Tower | None] = lambda rows, real: None

    @property
    def pieces(self) -> Pieces | None:
        """The prompt that comes in pieces."""
        return self._compiled_pieces if torch.compiler.is_compiling() else getattr(self._own, "pieces", None)

    @pieces.setter
    def pieces(self, pieces: Pieces | None) -> None:
        self._compiled_pieces = self._own.pieces = pieces

    @property
    def prompt(self) -> int | None:
        """Length of the prompt in whose forward an answer may stand behind it: drafts, or one that is given."""
        return getattr(self._own, "prompt", None)

    @prompt.setter
    def prompt(self, length: int | None) -> None:
        self._own.prompt = length

    @contextmanager
    def prompting(self, length: int | None) -> Iterator[None]:
        """Inside the block a prompt has this length; None: whatever stands in a sequence is of the prompt."""
        before, self.prompt = self.prompt, length
        try:
            yield
        finally:
            self.prompt = before

    @property
    def note(self) -> Note:
        return self._note.get()

    def new(self, **facts: Any) -> Note:
        """A note for a forward that begins."""
        return self._note.set(Note(**facts))

    def take(self, given: Mapping[str, Any]) -> Note:
        """The note, complete; it is read once."""
        note = self.note
        self.new()
        self.complete(note, given)
        return note


@dataclass
class DoorForward(Forward):
    """What one forward knows besides.

    Attributes:
        memory: bytes of the cache behind the prompt.
        real: which tokens of the prompt are no padding, bool [B, L], or their number; None of packed rows.
    """

    memory: KVMemory | None = None
    real: Tensor | int | None = None

    @property
    def counts(self) -> tuple[Tensor, Tensor] | None:
        """Visual tokens of each sample of the prompt, with those that left, and all others, int64 [B] each."""
        if self.origin is None or self.real is None:
            return None
        visual = torch.tensor(self.origin.candidates.total)
        real = torch.full_like(visual, self.real) if isinstance(self.real, int) else self.real.sum(1).cpu()
        return visual, real - visual


@dataclass
class Passage:
    """A sequence on its way through the decoder.

    Attributes:
        given: the arguments that enter.
        cache: the cache it fills, or None.
        prompt: brings visual tokens.
        short: what enters, where something does not.
        positions: of the entries of the cache behind it; None where it has every position.
    """

    given: dict[str, Any]
    cache: Any = None
    prompt: bool = False
    short: Short | None = None
    positions: CachePositions | None = None


class Doorway(Decider[DoorForward]):
    """The connector stage of a session, and what carries out the vision stage in its language model.

    Args:
        path: where the decoder sits in the user's model, for messages.
        module: the decoder.
        points: of the connector stage.
        observers: of the session.
        handover: where the model's glue says which tokens are visual.
        decoder: the language stage, or None.
        in_front: methods by which tokens leave in front of the decoder, which then starts with fewer.

    Raises:
        UnsupportedModelError: the decoder cannot be given a shortened sequence.
    """

    slot = "connector"

    def __init__(
        self,
        path: str,
        module: nn.Module,
        points: Sequence[DropPoint],
        *,
        observers: Observers,
        handover: Handover,
        decoder: PrunedDecoder | None,
        token: SessionToken,
        in_front: Sequence[Pruner],
    ) -> None:
        super().__init__(path, module, points, DoorForward, observers)
        self.handover, self.decoder, self.token = handover, decoder, token
        self.starts_short = bool(in_front)
        self._step_of_places = places_by(method.fixed for method in in_front)
        self.depth = len(list(LAYERS.get(module).children()))
        self.parameters = Parameters(type(module).forward)
        self.reaches, implementation = reaches(module.config), IMPLEMENTATION.get(module.config)
        each = self.reaches.values() if isinstance(self.reaches, dict) else [self.reaches]
        self.boundless = implementation in FLASH or all(reach == Reach() for reach in each)
        self.kinds = [masks_of(kind) for kind in getattr(module.config, "layer_types", None) or ()]
        if in_front and implementation not in DENSE | FLASH:
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} of the language model cannot be given the masks of shortened "
                f"sequences; load the model with one of {', '.join(sorted(DENSE | FLASH))}"
            )

    @cached_property
    def work(self) -> Stack | None:
        """Return what the FLOPs of the layers follow from; None where their weights do not say."""
        layers, exact = read_decoder(list(LAYERS.get(self.module).children()), self.module.config)
        return Stack(layers) if exact else None

    @property
    def stacks(self) -> tuple[Decider[Any], ...]:
        """The door, and the language stage behind it."""
        return (self,) if self.decoder is None else (self, self.decoder)

    @property
    def wants_frames(self) -> bool:
        return super().wants_frames or (self.decoder is not None and self.decoder.wants_frames)

    def where(self, point: DropPoint) -> str:
        return "the image features"

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        if self.decoder is not None:
            self.decoder.install(stack)
        refuse_replicas(stack, self.module)
        override(stack, self.module, "forward", self._through)
        self.token.reopen()  # the caches of before are its own again
        stack.callback(self.token.close)
        stack.callback(self.reset)

    def _through(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            passage = self._enter(self.parameters.named(args, kwargs))
            try:
                with inside(passage.cache):
                    output = original(**passage.given)
            finally:
                if self.decoder is not None:
                    self.decoder.end()
            return self._leave(passage, output)

        return forward

    # -- in front of the decoder --------------------------------------------------------------------------------------

    def _enter(self, given: dict[str, Any]) -> Passage:
        refuse_tracing()
        note, cache = self.handover.take(given), CACHE.read(given)
        held = held_by(cache)
        if held is not None and held.token is not self.token:
            raise ValueError(
                "this cache was filled under another plan, which dropped other tokens: start from an empty cache"
            )
        if (pieces := self.handover.pieces) is not None:
            return self._piece(pieces, note, given, cache, held)
        if note.visual is not None:
            return self._prompt(note, note.visual, given, cache, held)
        if not filled(cache):
            self.forwards.begin()  # a prompt without images
        if self.decoder is not None:
            self.decoder.begin(None, given, None)
        return Passage(given, cache) if held is None else self._step(note, given, cache, held)

    def _prompt(self, note: Note, visual: Tensor, given: dict[str, Any], cache: Any, held: Held | None) -> Passage:
        x = EMBEDDINGS.read(given)
        if x is None and (note.marked or self.entries):  # a model without images gives its token ids, and has neither
            raise HookNeverFiredError(
                f"{self.path} ({type(self.module).__name__}) was not given {EMBEDDINGS}; this version of the model passes "
                "its embeddings differently"
            )
        packed, real = documents(given, self.module.config), None
        if self.starts_short and x is not None:
            real = _real(note, given, cache, x)
        answer = self._answer(visual, cache)
        state, counts, changed = self.entering(visual, x, note, packed, real, answer)
        given = given if changed is None else self.parameters.put(given, EMBEDDINGS, changed)
        if packed is None:
            shown = note.mask if real is None and note.mask is not None else real
            self.forward.real = visual.shape[1] if shown is None else shown[:, -visual.shape[1] :].bool()
        if state.tokens.nothing_dropped:
            passage = Passage(given, cache) if held is None else self._step(note, given, cache, held)
        else:
            keep = state.tokens.here if real is None else state.tokens.here & real
            passage = self._shortened(note, visual, Short.of(keep, counts), given, cache, held, packed)
            assert passage.short is not None
            state = _moved(state, passage.short)
        passage.prompt = True
        if self.decoder is not None:
            passage.given = self.decoder.begin(state, passage.given, self.forward.facts, answer)
        return passage

    def _answer(self, visual: Tensor, cache: Any) -> int:
        """Count the last tokens of a sequence [B, L] that are none of the prompt."""
        if self.handover.prompt is None:
            return 0
        before = 0 if cache is None else int(cache.get_seq_length())
        return min(max(0, before + visual.shape[1] - self.handover.prompt), visual.shape[1] - 1)

    def entering(
        self,
        visual: Tensor,
        x: Tensor | None,
        note: Note,
        packed: Tensor | None = None,
        real: Tensor | None = None,
        answer: int = 0,
    ) -> tuple[LayerState, list[int], Tensor | None]:
        """A prompt begins: which of its tokens enter the language model.

        Args:
            visual: where the visual tokens are, bool [B, L].
            x: embeddings, [B, L, C]; None where nothing leaves in front of the language model.
            note: of the prompt.
            packed: which document of the row each token belongs to, int64 [1, L]; each is a sample of its own.
            real: which tokens are no padding of the caller, bool [B, L]; None: all.
            answer: last tokens that are none of the prompt.

        Returns:
            The state in front of the language model, how many real tokens of each row enter, and embeddings in place of ``x``
            where a method has changed some.

        Raises:
            ValueError: documents are packed into several rows.
        """
        forward = self.forwards.begin()
        visual = visual if real is None else visual & real
        gone = is_dropped(x) & visual if note.marked and x is not None else None
        padding = [0] * len(visual)
        if packed is None:
            # the one look at the device: how many visual tokens there are, are left of the encoder, and how much padding
            sets = [visual] if gone is None else [visual, visual & ~gone]
            sets = sets if real is None else [*sets, ~real]
            counts = torch.stack([one.sum(1) for one in sets]).tolist()
            lengths, left = tuple(counts[0]), () if gone is None else tuple(counts[1])
            padding = padding if real is None else counts[-1]
            state = some_tokens(visual, lengths)
        else:
            if self.decoder is not None and self.decoder.needs & QUERIES:
                raise ValueError(
                    "several documents are packed into one row, and a method of the language stage asks the end of the "
                    "row: use a method that does without, or pass each document as a row of its own with an attention_mask"
                )
            state = packed_tokens(visual, packed)
            lengths = state.stage_total
            left = () if gone is None else packed_tokens(visual & ~gone, packed, len(lengths)).stage_total
        assert state.places is not None
        cells = None if note.cells is None else note.cells.flatten()[state.places[..., 0]]
        text = _text(x, visual, real, packed, answer) if x is not None and self.wants_text else None
        tower = self._tower(x, state, gone) if x is not None and self.wants_tower else None
        forward.facts = Facts(cells=cells, text=text, tower=tower)
        if gone is not None and left != lengths:
            state = _without(state, gone, left)
        forward.origin = state
        changed = None
        if x is not None and self.entries:
            state, rows = self.pass_entries(
                forward, state, x if state.tokens.nothing_dropped else gather_tokens(x, state.tokens.index, 0)
            )
            if state.adds is not None:
                changed = torch.where(state.tokens.here.unsqueeze(-1), full_length(rows, state.tokens, 0, 0.0), x)
        return state, [n - empty for n, empty in zip(state.tokens.lengths, padding, strict=True)], changed

    def _tower(self, x: Tensor, state: LayerState, gone: Tensor | None) -> Tower | None:
        """Recall what the vision tower showed of the candidates: x [B, L, C], and those it dropped: gone, bool [B, L]."""
        tokens = state.candidates
        real = tokens.real
        if gone is not None:
            real = real & ~state.of_candidates(gone.unsqueeze(-1)).squeeze(-1)
        return self.handover.recall(state.of_candidates(x.detach()), real)

    def _shortened(
        self,
        note: Note,
        visual: Tensor,
        short: Short,
        given: dict[str, Any],
        cache: Any,
        held: Held | None,
        packed: Tensor | None = None,
    ) -> Passage:
        """A sequence of which only some places enter."""
        x = EMBEDDINGS.read(given)
        batch, places = x.shape[:2]
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"{CACHE.spellings[0]} must be a transformers Cache, got {type(cache).__name__}")
        before, mask = 0 if cache is None else int(cache.get_seq_length()), MASK.read(given)
        out = short.shortened(given, visual, {*MASK.spellings, *POSITIONS.spellings, *CACHE.spellings})
        if short.valid is not None:
            rows = EMBEDDINGS.read(out).masked_fill(~short.valid.unsqueeze(-1), 0)  # [B, K, C]
            out = self.parameters.put(out, EMBEDDINGS, rows)
        if self.parameters.has(POSITIONS):
            ids = POSITIONS.read(given)
            ids = torch.arange(before, before + places, device=x.device).unsqueeze(0) if ids is None else ids
            out = self.parameters.put(out, POSITIONS, short.take(ids, ids.ndim - 1))
        past = None
        if before:
            shown = shown_before(_seen(note, given), batch, before) if held is None else None
            past = CachePositions.every(before, x, shown) if held is None else held.positions
        index = short.index + before
        positions = CachePositions(index, short.valid, before + places)
        positions = positions if past is None else past.followed_by(positions, before)
        if cache is not None and not before and not torch.compiler.is_compiling():
            self._fit(cache, positions)
        span = Span(index, short.valid, positions, before, before + places, note.mask, x.dtype, self._additive, packed)
        out = self.parameters.put(out, MASK, self._masks(mask, span, cache))
        return Passage(out, cache, short=short, positions=positions)

    def _fit(self, cache: Cache, positions: CachePositions) -> None:
        """A static cache that is empty gets places for what enters; from here on a reset takes that back."""
        if whole := fitted(cache, positions.end - positions.index.shape[1], self._step_of_places):
            hold(cache, positions, self.token, whole)

    def _piece(self, pieces: Pieces, note: Note, given: dict[str, Any], cache: Any, held: Held | None) -> Passage:
        """The next piece of a prompt whose tokens have been decided on."""
        x = EMBEDDINGS.read(given)
        keep, x = pieces.next(x)
        given = given if pieces.rows is None else self.parameters.put(given, EMBEDDINGS, x)
        if bool(keep.all()):
            passage = Passage(given, cache) if held is None else self._step(note, given, cache, held, padded=True)
        else:
            real, visual = _real(note, given, cache, x), note.visual
            visual = torch.zeros_like(keep) if visual is None else visual
            passage = self._shortened(note, visual, Short.of(keep if real is None else keep & real), given, cache, held)
        passage.prompt = pieces.done
        return passage

    def _step(self, note: Note, given: dict[str, Any], cache: Any, held: Held, padded: bool = False) -> Passage:
        """A sequence that enters as a whole, on a cache from which positions are missing.

        ``padded``: a single token may be padding too.
        """
        mask, positions, ids = MASK.read(given), held.positions, POSITIONS.read(given)
        x = EMBEDDINGS.read(given)
        dtype = next(self.module.parameters()).dtype if x is None else x.dtype
        x = IDS.read(given) if x is None else x
        count = x.shape[1]
        flat = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        if flat and count == 1 and not padded and positions.valid is None and ids is not None and self.boundless:
            return Passage(self.parameters.put(given, MASK, None), cache)  # nothing is hidden from a single token
        before = cache.get_seq_length()
        if flat and mask is not None and (padded or count > 1):
            own = mask[:, -count:].bool()
            if not bool(own.all()):
                place = torch.arange(before, before + count, device=x.device).expand(len(own), count)
                positions = positions.followed_by(CachePositions(place, own, before + count), before)
        queries = (torch.arange(count, device=x.device) + before).expand(x.shape[0], count)
        span = Span(queries, None, positions, before, before + count, note.mask, dtype, self._additive)
        out = self.parameters.put(given, MASK, self._masks(mask, span, cache))
        if self.parameters.has(POSITIONS) and ids is None:
            out = self.parameters.put(out, POSITIONS, queries)
        return Passage(out, cache, positions=positions)

    @property
    def _additive(self) -> bool:
        return IMPLEMENTATION.get(self.module.config) == "eager"

    # -- masks --------------------------------------------------------------------------------------------------------

    def _masks(self, mask: Any, span: Span, cache: Any) -> Any:
        """The mask of a call in whatever form it came."""
        if isinstance(mask, Mapping):
            return {kind: self._mask(kind, one, span, cache) for kind, one in mask.items()}
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return self._mask(None, mask, span, cache)
        # the decoder makes its masks itself, by place among what enters: right but where a window or a chunk ends
        kinds = self.reaches if isinstance(self.reaches, dict) else {None: self.reaches}
        dense = IMPLEMENTATION.get(self.module.config) in DENSE
        if span.documents is not None and not dense:
            raise ValueError(
                "several documents are packed into one row, and flash attention takes no mask that keeps their survivors apart: "
                'load the model with attn_implementation="sdpa", or pass each document as a row of its own'
            )
        if dense and (span.documents is not None or any(not span.sees_all(reach) for reach in kinds.values())):
            made = {kind: self._mask(kind, None, span, cache) for kind in kinds}
            return made if isinstance(self.reaches, dict) else made[None]
        _, valid = span.columns()
        if valid is not None:
            return valid.long()
        # without a cache a gap in the positions would pass for the end of a packed document
        return torch.ones_like(span.held.index) if cache is None else None

    def _mask(self, kind: str | None, mask: Tensor | None, span: Span, cache: Any) -> Tensor | None:
        """The mask of layers of one kind."""
        if kind in RECURRENT:  # of the sequence alone: what came before is in their state
            if span.real is None:
                return mask if mask is not None and mask.shape[1] == span.rows else None
            return span.real if mask is None else span.real.to(mask.dtype)
        if mask is not None and mask.ndim == 2:
            if span.before and mask.shape[1] == span.total - span.before:  # of the sequence alone
                return (
                    torch.ones_like(span.queries, dtype=mask.dtype) if span.real is None else span.real.to(mask.dtype)
                )
            _, valid = span.columns()
            return valid if valid is None else valid.to(mask.dtype)
        first, count = self._sizes(kind, span, cache)
        if mask is not None:
            return span.cut(mask, first, count)
        reach = self.reaches if isinstance(self.reaches, Reach) else self.reaches.get(kind or "", Reach())
        if (
            span.documents is None
            and not reach.dense
            and span.sees_all(reach)
            and span.columns()[1] is None
            and (span.rows == 1 or count == span.rows)
        ):
            return None
        return span.made(reach, first, count)

    def _sizes(self, kind: str | None, span: Span, cache: Any) -> tuple[int, int]:
        """Of the entries that layers of a kind show: the first, and how many."""
        if cache is None:
            return 0, span.rows
        layer = next((layer for layer, kinds in enumerate(self.kinds) if kind in kinds), 0)
        with inside(cache):
            count, first = cache.get_mask_sizes(span.rows, layer)
        return first, count

    # -- behind the decoder -------------------------------------------------------------------------------------------

    def _leave(self, passage: Passage, output: Any) -> Any:
        cache = passage.cache
        if cache is None and (passage.prompt or passage.positions is not None):
            cache = CACHE.get(output)
        held = held_by(cache)
        if (
            cache is not None
            and passage.positions is not None
            and (held is None or held.positions is not passage.positions)
        ):
            with inside(cache):
                stored = int(cache.get_seq_length())
            # gradient checkpointing takes the cache away from the layers
            if stored >= passage.positions.index.shape[1]:
                hold(cache, passage.positions, self.token)
        if passage.prompt:
            held = held_by(cache)
            self.forward.memory = memory(cache, 0 if held is None else held.gone)
        return output if passage.short is None else passage.short.lengthened(output)


def _seen(note: Note, given: Mapping[str, Any]) -> Any:
    """The mask that shows the caller's padding: of padding, where a model has made another of it."""
    return MASK.read(given) if note.mask is None else note.mask


def _real(note: Note, given: Mapping[str, Any], cache: Any, x: Tensor) -> Tensor | None:
    """Mark the tokens of a sequence [B, L, ...] that are no padding of the caller, bool [B, L]; None: all."""
    return real_tokens(_seen(note, given), x.shape[0], x.shape[1], 0 if cache is None else cache.get_seq_length())


def _moved(state: LayerState, short: Short) -> LayerState:
    """The state of what enters, from that of the sequence without what has left."""
    assert state.places is not None
    sequences, count = state.tokens.index.shape
    rows = state.places[..., 0]
    row, place = rows // count, state.tokens.index.flatten()[rows]  # [B, N]
    places = short.slots()[row, place] + row * short.rows
    tokens = TokenMap.full(sequences, short.rows, rows.device)
    return replace(state, tokens=tokens, places=places.unsqueeze(-1), adds=None)


def _text(x: Tensor, visual: Tensor, real: Tensor | None, packed: Tensor | None, answer: int) -> Tensor:
    """Embeddings of the tokens of each prompt that are neither visual nor padding, [B, T, C]; rows of 0 behind the last.

    Args:
        x: embeddings, [B, L, C].
        visual: bool [B, L].
        real: bool [B, L]; None: all are.
        packed: see :meth:`Doorway.entering`.
        answer: likewise.

    Raises:
        ValueError: documents are packed into one row.
    """
    if packed is not None:
        raise ValueError(
            "several documents are packed into one row, and a method of the connector stage asks for the text of each: use a "
            "method that does without, or pass each document as a row of its own with an attention_mask"
        )
    words = ~visual if real is None else ~visual & real
    words[:, words.shape[1] - answer :] = False
    rows = [row[own] for row, own in zip(x.detach(), words, strict=True)]
    return pad_sequence(rows, batch_first=True)


def _without(state: LayerState, gone: Tensor, left: tuple[int, ...]) -> LayerState:
    """The state without the visual tokens that the encoder dropped: gone [B, L], ``left[b]`` visual tokens stay in row b."""
    here = ~state.of_candidates(gone.unsqueeze(-1)).squeeze(-1)
    valid = state.candidates.valid
    after, _ = state.after(Selection.from_mask(here if valid is None else here & valid, left))
    return after
