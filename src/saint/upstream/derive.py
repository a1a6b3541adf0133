"""A family that no spec was written for, read off the instance.

What tells a vision-language model is the method that says where features go in a prompt. The rest transformers says itself: the
decoder (``get_decoder``) and the tower (``get_encoder``).
Nothing here is proved: :mod:`saint.admission` does that.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .names import (
    CACHE,
    DECODER,
    EMBEDDINGS,
    ENCODER,
    IMAGE_PATCHES,
    LAYERS,
    MERGER,
    PIXELS,
    PLACEHOLDER_MASK,
    SEEN_STATES,
    Parameters,
    Role,
)
from .specs import FamilySpec

_NO_VISION = "its tower is not understood; use the connector or language stage"


MERGES = (*PLACEHOLDER_MASK.spellings, *MERGER.spellings)  # methods of a module that merges features into text


def derive(candidates: Iterable[tuple[str, nn.Module]]) -> tuple[str, nn.Module, FamilySpec] | None:
    """The first of modules with such a method that merges features into text, as (dotted path, module, spec); None: none does.

    Args:
        candidates: with their dotted paths, the outermost first.
    """
    for path, module in candidates:
        decoder = _decoder(module)
        if decoder is not None:
            return path, module, _family(module, decoder)
    return None


def _decoder(module: Any) -> str | None:
    """Path of the module that owns the layers of the language model and takes embeddings."""
    if not Parameters(type(module).forward).has(CACHE):
        return None  # one that generates with its language model alone
    find = DECODER.get(module)
    decoder = None if find is None else find()
    while decoder is not None and decoder is not module and LAYERS.of(decoder) is None:
        # behind a head for the next token
        decoder = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
    if decoder is None or decoder is module:
        return None
    parameters = Parameters(type(decoder).forward)
    if not (parameters.has(EMBEDDINGS) and parameters.has(CACHE)) or parameters.has(SEEN_STATES):
        return None  # one that attends to another sequence is given no features
    return _path(module, decoder)


def _path(module: nn.Module, part: nn.Module) -> str | None:
    return next((path for path, one in module.named_modules() if one is part and path), None)


def _tower(module: Any) -> str:
    find = ENCODER.get(module)
    tower = None if find is None else find(modality="image")
    return "" if tower is None or tower is module else _path(module, tower) or ""


def _family(module: nn.Module, decoder: str) -> FamilySpec:
    cls = type(module)
    names = Parameters(cls.forward).names
    return FamilySpec(
        title=cls.__name__.removesuffix("ForConditionalGeneration").removesuffix("Model"),
        model=f"{cls.__module__}.{cls.__qualname__}",
        tower=_tower(module),
        connector="",
        decoder=decoder,
        pixels=tuple(Role(name) for name in names if str(PIXELS) in name or name in IMAGE_PATCHES.spellings),
        no_vision=_NO_VISION,
        library=cls.__module__.partition(".")[0],
        derived=True,
    )
