"""One file per published method; classes are imported on use.

Third parties register theirs through the entry-point group ``saint.methods`` (name = registry name, value = the class).
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from .base import Method

if TYPE_CHECKING:
    from .divprune import DivPrune as DivPrune
    from .fastv import FastV as FastV
    from .grid import Grid as Grid
    from .random import Random as Random
    from .saint import Saint as Saint
    from .saint_full_graph import SaintFullGraph as SaintFullGraph
    from .tome import ToMe as ToMe

_BUILTIN = {
    "divprune": ("divprune", "DivPrune"),
    "fastv": ("fastv", "FastV"),
    "grid": ("grid", "Grid"),
    "random": ("random", "Random"),
    "saint": ("saint", "Saint"),
    "saint_full_graph": ("saint_full_graph", "SaintFullGraph"),
    "tome": ("tome", "ToMe"),
}


def names() -> list[str]:
    """Registry names of all methods, built-in and plugged in."""
    return sorted({*_BUILTIN, *(point.name for point in entry_points(group="saint.methods"))})


def get(name: str) -> type[Method]:
    """The class registered as ``name``."""
    if name in _BUILTIN:
        module, cls = _BUILTIN[name]
        return getattr(import_module(f"{__name__}.{module}"), cls)
    for point in entry_points(group="saint.methods"):
        if point.name == name:
            return point.load()
    close = difflib.get_close_matches(name, names())
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"unknown method {name!r}{hint} Known: {', '.join(names())}")


def from_dict(data: Mapping[str, Any]) -> Method:
    """Rebuild a method from its ``to_dict``."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f'a method is an object like {{"method": "saint", ...}}, as to_dict() makes it; got {data!r:.80}'
        )
    settings = dict(data)
    name = settings.pop("method", None)
    if not isinstance(name, str):
        raise ValueError(f"a method needs its registry name under 'method', got {data!r}")
    try:
        return get(name)(**settings)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from error


def __getattr__(name: str) -> Any:
    for module, cls in _BUILTIN.values():
        if cls == name:
            return getattr(import_module(f"{__name__}.{module}"), cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
