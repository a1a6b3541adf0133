"""Finds the decoder of a language model without images."""

from torch import nn

from ..upstream.decoders import TEXT
from ..upstream.names import PerClass


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
    return TEXT[_name(type(decoder))]


def _inside(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """The outermost decoder, and the class of a module around it that is not understood ("" where all are)."""
    names_of = PerClass(_name)
    for path, module in model.named_modules():
        if names_of[type(module)] in TEXT:
            names = path.split(".") if path else []
            holders = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
            return path, module, next((type(h).__name__ for h in holders if not _hands_on(h, module)), "")
    return None


def _hands_on(holder: nn.Module, decoder: nn.Module) -> bool:
    """Tell whether a module calls the decoder inside it on one prompt, and reads the last token or every row as it comes."""
    if type(holder).__module__.startswith(_WRAPPERS):
        return not getattr(getattr(holder, "active_peft_config", None), "is_prompt_learning", False)  # adds tokens
    cls = _class(type(holder))
    head = cls.__name__.endswith(_HEADS) and cls.__module__ == _class(type(decoder)).__module__
    return head and getattr(holder, str(holder.base_model_prefix), None) is decoder


_WRAPPERS = ("peft.", "torch.nn.parallel.", "torch.distributed.")
_HEADS = ("ForCausalLM", "ForSequenceClassification")


def _class(cls: type) -> type:
    """A class before ``fully_shard`` derived this one from it."""
    return next(c for c in cls.__mro__ if not any(base.__name__ == "FSDPModule" for base in c.__mro__))


def _name(cls: type) -> str:
    own = _class(cls)
    return f"{own.__module__}.{own.__qualname__}"
