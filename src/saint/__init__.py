"""saint: drop redundant visual tokens, without training, in unmodified models.

``import saint`` loads neither timm nor transformers and touches no GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import graph as graph
    from . import methods as methods
    from . import testing as testing
    from .errors import AlreadyAppliedError as AlreadyAppliedError
    from .errors import HookNeverFiredError as HookNeverFiredError
    from .errors import ParityError as ParityError
    from .errors import SaintError as SaintError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .freezing import freeze as freeze
    from .lab.eval.images import evaluate_images as evaluate_images
    from .lab.tuning.run import tune as tune
    from .methods.saint import Saint as Saint
    from .methods.saint_full_graph import SaintFullGraph as SaintFullGraph
    from .plans import Plan as Plan
    from .plans import Stage as Stage
    from .plans import plan as plan
    from .presets import recipes as recipes
    from .runtime.observe import Observer as Observer
    from .session import Session as Session
    from .session import apply as apply
    from .session import pruned as pruned
    from .session import remove as remove
    from .session import status as status
    from .tokens import LayerTrace as LayerTrace
    from .upstream.registry import register as register


_LAZY = {
    "AlreadyAppliedError": "errors",
    "HookNeverFiredError": "errors",
    "LayerTrace": "tokens",
    "Observer": "runtime.observe",
    "ParityError": "errors",
    "Plan": "plans",
    "Saint": "methods.saint",
    "SaintError": "errors",
    "SaintFullGraph": "methods.saint_full_graph",
    "Session": "session",
    "Stage": "plans",
    "UnsupportedModelError": "errors",
    "apply": "session",
    "evaluate_images": "lab.eval.images",
    "freeze": "freezing",
    "graph": None,
    "methods": None,
    "plan": "plans",
    "pruned": "session",
    "recipes": "presets",
    "register": "upstream.registry",
    "remove": "session",
    "status": "session",
    "tune": "lab.tuning.run",
    "testing": None,
}

__all__ = sorted([*_LAZY, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saint' has no attribute {name!r}")
    module = _LAZY[name]
    value = import_module(f"saint.{name}") if module is None else getattr(import_module(f"saint.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
