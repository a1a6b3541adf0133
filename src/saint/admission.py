"""Which derived families may be pruned, and at which stages: those whose contracts held on a twin.

A family that was read off the instance (``upstream.derive``) is admitted by proof. What was proved is remembered by the class,
the release of its library, and what kinds of layers its language model has: in a table of this package (``admitted.json``), and
in a file in the user's cache. A model that is in neither is proved when a plan is first applied, on a small random twin of it,
which takes a second or a few.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .files import cache_dir, write_whole
from .upstream.specs import FamilySpec
from .upstream.versions import installed

Verdict = Mapping[str, str]  # of each stage: "", or why it is not possible

_running: ContextVar[bool] = ContextVar("proving", default=False)
_seen: dict[str, Verdict] = {}


def admit(model: nn.Module, vlm: nn.Module, spec: FamilySpec, stages: tuple[str, ...]) -> None:
    """Let a model of a derived family pass, or refuse it.

    Args:
        model: the user's model.
        vlm: the module in it that ``spec`` was read off.
        spec: a derived one.
        stages: of the plan.

    Raises:
        UnsupportedModelError: a contract failed at one of the stages, or it could not be tried; the message says which.
    """
    if _running.get():
        return
    verdict = verdict_of(model, vlm, spec)
    for stage in stages:
        if reason := verdict.get(stage, ""):
            raise UnsupportedModelError(
                f"{type(vlm).__name__} ({type(vlm).__module__}) is of no family that saint has facts about, and the {stage} "
                f"stage was not proved on a small twin of it: {reason}. {_advice(verdict)}`saint check MODEL` shows every "
                "contract; docs/adding.md says how to register facts of your own"
            )


def verdict_of(model: nn.Module, vlm: nn.Module, spec: FamilySpec) -> Verdict:
    """Return what is known of a model, by stage: remembered, or proved now and remembered."""
    name = key(vlm, spec)
    if name not in _seen:
        known = _table(_shipped()) | _table(_own())
        if name not in known:
            logging.getLogger("saint").info("proving %s on a small twin", type(vlm).__name__)
            known[name] = prove(model, spec)
            _remember(name, known[name])
        _seen[name] = known[name]
    return _seen[name]


def key(vlm: nn.Module, spec: FamilySpec) -> str:
    """Name what a proof holds for: the class, the release of its library, and a number of the kinds of layers of its decoder."""
    decoder: Any = vlm.get_submodule(spec.decoder)
    config = decoder.config
    kinds = {type(module).__name__ for module in decoder.modules()}
    kinds |= {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    for field in ("use_bidirectional_attention", "num_kv_shared_layers", "hidden_size_per_layer_input"):
        kinds.add(f"{field}: {bool(getattr(config, field, None))}")
    number = hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]
    return f"{spec.model} {number} {spec.library} {installed(spec.library)}"


def prove(model: nn.Module, spec: FamilySpec) -> Verdict:
    """Run the contracts of every stage on a twin of the user's model."""
    from .testing.twins import try_stages

    with proving():
        return try_stages(model, spec)


@contextmanager
def proving() -> Iterator[None]:
    """Let every model pass, for its contracts to run."""
    before = _running.set(True)
    try:
        yield
    finally:
        _running.reset(before)


def _advice(verdict: Verdict) -> str:
    proved = [stage for stage, reason in verdict.items() if not reason]
    return f"Proved: the {' and '.join(proved)} stage. " if proved else ""


# -- what is remembered -----------------------------------------------------------------------------------------------


def _shipped() -> str:
    return resources.files("saint.upstream").joinpath("admitted.json").read_text()


def _file() -> Path:
    return cache_dir() / "admitted.json"


def _own() -> str:
    return _file().read_text() if _file().is_file() else "{}"


def _table(text: str) -> dict[str, Verdict]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError:
        return {}  # cut off by something else than this: proved anew, and written whole
    return table if isinstance(table, dict) else {}


def _remember(name: str, verdict: Verdict) -> None:
    table = _table(_own()) | {name: verdict}
    try:
        write_whole(_file(), json.dumps(table, indent=1, sort_keys=True).encode())
    except OSError as error:
        warnings.warn(
            f"what was proved of this model is not remembered: {error}; set SAINT_CACHE to a folder", stacklevel=2
        )
