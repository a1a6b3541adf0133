"""Drop redundant visual tokens of vision transformers and vision-language models: no training, exact undo.

    >>> import saint, timm, torch
    >>> vit = timm.create_model("test_vit").eval()  # any model of timm, transformers or open_clip
    >>> with saint.pruned(vit, keep=0.5) as session:
    ...     logits = vit(torch.randn(1, 3, 160, 160))  # the same call, on fewer tokens
    >>> print(session.summary())
    VisionTransformer: candidates per sample, mean (least..most)
    ...

A *session* owns every change to a model, a *plan* says where tokens may go, a *method* says which.

    apply, pruned, remove, status     put a plan on a model, take it off, ask what is on
    Session, LayerTrace               what was applied, what the last forward dropped
    plan_for                          a plan that leaves a share of the work
    smaller_pictures                  fewer visual tokens by what a processor is given and asked for
    Plan, Stage, plan, recipes        where tokens may go; ready-made plans
    Saint, SaintFullGraph, methods    which ones go: the paper's two methods, all methods
    tune, freeze, evaluate_images     find a plan, fix its numbers, measure it
    register, Observer                models from elsewhere, whatever looks on
    graph, testing                    the mathematics alone; proofs for a model and a plan
    demo                              real models and pictures that need no hub
    SaintError                        of every error that is raised on purpose, see saint.errors

``help(saint.Plan)`` explains each of them, ``dir(saint)`` lists them.
``import saint`` loads no timm or transformers and touches no GPU.
"""

from importlib import import_module
from importlib.util import find_spec
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
    from .lab.demo import demo as demo
    from .lab.eval.images import evaluate_images as evaluate_images
    from .lab.tuning.run import tune as tune
    from .methods.saint import Saint as Saint
    from .methods.saint_full_graph import SaintFullGraph as SaintFullGraph
    from .planning import plan_for as plan_for
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
    from .vlm.smaller import smaller_pictures as smaller_pictures

_MODULES = {"demo", "graph", "methods", "testing"}  # public names that are modules, and not in one
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
    "demo": "lab.demo.demo",
    "evaluate_images": "lab.eval.images",
    "freeze": "freezing",
    "graph": "graph",
    "methods": "methods",
    "plan": "plans",
    "plan_for": "planning",
    "pruned": "session",
    "recipes": "presets",
    "register": "upstream.registry",
    "remove": "session",
    "smaller_pictures": "vlm.smaller",
    "status": "session",
    "tune": "lab.tuning.run",
    "testing": "testing",
}

# what help(saint) tells in full; all other public names have a line in the text above it, and help(saint.NAME)
__all__ = [
    "LayerTrace",
    "Session",
    "__version__",
    "apply",
    "evaluate_images",
    "freeze",
    "plan",
    "plan_for",
    "pruned",
    "recipes",
    "register",
    "remove",
    "smaller_pictures",
    "status",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saint' has no attribute {name!r}")
    module = import_module(f"saint.{_LAZY[name]}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names. Where the lab is not installed its own are left out: help() asks for all that is listed."""
    lab = all(find_spec(package) for package in ("PIL", "rich", "typer"))
    return sorted(["__version__", *(name for name, home in _LAZY.items() if lab or not home.startswith("lab."))])
