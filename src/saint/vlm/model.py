"""A pruned vision-language model: tells the pruned decoder which tokens are visual and which the encoder dropped.

Outside, everything keeps its full length: pixel counts, placeholders in ``input_ids``, ``attention_mask``, positions. Inside,
features that the encoder dropped travel as marked rows (``tokens.DROPPED``) from the connector to the front of the language
model, whatever the model does with them on the way (unpadding, tiles, newlines), and are removed there.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, ParityError, UnsupportedModelError
from ..gathers import DROPPED, full_length, is_dropped
from ..language.decoder import Handover, PrunedDecoder
from ..patch import Uncopyable, override
from ..tokens import reads_are_free
from ..upstream.names import CACHE, ENCODED, IMAGE_TOKEN, Parameters
from ..upstream.specs import FamilySpec
from ..upstream.verify import merge_method
from ..vision.encoder import PrunedEncoder
from .videos import Videos


class PrunedVLM(Uncopyable):
    """The glue between the stages of one model.

    Args:
        path: where the model sits in the user's, for messages.
        model: the module of the family's spec.
        spec: what is known of the family.
        decoder: the language and connector stages.
        encoder: the vision stage, or None.
        mergers: paths of the modules that read the tower, the connector first, and the map of the encoder that each reads.
        handover: between this and the decoder.

    Raises:
        ValueError: the encoder drops behind the features that the model uses.
    """

    def __init__(
        self,
        path: str,
        model: Any,
        spec: FamilySpec,
        decoder: PrunedDecoder,
        encoder: PrunedEncoder | None,
        mergers: dict[str, int],
        handover: Handover,
    ) -> None:
        self.path, self.model, self.spec, self.decoder, self.encoder = path, model, spec, decoder, encoder
        self.mergers, self.handover = mergers, handover
        self.proved: set[str] = set()  # mergers that were seen to join the groups that they should
        self.parameters = Parameters(type(model).forward)
        self.merge, self.merges = merge_method(model)
        self.videos = Videos(model, spec) if decoder.wants_frames and spec.clips is not None else None
        points = () if encoder is None else encoder.points.values()
        last = max((point.layer for point in points if point.method is not None), default=-1)
        if last >= mergers.get(spec.connector, last + 1):
            raise ValueError(
                f"layer {last} of the vision stage lies behind the features that {type(model).__name__} "
                f"uses, those of layer {mergers[spec.connector] - 1}: name layers < {mergers[spec.connector]}"
            )

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        override(stack, self.model, self.merge, self._listen)
        if self.videos is not None:
            override(stack, self.model, self.videos.method, self.videos.encode)
        # registered before the decoder's own hook, so it runs first
        text = self.decoder.module
        stack.callback(text.register_forward_pre_hook(self._check_fired).remove)
        self.decoder.install(stack)
        if self.encoder is not None:
            self.encoder.install(stack)
            if not self.mergers:  # nothing is dropped in front of them
                return
            if self.encoder.merge_size is None:
                override(stack, self.model.get_submodule(self.spec.connector), "forward", self._connect)
            else:
                for path, layer in self.mergers.items():
                    override(stack, self.model.get_submodule(path), "forward", partial(self._join, path, layer))

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handover.visual = None
        given = self.parameters.named(args, kwargs)
        self.handover.waiting = any(pixels.read(given) is not None for pixels in self.spec.pixels)
        if self.videos is not None:
            self.videos.begin(given)
        cache, encoded = CACHE.read(given), ENCODED.read(given)
        fresh = cache is None or cache.get_seq_length() == 0
        if self.encoder is not None and not self.handover.waiting and (encoded is None or not len(encoded)) and fresh:
            self.encoder.forwards.begin()  # a new prompt without images

    def _listen(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def merge(*args: Any, **kwargs: Any) -> Any:
            masks: Any = placeholders(self.model, *args, **kwargs) if self.merges else None
            result = original(*args, **kwargs)
            masks = result if masks is None else masks
            for mask in masks if isinstance(masks, tuple) else (masks,):
                if mask is not None:
                    seen = mask[..., 0] if mask.ndim == 3 else mask  # [B, L]
                    self.handover.visual = seen if self.handover.visual is None else self.handover.visual | seen
            if self.videos is not None:
                self.videos.see(masks[1][..., 0])
            self.handover.marked = self.encoder is not None
            self.handover.waiting = False
            return result

        return merge

    def _check_fired(self, _module: nn.Module, _args: Any) -> None:
        if self.handover.waiting:
            self.handover.waiting = False
            raise HookNeverFiredError(
                f"{type(self.model).__name__} was given images and did not call {self.merge}, so nothing shows where its "
                "visual tokens are; this version of the model merges them differently"
            )
        if self.videos is not None:
            self.handover.cells = self.videos.cells()

    def _connect(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The connector sees the survivors; what it returns has full length, marked where a token was dropped."""

        def connect(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            encoder = self.encoder
            assert encoder is not None
            y = original(x, *args, **kwargs)
            features = self.mergers[self.spec.connector]
            state = encoder.forward.states.get(features)
            if state is None or state.tokens.whole:
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

    def _join(self, path: str, layer: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The merger sees full length; each group it returns has all its members, or is dropped and ``mark``."""

        def join(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            encoder = self.encoder
            assert encoder is not None
            side = encoder.merge_size
            lost = encoder.outputs.lost(layer)
            # NaN shows whether a merger lets a dropped token touch a kept one, but would spoil the gradient of its weights
            shows = lost is not None and not torch.is_grad_enabled()
            y = original(x.masked_fill(is_dropped(x).unsqueeze(-1), torch.nan) if shows else x, *args, **kwargs)
            if lost is None:
                return y
            if lost.numel() != y[..., 0].numel():
                raise ParityError(
                    f"the merger of {type(self.model).__name__} returned features of shape {tuple(y.shape)} for "
                    f"{lost.numel()} groups of {side} x {side} patches"
                )
            lost = lost.reshape(y.shape[:-1]).to(y.device)
            mark = DROPPED if path == self.spec.connector else 0.0
            if path in self.proved and not reads_are_free(y.device):
                return y.masked_fill(lost.unsqueeze(-1), mark)  # modules do not change between forwards
            holes = torch.isnan(y).any(-1)
            if bool((holes & ~lost).any()):
                raise ValueError(
                    "image features are NaN: check the pixels for NaN or Inf, and fp16 overflow; if they are fine, this version "
                    f"of {type(self.model).__name__} joins patches of different groups"
                )
            if shows and bool((lost & ~holes).any()):
                raise ParityError(
                    f"{type(self.model).__name__} joins other patches than groups of {side} x {side}: its "
                    "library may have changed"
                )
            if shows:
                self.proved.add(path)
            return y.masked_fill(lost.unsqueeze(-1), mark)

        return join


def read_maps(model: Any, spec: FamilySpec, depth: int) -> dict[str, int]:
    """Paths of the modules that read the tower's hidden states, the connector first, and which (0 = embeddings).

    Raises:
        UnsupportedModelError: the connector reads several layers.
    """
    layer = spec.feature_layer(model, depth)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} joins the features of several layers of its tower "
            f"(vision_feature_layer={model.config.vision_feature_layer}), which would hold different tokens; use the "
            "connector or language stage"
        )
    return {spec.connector: layer, **spec.deepstack_mergers(model)}


def placeholders(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:
    """Where the image placeholders are, bool [B, L], as the merging method finds them."""
    token = IMAGE_TOKEN.get(model.config)
    if input_ids is not None:
        return (input_ids == token).to(inputs_embeds.device)
    embedding = model.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
    return (inputs_embeds == embedding).all(-1)
