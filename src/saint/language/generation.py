"""Ways to generate in which a prompt is not one forward.

Pieces of a prompt (``prefill_chunk_size``): what leaves in front of the language model is decided on for the whole prompt. Under
a language stage, which would decide for each piece alone, the prompt runs in one. Drafts (assisted decoding) stand behind the
prompt in its forward, and are none of it. Engines with a cache of their own run forwards that no plan sees as prompts.

Letters: B samples, L positions of the prompt.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from torch import Tensor, nn

from ..patch import override
from ..upstream.names import BATCHING, CACHE, DRAFTS, GENERATE, PIECE, PREFILL, PerClass
from .doorway import Doorway, Pieces

Whole = Callable[[Tensor, dict[str, Any]], Pieces | None]


def watch(stack: ExitStack, root: nn.Module, door: Doorway, whole: Whole) -> None:
    """Patch the models in ``root`` that generate; ``stack`` undoes it.

    Args:
        stack: takes the undo.
        root: the user's model.
        door: of its language model.
        whole: decides on a whole prompt, given the token ids [B, L] and the arguments of the model; None: it enters as it is.
    """
    wraps = [
        (PREFILL, lambda original: _prefill(original, door, whole)),
        (DRAFTS, lambda original: _drafts(original, door)),
        (GENERATE, lambda original: _generate(original, door)),
        *((role, _refused) for role in BATCHING),
    ]
    # asked of the class: what a wrapper hands on to the model inside it is replaced there
    methods = PerClass(lambda cls: [(name, wrap) for role, wrap in wraps if (name := role.of(cls)) is not None])
    for module in root.modules():
        for name, wrap in methods[type(module)]:
            override(stack, module, name, wrap)


def _prefill(original: Callable[..., Any], door: Doorway, whole: Whole) -> Callable[..., Any]:
    def prefill(
        input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        size, cache = PIECE.get(generation_config), CACHE.read(model_kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        ids = input_ids[:, past:]
        if size is None or ids.shape[1] <= size:
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if door.decoder is not None and door.decoder.drops:
            warnings.warn(
                f"the prompt of {ids.shape[1]} tokens runs in one piece and not in pieces of {PIECE}={size}: the language stage "
                "chooses among all tokens of a prompt; to save memory, drop in front of the language model (vision and connector "
                "stages)",
                stacklevel=2,
            )
            generation_config = copy.copy(generation_config)
            setattr(generation_config, str(PIECE), None)
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        pieces = whole(ids, model_kwargs)
        if pieces is None:
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        door.handover.pieces = pieces
        try:
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            door.handover.pieces = None

    return prefill


def _generate(original: Callable[..., Any], door: Doorway) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        with door.handover.prompting(door.handover.prompt):
            return original(*args, **kwargs)

    return generate


def _drafts(original: Callable[..., Any], door: Doorway) -> Callable[..., Any]:
    def drafts(generation_config: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        door.handover.prompt = input_ids.shape[1]
        return original(generation_config, input_ids, *args, **kwargs)

    return drafts


def _refused(original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{getattr(original, '__name__', 'continuous batching')} runs prompts in an engine of its own, whose paged cache and "
            "packed rows a plan does not reach: use generate, or the plug-in for vLLM (saint serve)"
        )

    return refuse
