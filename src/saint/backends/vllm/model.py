"""vLLM's models, with a picture's features shortened behind the projector. Classes are made when vLLM asks for them, by name."""

import functools
import logging
from typing import Any

from . import names, selection
from .budget import FIELD
from .processor import factories

logger = logging.getLogger(__name__)


class PruningModel:
    """In front of the class of a model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if names.encoder_graphs_off(vllm_config):
            logger.warning("CUDA graphs of the encoder, which would run past the selection of tokens, are off")
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features per picture; those that come with a choice are shortened."""
        packed = kwargs.pop(FIELD, None)
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return features if packed is None else selection.prune(list(features), list(packed))


@functools.cache
def _made(architecture: str) -> type:
    base = names.model_class(architecture)
    cls = type(base.__name__, (PruningModel, base), {"__module__": __name__, "__doc__": base.__doc__})
    parts = factories(base)
    register = names.processor_registry().register_processor
    return register(parts["processor"], info=parts["info"], dummy_inputs=parts["dummy_inputs"])(cls)


def __getattr__(name: str) -> Any:
    if name in names.ARCHITECTURES:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
