"""A pruned vision-language model: tells the pruned decoder which tokens are visual and which the encoder dropped.

Outside, everything keeps its full length: pixel counts, placeholders in ``input_ids``, ``attention_mask``, positions. Inside,
features that the encoder dropped travel as marked rows (``tokens.DROPPED``) from the connector to the front of the language
model, whatever the model does with them on the way (unpadding, tiles, newlines), and are removed there.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, ParityError, UnsupportedModelError
from ..gathers import DROPPED, full_length, is_dropped
from ..language.cache import filled
from ..language.doorway import Doorway, Handover, Note, Pieces
from ..language.generation import watch
from ..patch import Uncopyable, override
from ..tokens import reads_are_free
from ..upstream.names import (
    AUDIO_TOKEN,
    CACHE,
    DEEPSTACK_FEATURES,
    EMBEDDINGS,
    ENCODED,
    IDS,
    IMAGE_FEATURES,
    IMAGE_TOKEN,
    MASK,
    POOLED,
    VIDEO_FEATURES,
    VIDEO_TOKEN,
    Parameters,
)
from ..upstream.specs import FamilySpec
from ..upstream.verify import merge_method
from ..vision.encoder import PrunedEncoder
from .glances import Glances
from .merged import Known, tensors
from .videos import Videos


class PrunedVLM(Uncopyable):
    """The glue between the stages of one model.

    Args:
        path: where the model sits in the user's, for messages.
        model: the module of the family's spec.
        spec: what is known of the family.
        door: of the language model, with the connector and language stages.
        encoder: the vision stage, or None.
        features: index into the encoder's hidden states (0 = embeddings) of those that the model uses; None: nothing is
            dropped in front of them.
        handover: between this and the door.
        root: the user's model, which holds ``model``.
        glances: what methods of the connector stage ask of the encoder; None: nothing.

    Raises:
        ValueError: the encoder drops behind the features that the model uses.
    """

    def __init__(
        self,
        path: str,
        model: Any,
        spec: FamilySpec,
        door: Doorway,
        encoder: PrunedEncoder | None,
        features: int | None,
        handover: Handover,
        root: nn.Module,
        glances: Glances | None = None,
    ) -> None:
        self.path, self.model, self.spec, self.door, self.encoder = path, model, spec, door, encoder
        self.features, self.handover = features, handover
        self.patched, self.alone = root, None
        self.marked = (model,) if encoder is None else (model, encoder.module)
        self.stacks = door.stacks if encoder is None else (encoder, *door.stacks)
        self.known = Known()
        handover.complete, self.glances = self._complete, glances
        if glances is not None:
            handover.recall = glances.recall
        self.proved = False  # features were seen to be of the groups that they should be of
        self.parameters = Parameters(type(model).forward)
        self.merge, self.merges = merge_method(model)
        self.videos = Videos(model, spec) if door.wants_frames and spec.clips is not None else None
        points = () if encoder is None else encoder.points.values()
        last = max((point.layer for point in points if point.method is not None), default=-1)
        if features is not None and last >= features:
            raise ValueError(
                f"layer {last} of the vision stage lies behind the features that {type(model).__name__} "
                f"uses, those of layer {features - 1}: name layers < {features}"
            )

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        override(stack, self.model, self.merge, self._listen)
        self._install_behind(stack)
        for role in (IMAGE_FEATURES, VIDEO_FEATURES):
            if (method := role.of(self.model)) is not None:
                override(stack, self.model, method, self._computed)
        if self.spec.connector:
            connector = self.model.get_submodule(self.spec.connector)
            stack.callback(connector.register_forward_hook(self._connected).remove)
        if self.videos is not None:
            override(stack, self.model, self.videos.method, self.videos.encode)
        self.door.install(stack)
        if self.glances is not None:
            stack.callback(self.glances.forget)
        watch(stack, self.patched, self.door, self._whole)
        if self.encoder is not None:
            self.encoder.install(stack)

    def _install_behind(self, stack: ExitStack) -> None:
        """Patch what reads the encoder; ``stack`` undoes it."""
        if self.encoder is None or self.features is None or not self.spec.connector:
            return  # nothing is dropped in front of it, or the method that computes features stands for it
        wrap = self._connect if self.encoder.merge_size is None else self._join
        override(stack, self.model.get_submodule(self.spec.connector), "forward", wrap)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.parameters.named(args, kwargs)
        encoded, mask, embedded = ENCODED.read(given), MASK.read(given), EMBEDDINGS.read(given)
        images = any(pixels.read(given) is not None for pixels in self.spec.pixels)
        self.handover.new(
            ids=IDS.read(given),
            mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            brings=images or bool(encoded),
            plain=embedded is None or images or bool(encoded),
            waiting=images,
        )
        if self.videos is not None:
            self.videos.begin(given)
        if self.encoder is None or images or encoded or embedded is not None or self.handover.pieces is not None:
            return
        if not filled(CACHE.read(given)):
            self.encoder.forwards.begin()  # a new prompt without images

    def _computed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of a method that computes features: notes them for a caller who merges them himself."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if self.encoder is not None and self.features is not None:
                output = output if self.spec.connector else self._joined(output)
                output = output if self.encoder.outputs.lost(self.features) is None else closed(output)
            if self.glances is not None:
                self.glances.note(tensors(POOLED.get(output, output)), packs=bool(self.spec.connector))
            if not self.handover.note.plain:
                self.known.note(POOLED.get(output, output))
            return output

        return compute

    def _connected(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.glances is not None:
            self.glances.note(tensors(output))
        if not self.handover.note.plain:
            self.known.note(output)

    def _listen(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def merge(*args: Any, **kwargs: Any) -> Any:
            masks: Any = placeholders(self.model, *args, **kwargs) if self.merges else None
            result = original(*args, **kwargs)
            note = self.handover.note
            if not note.brings:  # some models ask in every step where features would go
                return result
            masks = result if masks is None else masks
            for mask in masks if isinstance(masks, tuple) else (masks,):
                if mask is not None:
                    seen = mask[..., 0] if mask.ndim == 3 else mask  # [B, L]
                    note.visual = seen if note.visual is None else note.visual | seen
            if self.videos is not None:
                self.videos.see(masks[1][..., 0])
            note.marked = self.encoder is not None
            note.waiting = self.known.waiting = False
            return result

        return merge

    def _complete(self, note: Note, given: Mapping[str, Any]) -> None:
        """In front of the language model: where its visual tokens are, however they were merged."""
        if note.waiting:
            raise HookNeverFiredError(
                f"{type(self.model).__name__} was given images and did not call {self.merge}, so nothing shows where its "
                "visual tokens are; this version of the model merges them differently"
            )
        if note.visual is not None and note.ids is not None:
            heard = AUDIO_TOKEN.get(self.model.config)
            if heard is not None:  # features of sounds are merged likewise
                note.visual = note.visual & (note.ids != heard).to(note.visual.device)
        if note.visual is None and not note.plain:
            self._find(note, EMBEDDINGS.read(given))
        if self.videos is not None:
            note.cells = self.videos.cells()

    def _find(self, note: Note, x: Tensor | None) -> None:
        """The visual tokens of a sequence that others have merged: by its token ids, or by what its rows hold."""
        if x is None:
            return
        tokens = [token for role in (IMAGE_TOKEN, VIDEO_TOKEN) if (token := role.get(self.model.config)) is not None]
        if note.ids is not None and note.ids.shape == x.shape[:2]:
            found = torch.isin(note.ids, torch.tensor(tokens, device=note.ids.device)).to(x.device)
        elif x.shape[1] > 1:
            found = self.known.among(x)
        else:
            return
        lost = is_dropped(x) if self.encoder is not None else torch.zeros_like(found)
        if bool(found.any()):
            note.visual, note.marked, self.known.waiting = found | lost, self.encoder is not None, False
            return
        chooses = self.door.entries or self.door.decoder is not None
        if bool(lost.any()) and not chooses:
            note.visual, note.marked = lost, True
        elif bool(lost.any()) or self.known.waiting:
            self.known.waiting = False
            raise HookNeverFiredError(
                f"{type(self.model).__name__} computed image features, and {self.door.path} was given embeddings in which none "
                "of them is found, so its visual tokens are not known: merge the features as they are, give input_ids beside "
                "the embeddings, or let the model merge them (pixel_values or mm_encoder_outputs)"
            )

    def _whole(self, ids: Tensor, given: dict[str, Any]) -> Pieces | None:
        """Decide which places of a prompt enter the language model when features of its pieces come computed: ids [B, L]."""
        encoded = ENCODED.read(given) or {}
        token = {"image": IMAGE_TOKEN.get(self.model.config), "video": VIDEO_TOKEN.get(self.model.config)}
        rows = {
            kind: torch.cat([*tensors(POOLED.get(output))]) for kind, output in encoded.items() if output is not None
        }
        if not rows or (self.encoder is None and not self.door.entries):
            return None
        some = next(iter(rows.values()))
        visual = torch.zeros(ids.shape, dtype=torch.bool, device=some.device)
        x = some.new_zeros(*ids.shape, some.shape[-1])  # [B, L, C]
        for kind, features in rows.items():
            places = (ids == token[kind]).to(some.device)
            x[places] = features.flatten(0, -2).to(x)
            visual |= places
        note = Note(visual=visual, marked=self.encoder is not None)
        if self.videos is not None:
            self.videos.begin({str(ENCODED): encoded})
            self.videos.see((ids == token["video"]).to(some.device))
            note.cells = self.videos.cells()
        state, _, changed = self.door.entering(visual, x, note)
        return Pieces(state.tokens.here, changed, visual)

    def _connect(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The connector sees the survivors; what it returns has full length, marked where a token was dropped."""

        def connect(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            encoder = self.encoder
            assert encoder is not None
            y = original(x, *args, **kwargs)
            features = self.features
            assert features is not None
            state = encoder.forward.states.get(features)
            if state is None or state.tokens.nothing_dropped:
                return y
            tokens = state.tokens
            head = y.shape[1] - tokens.slots
            if y.shape[0] != tokens.index.shape[0] or head not in (0, encoder.prefix):
                raise ValueError(
                    f"the connector of {type(self.model).__name__} returned features of shape {tuple(y.shape)} for "
                    f"{tokens.slots} survivors of the vision stage; vision_feature_layer must stay {features}"
                )
            if reads_are_free(y.device) and bool(torch.isnan(y).any()):
                raise ValueError("image features are NaN: check the pixels for NaN or Inf, and fp16 overflow")
            return full_length(y, tokens, head, DROPPED)  # [B, P + N, C] or [B, N, C]

        return connect

    def _join(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Show full length to what is behind the encoder; a row it returns is of kept patches, or of dropped ones and marked."""

        def join(*args: Any, **kwargs: Any) -> Any:
            return self._joined(original(*args, **kwargs))

        return join

    def _joined(self, output: Any) -> Any:
        encoder = self.encoder
        assert encoder is not None
        assert self.features is not None
        lost = encoder.outputs.lost(self.features)
        if lost is None:
            return output
        rows = list(tensors(POOLED.get(output, output)))  # [..., C] each
        self._check(rows, lost)
        return mark_rows(output, lost)

    def _check(self, rows: list[Tensor], lost: Tensor) -> None:
        """Refuse features that are not those of the groups: ``lost`` tells which were dropped."""
        encoder, name = self.encoder, type(self.model).__name__
        assert encoder is not None
        side = encoder.merge_size or 1
        if lost.numel() != sum(row[..., 0].numel() for row in rows):
            raise ParityError(
                f"{name} made features of shapes {', '.join(str(tuple(row.shape)) for row in rows)} of {lost.numel()} groups of "
                f"{side} x {side} patches"
            )
        if self.proved and not reads_are_free(rows[0].device):
            return  # modules do not change between forwards
        holes = torch.cat([torch.isnan(row).any(-1).flatten() for row in rows])
        lost = lost.to(holes.device)
        if bool((holes & ~lost).any()):
            raise ValueError(
                "image features are NaN: check the pixels for NaN or Inf, and fp16 overflow; if they are fine, this version "
                f"of {name} joins patches of different groups"
            )
        if torch.is_grad_enabled():
            return  # dropped rows hold numbers
        marked = torch.cat([is_dropped(row).flatten() for row in rows])  # one such method may call another
        if bool((lost & ~holes & ~marked).any()):
            raise ParityError(
                f"{name} joins other patches than groups of {side} x {side}: its library may have changed"
            )
        self.proved = True


def mark_rows(output: Any, lost: Tensor) -> Any:
    """Mark the rows of dropped groups in features, and in those for later layers, which are 0 there.

    Args:
        output: rows [..., C], those of each picture, or what holds them.
        lost: bool [groups].
    """

    def marked(value: Any, fill: float, gone: Tensor = lost) -> Any:
        if isinstance(value, Tensor):
            return value.masked_fill(gone.to(value.device).view(*value.shape[:-1], 1), fill)
        own = gone.split([one[..., 0].numel() for one in value])
        return type(value)(marked(one, fill, some) for one, some in zip(value, own, strict=True))

    field = POOLED.of(output)
    if field is None:
        return marked(output, DROPPED)
    setattr(output, field, marked(getattr(output, field), DROPPED))
    deep = DEEPSTACK_FEATURES.of(output)
    if deep is not None and getattr(output, deep) is not None:
        features = getattr(output, deep)
        setattr(output, deep, type(features)(marked(one, 0.0) for one in features))
    return output


def closed(output: Any) -> Any:
    """An output of a model without holes: rows of NaN, which show what is behind the encoder where tokens went, are marked.

    Not of its features, whose dropped rows are marked already: a NaN of any other stays one.
    """
    if torch.is_grad_enabled() or not isinstance(output, Mapping):
        return output  # there are none

    def filled_in(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(filled_in(one) for one in value)
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return torch.nan_to_num(value, DROPPED, torch.inf, -torch.inf) if floats else value

    for name, value in output.items():
        if name not in POOLED.spellings:
            output[name] = filled_in(value)  # type: ignore[index]
    return output


def read_features(model: Any, spec: FamilySpec, depth: int) -> int:
    """Index into the tower's ``depth + 1`` hidden states (0 = embeddings) of the features that the model uses.

    Raises:
        UnsupportedModelError: it uses those of several layers.
    """
    layer = spec.feature_layer(model, depth)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} joins the features of several layers of its tower "
            f"(vision_feature_layer={model.config.vision_feature_layer}), which would hold different tokens; use the "
            "connector or language stage"
        )
    return layer


def placeholders(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return where the image placeholders are, bool [B, L], as the merging method finds them."""
    token = IMAGE_TOKEN.get(model.config)
    if input_ids is not None:
        return (input_ids == token).to(inputs_embeds.device)
    embedding = model.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
    return (inputs_embeds == embedding).all(-1)
