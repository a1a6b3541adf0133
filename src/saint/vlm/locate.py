"""Find the vision-language model in a model, and tell models that bring images of those that do not."""

import inspect

from torch import nn

from ..errors import UnsupportedModelError
from ..language.locate import held
from ..upstream import registry
from ..upstream.decoders import TEXT
from ..upstream.derive import MERGES, derive
from ..upstream.names import (
    CACHE,
    EMBEDDINGS,
    IMAGE_TOKEN,
    MERGER,
    PLACEHOLDER_MASK,
    SEEN_STATES,
    TEXT_FEATURES,
    Parameters,
    PerClass,
)
from ..upstream.specs import FamilySpec
from ..vision.locate import find as find_encoders
from ..vision.locate import lineage
from ..vision.readers import around


def find(model: nn.Module) -> tuple[str, nn.Module, FamilySpec] | None:
    """The outermost vision-language model in ``model`` as (dotted path, module, spec); None when there is none.

    One that no spec was written for is read off the instance, see :mod:`saint.upstream.derive`.
    """
    families, candidates = registry.families(), []
    specs = PerClass(lambda cls: next((families[name] for name in lineage(cls) if name in families), None))
    # asked of the class: a module looks into its parts for what it has not
    merges = PerClass(lambda cls: any(hasattr(cls, name) for name in MERGES))
    for path, module in model.named_modules():
        spec = specs[type(module)]
        if spec is not None:
            return path, module, spec
        if merges[type(module)]:
            candidates.append((path, module))
    return derive(candidates)


def locate(model: nn.Module, stage: str) -> tuple[str, nn.Module, FamilySpec]:
    """Like :func:`find`.

    Raises:
        UnsupportedModelError: there is none, so ``stage`` means nothing.
    """
    found = find(model)
    if found is None:
        refuse_unknown(model)
        raise UnsupportedModelError(
            f"the {stage} stage needs a vision-language model, and {type(model).__name__} ({type(model).__module__}) contains "
            f"none that is known: in none of its modules does {PLACEHOLDER_MASK} (or {MERGER}) put features among the embeddings "
            f"of a decoder, so there are no visual tokens to drop; {held(model)}known language models without images, whose "
            f"prompt tokens the language stage drops: {', '.join(TEXT.values())}"
        )
    return found


def alone(vlm: nn.Module, path: str, spec: FamilySpec) -> str:
    """Say how the tower of a family can be pruned alone, and what is lost, for messages; "" where it is no known encoder."""
    towers = find_encoders(vlm.get_submodule(spec.tower)) if spec.tower else []
    if not towers:
        return ""
    place = ".".join(filter(None, (path, spec.tower, towers[0][0])))
    return (
        f'; or pass its tower alone, saint.apply(model.{place}, ...), with output="similar" on its stage: the language model '
        "then receives as many features as ever and runs no faster"
    )


def refuse_second(model: nn.Module, path: str) -> None:
    """Refuse a model that holds another decoder beside the vision-language model at ``path``.

    It may go on with the cache or the hidden states of the first, from which tokens are missing.

    Raises:
        UnsupportedModelError: it names the part to pass.
    """
    inner, takes = model.get_submodule(path), PerClass(_takes_embeddings)
    for outer, holder in around(model, path):
        for name, child in holder.named_children():
            if child is inner:
                continue
            for place, module in child.named_modules(prefix=f"{outer}.{name}" if outer else name):
                if takes[type(module)]:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} holds another decoder, {place} ({type(module).__name__}), beside its vision-"
                        f"language model {path} ({type(model.get_submodule(path)).__name__}), and may read that one's cache or "
                        "hidden states, of which some would be missing: where it does not, pass the part, "
                        f"saint.apply(model.{path}, ...)"
                    )
        inner = holder


def refuse_unknown(model: nn.Module) -> None:
    """Refuse a vision-language model of which only the tower is known.

    Raises:
        UnsupportedModelError: it names the tower to pass, and what is lost.
    """
    for path, tower, _ in find_encoders(model):
        sign = _brings_images(model, path)
        if sign:
            raise UnsupportedModelError(
                f"{type(model).__name__} ({type(model).__module__}) is a vision-language model of no known family ({sign}), so "
                f"its visual tokens cannot be followed from {path} ({type(tower).__name__}) into its language model: pass that "
                f'tower alone, saint.apply(model.{path}, ...), with output="similar" on its stage. The language model then '
                "receives as many features as ever and runs no faster, and the connector and language stages are not possible. "
                f"Known families: {_known()}. docs/adding.md says how to register one of your own"
            )


def _brings_images(model: nn.Module, path: str) -> str:
    """Say what tells that ``model`` hands the tokens of the encoder at ``path`` to a language model; "" where nothing does."""
    holders = list(around(model, path))
    for place, module in holders:
        if TEXT_FEATURES.of(module) is not None:
            return ""  # a dual encoder
        name = PLACEHOLDER_MASK.of(module) or MERGER.of(module)
        if name is None and (field := IMAGE_TOKEN.of(getattr(module, "config", None))) is not None:
            name = f"config.{field}"
        if name is not None:
            return f"its {f'{place}.' if place else ''}{name} says where images stand in a prompt"
    takes = PerClass(_takes_embeddings)
    for place, module in model.named_modules():
        if not takes[type(module)] or place == path or place.startswith(f"{path}."):
            continue
        if not any(module is holder for _, holder in holders):
            return f"{place} ({type(module).__name__}) is a language model that takes embeddings"
    return ""


def _takes_embeddings(cls: type) -> bool:
    """Tell whether modules of a class are decoders that take embeddings of images; those that attend to another sequence need
    none.
    """
    forward = getattr(cls, "forward", None)
    if not inspect.isfunction(forward):
        return False
    parameters = Parameters(forward)
    return parameters.has(CACHE) and parameters.has(EMBEDDINGS) and not parameters.has(SEEN_STATES)


def _known() -> str:
    return ", ".join(spec.title for spec in registry.families().values())
