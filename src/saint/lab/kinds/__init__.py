"""The only rooms that know which kind of model a command works on; all others ask its :class:`Subject`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from torch import nn

from .encoder import Encoder as Encoder
from .subject import COSINE as COSINE
from .subject import KL as KL
from .subject import Given as Given
from .subject import Inputs as Inputs
from .subject import Subject as Subject
from .text import Text as Text
from .vlm import DEMO as DEMO
from .vlm import VLM as VLM

_KINDS: tuple[type[Subject], ...] = (Text, VLM, Encoder)  # the first that a model is of
SEEING = (Encoder.gives, VLM.gives)


@overload
def kind_of(spec: str, gives: Literal["answers"]) -> type[VLM]: ...
@overload
def kind_of(spec: str, gives: Literal["embeddings"]) -> type[Encoder]: ...
@overload
def kind_of(spec: str, gives: str | Sequence[str] = SEEING) -> type[Subject]: ...
def kind_of(spec: str, gives: str | Sequence[str] = SEEING) -> type[Subject]:
    """Return the kind of the model called ``spec``; of several, its config tells (no weights are read).

    Args:
        spec: what the user typed.
        gives: what models may give: "embeddings", "answers", "next tokens"; or several of these.

    Raises:
        DownloadError: the config cannot be fetched.
    """
    gives = (gives,) if isinstance(gives, str) else gives
    kinds = [kind for kind in _KINDS if kind.gives in gives]
    if len(kinds) == 1:
        return kinds[0]
    return next(kind for kind in kinds if kind.named(spec))


def around(model: nn.Module) -> Subject:
    """Return a subject around a model that is there; what is of no other kind is taken for an encoder."""
    return next(kind.around(model) for kind in _KINDS if kind.holds(model))


def answering(model: nn.Module, processor: Any) -> VLM:
    """Return the subject of a model that is there, with its processor: it answers questions."""
    return replace(VLM.around(model), processor=processor)
