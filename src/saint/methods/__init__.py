"""One file per published method, named as the method is registered; classes are imported on use.

Other packages register theirs through the entry-point group ``saint.methods`` (name = registry name, value = the class).
"""

import difflib
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import PluginError
from .base import Method

if TYPE_CHECKING:  # what type checkers and editors are told
    from .apet import ApET as ApET
    from .cdpruner import CDPruner as CDPruner
    from .d2pruner import D2Pruner as D2Pruner
    from .dart import DART as DART
    from .divprune import DivPrune as DivPrune
    from .duplicates import Duplicates as Duplicates
    from .evs import EVS as EVS
    from .fastv import FastV as FastV
    from .flat import Flat as Flat
    from .grid import Grid as Grid
    from .hiprune import HiPrune as HiPrune
    from .match import Match as Match
    from .mmr import MMR as MMR
    from .otprune import OTPrune as OTPrune
    from .pitome import PiToMe as PiToMe
    from .ppt import PPT as PPT
    from .priortr import PriorTR as PriorTR
    from .prumerge import PruMerge as PruMerge
    from .pyramiddrop import PyramidDrop as PyramidDrop
    from .random import Random as Random
    from .resize import Resize as Resize
    from .saint import Saint as Saint
    from .saint_full_graph import SaintFullGraph as SaintFullGraph
    from .saint_video import SaintVideo as SaintVideo
    from .scope import SCOPE as SCOPE
    from .sparsevlm import SparseVLM as SparseVLM
    from .tome import ToMe as ToMe
    from .visionzip import VisionZip as VisionZip
    from .vispruner import VisPruner as VisPruner

_BUILTIN = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}


def _builtin(name: str) -> type[Method]:
    """The class of that registry name in the file of that name."""
    module = import_module(f"{__name__}.{name}")
    found = (
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    )
    return next(cls for cls in found if issubclass(cls, Method) and cls.name == name)


def _plugged() -> dict[str, EntryPoint]:
    """Methods of other packages by registry name."""
    points = plugins.points("saint.methods")
    for name in _BUILTIN & points.keys():
        raise PluginError(f"{plugins.described(points[name])}: {name!r} is a method of saint; choose another name")
    return points


def names() -> list[str]:
    """Registry names of all methods, built-in and plugged in.

    Raises:
        PluginError: a plug-in takes the name of another method.
    """
    return sorted([*_BUILTIN, *_plugged()])


def _load(point: EntryPoint) -> type[Method]:
    cls = plugins.load(point)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PluginError(f"{plugins.described(point)} must be a subclass of saint.methods.base.Method, got {cls!r}")
    name = getattr(cls, "name", None)
    if name != point.name:
        raise PluginError(
            f"{plugins.described(point)} has the name {name!r}; plans find a method by its entry point, so both must agree"
        )
    return cls


def get(name: str) -> type[Method]:
    """The class registered as ``name``.

    Raises:
        ValueError: there is none.
        PluginError: the package that brings it is broken.
    """
    if name in _BUILTIN:
        return _builtin(name)
    if name in _plugged():
        return _load(_plugged()[name])
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
    for registered in _BUILTIN:  # a class is called as its file is, in its own letters
        if registered.replace("_", "") == name.lower() and (cls := _builtin(registered)).__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the methods of this package by their classes, and what is done with names of methods."""
    return sorted([*(_builtin(name).__name__ for name in _BUILTIN), "Method", "base", "from_dict", "get", "names"])
