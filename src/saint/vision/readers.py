"""Who reads the rows of an encoder's tokens inside a model: what they must be given, and what cannot be given to them.

Letters: B batch, S rows, C channels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..gathers import DROPPED, is_dropped
from ..patch import override
from ..upstream import registry
from ..upstream.names import SEEN_MASK, SEEN_STATES, Parameters
from ..upstream.specs import EncoderSpec, ReaderSpec, part
from .locate import lineage


class Reader(NamedTuple):
    """A module around an encoder that reads rows of its tokens, and what is known of its class."""

    module: nn.Module
    spec: ReaderSpec

    def install(self, stack: ExitStack) -> None:
        """Hide rows of padding, which are marked, from a decoder that attends to them; ``stack`` undoes it."""
        if self.spec.decoder is None:
            return
        projection = part(self.module, self.spec.projection) if self.spec.projection else None
        if projection is not None:
            override(stack, projection, "forward", _marks_travel)
        decoder = self.module.get_submodule(self.spec.decoder)
        stack.callback(decoder.register_forward_pre_hook(_hide, with_kwargs=True).remove)


def around(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the one at ``path``, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def find_reader(model: nn.Module, path: str) -> Reader | None:
    """The known reader around the encoder at ``path`` of ``model``."""
    readers = registry.readers()
    for _, module in around(model, path):
        spec = next((readers[name] for name in lineage(type(module)) if name in readers), None)
        if spec is not None:
            return Reader(module, spec)
    return None


def check_readers(
    model: nn.Module, path: str, spec: EncoderSpec, reader: Reader | None, output: str, ragged: bool
) -> None:
    """Refuse what a reader of survivors could not take.

    Args:
        model: holds the encoder.
        path: of the encoder.
        spec: what is known of its class.
        reader: of its rows, see :func:`find_reader`.
        output: see :class:`saint.Stage`.
        ragged: samples may keep different numbers of tokens.

    Raises:
        UnsupportedModelError: another output is needed, or budgets that are numbers.
    """
    if output != "survivors" or "forward" in spec.dense_calls:
        return
    if reader is not None:
        if reader.spec.needs is not None:
            raise UnsupportedModelError(
                f'{type(reader.module).__name__} cannot read survivors alone: {reader.spec.needs}; give output="similar"'
            )
        return
    if ragged and (found := _attends(model, path)):
        raise UnsupportedModelError(
            f"{found} attends to tokens of another sequence, and no mask would hide padding from it where samples keep "
            'different numbers of tokens: give a number or a fraction as keep (and no guard), or output="similar". If it does '
            f"not read this encoder, pass the encoder alone (model.{path})"
        )


def _attends(model: nn.Module, path: str) -> str:
    """A module beside the encoder at ``path`` that attends to another sequence, as "path (class)"; "" where there is none."""
    for place, module in model.named_modules():
        if place == path or place.startswith(f"{path}.") or path.startswith(f"{place}.") or not place:
            continue
        decodes = isinstance(module, nn.TransformerDecoder | nn.TransformerDecoderLayer)
        if not decodes and getattr(getattr(module, "config", None), "is_decoder", False):
            parameters = Parameters(type(module).forward)
            decodes = parameters.has(SEEN_STATES) and parameters.has(SEEN_MASK)
        if decodes:
            return f"{place} ({type(module).__name__})"
    return ""


def _marks_travel(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def project(x: Tensor) -> Tensor:
        return original(x).masked_fill(is_dropped(x).unsqueeze(-1), DROPPED)

    return project


def _hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parameters = Parameters(type(module).forward)
    given = parameters.named(args, kwargs)
    rows, mask = SEEN_STATES.read(given), SEEN_MASK.read(given)
    if rows is None:
        return None
    real = (~is_dropped(rows)).to(rows.dtype if mask is None else mask.dtype)  # [B, S]
    return (), parameters.put(given, SEEN_MASK, real if mask is None else mask * real)
