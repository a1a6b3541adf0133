"""Which classes are known: the tables of this package, entry points of installed ones, and what :func:`register` was given.

Entry-point groups: ``saint.encoders`` (value: an :class:`EncoderSpec`) and ``saint.families`` (value: a :class:`FamilySpec`),
one entry per spec. They are read when a model is first looked up.
"""

import threading
from importlib.metadata import EntryPoint
from typing import Any

from .. import plugins
from ..errors import PluginError
from . import families as _families
from . import open_clip, timm, transformers
from .specs import EncoderSpec, FamilySpec, Layout, ReaderSpec

ENCODERS: tuple[EncoderSpec, ...] = (*timm.SPECS, *transformers.SPECS, *open_clip.SPECS)  # of this package
FAMILIES: tuple[FamilySpec, ...] = _families.SPECS  # of this package
GROUPS: dict[str, type[EncoderSpec] | type[FamilySpec]] = {
    "saint.encoders": EncoderSpec,
    "saint.families": FamilySpec,
}


class _Tables:
    """Specs by the qualified name of their class."""

    def __init__(self) -> None:
        self.encoders = {spec.encoder: spec for spec in ENCODERS}
        self.families = {spec.model: spec for spec in FAMILIES}
        self.towers = {spec.tower_spec.encoder: spec.tower_spec for spec in FAMILIES if spec.tower_spec is not None}
        self.plugins_read = False
        self.lock = threading.RLock()  # the import of a plug-in may call `register`

    def add(self, spec: Any) -> None:
        """Check ``spec`` against what is known, then add it with its tower."""
        new: list[tuple[dict[str, Any], str, EncoderSpec | FamilySpec]] = []
        if isinstance(spec, EncoderSpec):
            new.append((self.encoders, spec.encoder, spec))
        elif isinstance(spec, FamilySpec):
            new.append((self.families, spec.model, spec))
            if spec.tower_spec is not None:
                new.append((self.towers, spec.tower_spec.encoder, spec.tower_spec))
        else:
            raise TypeError(f"expected an EncoderSpec or a FamilySpec of saint.upstream, got {_shown(spec)}")
        with self.lock:
            for table, name, facts in new:
                if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
                    raise ValueError(
                        f"the class of a spec is named by module and class, as package.module.Class; got {name!r}"
                    )
                if table.get(name, facts) != facts:
                    raise ValueError(
                        f"{name} is known with other facts already, as {table[name].title!r}; a spec stands for one class: "
                        "give a subclass of it its own spec, or do not register this one"
                    )
            for table, name, facts in new:
                table[name] = facts

    def read_plugins(self) -> None:
        with self.lock:
            if self.plugins_read:
                return
            for group, kind in GROUPS.items():
                for point in plugins.points(group).values():
                    self._add_plugin(point, kind)
            self.plugins_read = True

    def _add_plugin(self, point: EntryPoint, kind: type) -> None:
        spec = plugins.load(point)
        if not isinstance(spec, kind):
            raise PluginError(f"{plugins.described(point)} must be of type {kind.__name__}, got {_shown(spec)}")
        try:
            self.add(spec)
        except ValueError as error:
            raise PluginError(f"{plugins.described(point)}: {error}") from error


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"type {type(value).__name__}"


_tables = _Tables()


def register(spec: EncoderSpec | FamilySpec) -> None:
    """Make a class of another package known for the rest of the process.

    A model that holds an instance of the class, or of a subclass, is then pruned like those of the support table. Registering
    a spec again, or an equal one, does nothing. An installed package registers by entry point instead: groups ``saint.encoders``
    and ``saint.families``.

    Args:
        spec: of an encoder, or of a family of vision-language models, whose ``tower_spec`` is registered with it.

    Raises:
        TypeError: not such a spec.
        ValueError: the class is known with other facts, or is not named by module and class.

    Example:
        >>> import saint
        >>> from saint.upstream import BlockSpec, EncoderSpec
        >>> block = BlockSpec(attn="attn", mlp="mlp", keys=("attn.key",), heads=("attn.heads",))
        >>> saint.register(
        ...     EncoderSpec(
        ...         title="My ViT",
        ...         library="my_vits",
        ...         encoder="my_vits.model.MyViT",
        ...         blocks="blocks",
        ...         block_specs={"MyBlock": block},
        ...         prefix=lambda model: 1,
        ...         patch="patchify",
        ...     )
        ... )
    """
    _tables.add(spec)


def encoders() -> dict[str, EncoderSpec]:
    """All known encoders by qualified class name, those of this package first.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    _tables.read_plugins()
    return dict(_tables.encoders)


def families() -> dict[str, FamilySpec]:
    """All known families of vision-language models by qualified class name, those of this package first.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    _tables.read_plugins()
    return dict(_tables.families)


def readers() -> dict[str, ReaderSpec]:
    """Classes around encoders that read rows of their tokens, by qualified class name."""
    return {spec.model: spec for spec in transformers.READERS}


def row_layouts() -> dict[str, Layout]:
    """Layouts of the rows of patches that towers without a spec are given, by qualified class name."""
    return dict(transformers.ROW_LAYOUTS)


def refused() -> dict[str, str]:
    """Classes that are known not to work, by qualified name, with the reason; a registered spec of one comes first."""
    reasons = {**timm.REFUSED, **transformers.REFUSED, **open_clip.REFUSED}
    known = encoders()
    return {name: why for name, why in reasons.items() if name not in known}
