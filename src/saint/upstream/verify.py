"""Holds the facts of a spec against an instance, before anything is touched."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .names import CACHE, EMBEDDINGS, IDS, LAYERS, MASK, MERGER, PLACEHOLDER_MASK, VIDEO_FEATURES, Parameters
from .specs import EncoderSpec, FamilySpec, part
from .versions import known_from


def _try(what: str, fact: Callable[[], Any]) -> list[str]:
    """Say what a fact that is read off the instance lacks there."""
    try:
        fact()
    except AttributeError as error:
        return [f"{what}: {error}"]
    return []


def _refuse(module: nn.Module, title: str, library: str, missing: list[str]) -> None:
    if missing:
        raise UnsupportedModelError(
            f"this {type(module).__name__} is not what saint knows as {title}: it has no {'; no '.join(missing)}. Its library "
            f"may have changed: {known_from(library)}"
        )


def verify_encoder(encoder: nn.Module, spec: EncoderSpec) -> None:
    """Raise ``UnsupportedModelError`` that names every path and method of ``spec`` that ``encoder`` lacks."""
    blocks = part(encoder, spec.blocks)
    missing = (
        []
        if isinstance(blocks, nn.Module) and next(blocks.children(), None) is not None
        else [f"{spec.blocks} (blocks)"]
    )
    rows = None if spec.rows is None else spec.rows.linear
    named = ((spec.patch, "patch embedding"), (rows, "layer that makes tokens of rows"), (spec.final, "last norm"))
    missing += [f"{path} ({use})" for path, use in named if path is not None and part(encoder, path) is None]
    if spec.order is not None and spec.order.of(encoder) is None:
        missing.append(f"method {spec.order} (shows the order of its windows)")
    missing += [f"method {name} (pools)" for name in spec.masked_pools if not hasattr(encoder, name)]
    missing += _try("protected tokens", lambda: spec.prefix(encoder))
    _refuse(encoder, spec.title, spec.library, missing)


def verify_family(model: nn.Module, spec: FamilySpec) -> None:
    """Raise ``UnsupportedModelError`` that names every path, method and argument of ``spec`` that ``model`` lacks."""
    missing = [
        f"{path} ({use})"
        for path, use in ((spec.tower, "tower"), (spec.connector, "connector"), (spec.decoder, "language model"))
        if path and part(model, path) is None
    ]
    forward = Parameters(type(model).forward)
    missing += [f"argument {name}" for name in forward.missing(CACHE, MASK, *spec.pixels)]
    decoder = part(model, spec.decoder)
    if decoder is not None:
        names = Parameters(type(decoder).forward).missing(CACHE, MASK, EMBEDDINGS)
        missing += [f"argument {name} of {spec.decoder}" for name in names]
        if LAYERS.of(decoder) is None:
            missing.append(f"{spec.decoder}.{LAYERS}")
    missing += _try("size of merged squares", lambda: spec.merge_size(model))
    missing += _try("layer of its features", lambda: spec.feature_layer(model, 1))
    missing += _try("hidden states that it reads", lambda: spec.reads(model))
    if spec.clips is not None and VIDEO_FEATURES.of(model) is None:
        missing.append(f"method {VIDEO_FEATURES}")
    if PLACEHOLDER_MASK.of(model) is None and MERGER.of(model) is None:
        missing.append(f"method {PLACEHOLDER_MASK} or {MERGER} (shows where its visual tokens are)")
    _refuse(model, spec.title, spec.library, missing)


def verify_text(decoder: nn.Module, title: str) -> None:
    """Raise ``UnsupportedModelError`` that names every argument that the ``decoder`` of a language model lacks."""
    missing = [f"argument {name}" for name in Parameters(type(decoder).forward).missing(CACHE, MASK, EMBEDDINGS, IDS)]
    _refuse(decoder, title, "transformers", missing if LAYERS.of(decoder) is not None else [*missing, str(LAYERS)])


def merge_method(model: Any) -> tuple[str, bool]:
    """The method of a verified ``model`` that learns where the placeholders are, and whether it merges features itself.

    One that does not returns the mask, or a tuple of masks (images, videos), each [B, L, 1 or C].
    """
    method = PLACEHOLDER_MASK.of(model) or MERGER.of(model)
    assert method is not None
    return method, method in MERGER.spellings
