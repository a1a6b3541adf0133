"""Find the vision-language model in a model."""

from torch import nn

from ..errors import UnsupportedModelError
from ..upstream import registry
from ..upstream.decoders import TEXT
from ..upstream.specs import FamilySpec


def find(model: nn.Module) -> tuple[str, nn.Module, FamilySpec] | None:
    """The outermost known vision-language model in ``model`` as (dotted path, module, spec); None when there is none."""
    families = registry.families()
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            spec = families.get(f"{cls.__module__}.{cls.__qualname__}")
            if spec is not None:
                return path, module, spec
    return None


def locate(model: nn.Module, stage: str) -> tuple[str, nn.Module, FamilySpec]:
    """Like :func:`find`.

    Raises:
        UnsupportedModelError: there is none, so ``stage`` means nothing.
    """
    found = find(model)
    if found is None:
        known = ", ".join(spec.title for spec in registry.families().values())
        raise UnsupportedModelError(
            f"the {stage} stage needs a vision-language model, and {type(model).__name__} ({type(model).__module__}) contains "
            f"none that is known, so there are no visual tokens to drop; known families: {known}; known language "
            f"models without images, whose prompt tokens the language stage drops: {', '.join(TEXT.values())}"
        )
    return found
