"""A language model without images: which tokens of a prompt are the candidates of its language stage.

Letters: B batch, L positions of the forward.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..patch import Uncopyable
from ..upstream.decoders import TEXT
from ..upstream.names import CACHE, EMBEDDINGS, IDS, MASK, Parameters

if TYPE_CHECKING:  # imports transformers
    from .decoder import Handover, PrunedDecoder


def find(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The decoder of a language model without images as (dotted path, module): ``model`` itself, or what it puts a head for the
    next token or one answer on, also inside wrappers of torch and PEFT; None when it is none.

    Exact classes: what else holds such a decoder, or is derived from one, may bring images.
    """
    found = _inside(model)
    return None if found is None or found[2] else found[:2]


def held(model: nn.Module) -> str:
    """The decoder inside a module that is not understood, what it is and what to do, for messages; "" where there is none."""
    found = _inside(model)
    if found is None or not found[2]:
        return ""
    path, decoder, holder = found
    return (
        f"{holder} holds a language model at {path} ({title(decoder)}), and may bring images or read every token, of which some "
        f"are missing then: where it does not, pass the part, saint.apply(model.{path}, ...); "
    )


def title(decoder: nn.Module) -> str:
    """Of the language model in :data:`TEXT`."""
    return TEXT[_name(decoder)]


def _inside(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """The outermost decoder, and the class of a module around it that is not understood ("" where all are)."""
    for path, module in model.named_modules():
        if _name(module) in TEXT:
            names = path.split(".") if path else []
            holders = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
            return path, module, next((type(h).__name__ for h in holders if not _hands_on(h, module)), "")
    return None


def _hands_on(holder: nn.Module, decoder: nn.Module) -> bool:
    """Whether a module calls the decoder inside it on one prompt, and reads the last token or every row as it comes."""
    if type(holder).__module__.startswith(_WRAPPERS):
        return not getattr(getattr(holder, "active_peft_config", None), "is_prompt_learning", False)  # adds tokens
    cls = _class(holder)
    head = cls.__name__.endswith(_HEADS) and cls.__module__ == _class(decoder).__module__
    return head and getattr(holder, str(holder.base_model_prefix), None) is decoder


_WRAPPERS = ("peft.", "torch.nn.parallel.", "torch.distributed.")
_HEADS = ("ForCausalLM", "ForSequenceClassification")


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fully_shard`` derived another one from it."""
    return next(c for c in type(module).__mro__ if not any(base.__name__ == "FSDPModule" for base in c.__mro__))


def _name(module: nn.Module) -> str:
    return f"{_class(module).__module__}.{_class(module).__qualname__}"


def candidates(mask: Tensor) -> Tensor:
    """All real tokens but the first and the last of each prompt: mask [B, L], not 0 where a token is real -> bool [B, L]."""
    real = mask.bool()
    before, behind = real.cumsum(1) > 1, real.flip(1).cumsum(1).flip(1) > 1
    return real & before & behind


class PrunedText(Uncopyable):
    """Tells the pruned decoder which tokens of a prompt are candidates; the counterpart of ``vlm.model.PrunedVLM``.

    A prompt is a forward that fills an empty cache, or has none; forwards on a filled cache add tokens that all stay.

    Args:
        model: the decoder.
        decoder: the language stage.
        handover: between this and the decoder.
    """

    def __init__(self, model: nn.Module, decoder: "PrunedDecoder", handover: "Handover") -> None:
        self.model, self.decoder, self.handover = model, decoder, handover
        self.parameters = Parameters(type(model).forward)

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        # registered before the decoder's own hook, so it runs first
        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self.decoder.install(stack)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handover.visual = None
        given = self.parameters.named(args, kwargs)
        cache, mask, embedded = CACHE.read(given), MASK.read(given), EMBEDDINGS.read(given)
        tokens = IDS.read(given) if embedded is None else embedded[..., 0]
        if tokens is None or (cache is not None and cache.get_seq_length()):
            return
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
            shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{MASK} must be [B, L] = {tuple(tokens.shape)}, which shows the first and last token of each prompt, got {shown}"
            )
        found = candidates(torch.ones_like(tokens) if mask is None else mask)
        if tokens.shape[1] > 2:
            self.handover.visual = found.to(tokens.device)
