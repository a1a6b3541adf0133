"""vLLM's models, with a picture's features shortened behind the projector. Classes are made when vLLM asks for them, by name."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...session import Session
from . import budget, names, positions, selection, tower
from .budget import FIELD, Choice
from .processor import factories

logger = logging.getLogger(__name__)


class PruningModel:
    """In front of the class of a model."""

    architecture: str  # of the checkpoint

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if names.encoder_graphs_off(vllm_config):
            logger.warning("CUDA graphs of the encoder, which would run past the selection of tokens, are off")
        if budget.vision() and names.in_parallel(vllm_config):
            raise ValueError(
                "vLLM cannot follow the vision stage of a plan with tensor parallelism: each process would choose by the keys "
                "of its own heads; start it with --tensor-parallel-size 1, or give a connector stage"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._tower: Session | None = None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features per picture; those that come with a choice are shortened."""
        # by now weights are loaded, on which the halves of blocks are proved
        if self._tower is None and budget.vision():
            self._tower = tower.prune(self, type(self).architecture, budget.vision())  # type: ignore[arg-type]
        choices = [Choice.unpacked(one) for one in kwargs.pop(FIELD, ())]
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return self._shortened(list(features), choices, kwargs) if features is not None else features

    def _shortened(self, features: list[Tensor], choices: Sequence[Choice], kwargs: dict[str, Any]) -> list[Tensor]:
        if not choices:
            return features
        kept = selection.indices(features, choices)
        return [one[index] for one, index in zip(features, kept, strict=True)]


class GridModel(PruningModel):
    """In front of the class of a model whose positions are rows and columns (M-RoPE)."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._channels = names.channels(vllm_config)
        # vLLM's own pruning of videos recomputes all positions; the processor then refuses to prune pictures
        self._exact = not names.prunes_videos(vllm_config.model_config.multimodal_config)
        if self._exact and (reason := names.features_leave(vllm_config)) is not None:
            logger.warning("survivors of a picture get evenly spaced positions instead of their own: %s", reason)
            self._exact = False
        self._last = names.last_position(self)
        # written in front of a forward and read in it, which may be replayed from a CUDA graph: one buffer, rows and columns
        self._moves = torch.zeros(2, names.most_tokens(vllm_config), dtype=torch.int64)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, L] in the unpruned prompt, and how far the next token stands from number L."""
        features = sorted(mm_features, key=names.offset)
        items = [(names.offset(one), names.field(one, FIELD)) for one in features]
        choices = [(offset, None if data is None else Choice.unpacked(data)) for offset, data in items]
        whole, begins, places = positions.unpruned(input_tokens, choices)
        moved = [names.moved(one, begin) for one, begin in zip(features, begins, strict=True)]
        laid, delta = super().get_mrope_input_positions(whole, moved)  # type: ignore[misc]
        return laid[:, places], delta + len(whole) - len(input_tokens)

    def _shortened(self, features: list[Tensor], choices: Sequence[Choice], kwargs: dict[str, Any]) -> list[Tensor]:
        moves = [one.new_zeros(len(one), positions.CHANNELS) for one in features]  # [N, 4]
        if choices:
            # behind the channels that enter the language model stand those of DeepStack, for layers further up
            kept = selection.indices([one[:, : self._channels] for one in features], choices)
            widths = names.widths(self, kwargs)
            features = [one[index] for one, index in zip(features, kept, strict=True)]
            each = zip(kept, choices, widths, strict=True)
            moves = [positions.packed(positions.moves(*one)) for one in each]  # [K, 4]
        if not self._exact:
            return features
        return [torch.cat([one, move.to(one)], 1) for one, move in zip(features, moves, strict=True)]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings [T, C] of the next forward; notes what its survivors have to move."""
        if self._exact and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            tails = torch.cat([one[:, -positions.CHANNELS :] for one in multimodal_embeddings])  # [survivors, 4]
            there = self._moves[:, : len(is_multimodal)]  # [2, T]
            there.masked_scatter_(is_multimodal.to(there.device), positions.unpacked(tails).T.contiguous())
            multimodal_embeddings = [
                names.same_modality(one, one[:, : -positions.CHANNELS]) for one in multimodal_embeddings
            ]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own, on positions [3, T] to which the moves are added."""
        # in place: CUDA graphs of the language model read the runner's buffer, which it fills again for each forward
        positions[1:] += self._moves[:, : positions.shape[1]]
        positions.clamp_(max=self._last)  # the unpruned prompt may be longer than all that the model has positions for
        self._moves.zero_()
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _made(architecture: str) -> type:
    base = names.model_class(architecture)
    front = GridModel if names.on_grid(base) else PruningModel
    cls = type(
        base.__name__, (front, base), {"__module__": __name__, "__doc__": base.__doc__, "architecture": architecture}
    )
    parts = factories(base, architecture)
    register = names.processor_registry().register_processor
    return register(parts["processor"], info=parts["info"], dummy_inputs=parts["dummy_inputs"])(cls)


def __getattr__(name: str) -> Any:
    if name in names.ARCHITECTURES:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
