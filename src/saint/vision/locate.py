"""Find the one encoder of a model that the registry knows."""

from torch import nn

from ..errors import UnsupportedModelError
from ..upstream import registry
from ..upstream.names import PerClass
from ..upstream.specs import EncoderSpec, FamilySpec


def lineage(cls: type) -> list[str]:
    """Qualified names of a class and its bases, the nearest first."""
    # names, not classes: looking one up must not import a library the user does not have
    return [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]


def locate_tower(model: nn.Module, family: FamilySpec) -> tuple[str, nn.Module, EncoderSpec]:
    """The encoder of a vision-language model, as (path inside its tower, module, spec).

    Args:
        model: the module of the family's spec.
        family: what is known of it; its own tower comes before those of the registry.

    Raises:
        UnsupportedModelError: see :func:`locate`.
    """
    tower, own = model.get_submodule(family.tower), family.tower_spec
    if own is not None:
        for path, module in tower.named_modules():
            if own.encoder in lineage(type(module)):
                return path, module, own
    return locate(tower)


def find(model: nn.Module) -> list[tuple[str, nn.Module, EncoderSpec]]:
    """All known encoders in ``model``, outermost only: (dotted path, module, spec)."""
    known = registry.encoders()
    specs = PerClass(lambda cls: next((known[name] for name in lineage(cls) if name in known), None))
    found: list[tuple[str, nn.Module, EncoderSpec]] = []
    for path, module in model.named_modules():
        spec = specs[type(module)]
        if spec is None or any(not outer or path.startswith(f"{outer}.") for outer, _, _ in found):
            continue
        found.append((path, module, spec))
    return found


def locate(model: nn.Module) -> tuple[str, nn.Module, EncoderSpec]:
    """The encoder of ``model``.

    Raises:
        UnsupportedModelError: none, several, or one that is known not to work; the message says what was looked for.
    """
    found = find(model)
    if len(found) > 1:
        paths = ", ".join(f"{path} ({type(module).__name__})" for path, module, _ in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} encoders: {paths}; pass the one to prune instead of the model around them"
        )
    if found:
        path, module, spec = found[0]
        reason = spec.refuse(module)
        if reason:
            raise UnsupportedModelError(f"{type(module).__name__} cannot be pruned as it is: {reason}")
        return path, module, spec
    reasons = registry.refused()
    for path, module in model.named_modules():
        for name in lineage(type(module)):
            if name in reasons:
                where = f" (at {path})" if path else ""
                raise UnsupportedModelError(f"{type(module).__name__}{where} cannot be pruned: {reasons[name]}")
    specs = registry.encoders().values()
    known = "; ".join(sorted({f"{spec.library} {spec.encoder.rpartition('.')[2]}" for spec in specs}))
    raise UnsupportedModelError(
        f"{type(model).__name__} ({type(model).__module__}) contains no encoder of the support table; looked for the "
        f"classes {known}. `saint list` prints the table; docs/adding.md says how to register a class of your own"
    )
