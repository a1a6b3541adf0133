"""What the page asks for, checked: an image, a model, a plan."""

import base64
import binascii
import dataclasses
import inspect
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...methods import get
from ...plans import Plan, Stage
from ...presets import recipe, recipes
from ..images import read_untrusted
from .guard import LARGEST

STAGES = ("vision", "connector", "language")
_FIELDS = {
    "image",
    "name",
    "model",
    "question",
    "keep",
    "plan",
    "against",
    "against_name",
    "stage",
    "method",
    "threshold",
    "tokens",
    "layers",
}
LONGEST_PLAN = 30_000  # characters: a tuned plan has a stage per layer
_LONGEST = {"plan": LONGEST_PLAN, "against": LONGEST_PLAN}
_LONGEST_OTHER = 2000
LEAST = 0.2  # share of the work that a page asks for: with less, most models answer something else


@dataclass(frozen=True)
class Wanted:
    """Which plan is asked for: one that is there, one for a share of the work, or, with neither, the model's own.

    Attributes:
        name: for people.
        plan: as it was given.
        keep: share of the FLOPs that the plan is to keep.
    """

    name: str
    plan: Plan | None = None
    keep: float | None = None


@dataclass(frozen=True)
class Asked:
    """A request that makes sense.

    Attributes:
        image: upright, opaque, 8-bit RGB.
        model: one of those that are offered.
        question: for vision-language models.
        wanted: the plan.
        against: a plan that it is compared with.
    """

    image: Image.Image
    model: str
    question: str
    wanted: Wanted
    against: Wanted | None = None


def read(body: bytes, models: Collection[str]) -> Asked:
    """Read the request in ``body``, JSON: "image" in base64, "model", and optionally "name", "question", "against" (a plan)
    with "against_name", and one of "plan" (a recipe's name or JSON), "keep", or "method" with "stage", "threshold", "tokens" and
    "layers".

    Args:
        body: of the request.
        models: that may be asked for.

    Raises:
        ValueError: anything else, with what was expected.
        TypeError: a setting of another type.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("a JSON object with the fields image and model is expected; the body is no JSON") from error
    if not isinstance(data, dict) or not {"image", "model"} <= data.keys() or data.keys() - _FIELDS:
        named = ", ".join(sorted(map(str, data))) if isinstance(data, dict) else type(data).__name__
        more = ", ".join(sorted(_FIELDS - {"image", "model"}))
        raise ValueError(f"the fields image and model, and perhaps {more}, are expected; got {named:.200}")
    for field, value in data.items():
        if not isinstance(value, str):
            raise ValueError(f"{field} must be text, got {type(value).__name__}")
        longest = _LONGEST.get(field, _LONGEST_OTHER)
        if field != "image" and len(value) > longest:
            raise ValueError(f"{field} must have at most {longest} characters, got {len(value)}")
    _check_name(data.get("name", ""))
    if data["model"] not in models:
        raise ValueError(
            f"the model must be one of {', '.join(models)}, got {data['model']!r:.80}: saint ui --model NAME offers more"
        )
    wanted = _wanted(data)  # before the image: it is cheaper to refuse
    against = _given(text, data.get("against_name", "")) if (text := data.get("against", "").strip()) else None
    return Asked(_image(data["image"]), data["model"], data.get("question", "").strip(), wanted, against)


def _check_name(name: str) -> None:
    """A name is shown and never used for a file; a path is refused as a name."""
    if any(mark in name for mark in ("/", "\\", "\0")) or name.startswith("."):
        raise ValueError(f"the name of an image must be a plain file name without a path, got {name!r:.80}")


def _image(text: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the image must be given in base64") from error
    if not data:
        raise ValueError("the image is empty: choose a picture")
    if len(data) > LARGEST:
        raise ValueError(
            f"at most {LARGEST // 1_000_000} MB of an image are taken, got {len(data) / 1e6:.1f} MB: scale it down"
        )
    return read_untrusted(data)


def _wanted(data: dict[str, str]) -> Wanted:
    if text := data.get("plan", "").strip():
        return _given(text)
    if name := data.get("method", "").strip():
        return Wanted(name, _of_method(name, data))
    if not (keep := data.get("keep", "").strip()):
        return Wanted("the model's own plan")
    share = float(_number("keep", keep))
    if not LEAST <= share <= 1:
        raise ValueError(f"keep is the share of the work that is kept, from {LEAST:g} to 1; got {keep!r:.40}")
    return Wanted(f"keep {share:g}", keep=share)


def _given(text: str, called: str = "") -> Wanted:
    """Read a plan: JSON, or a recipe's name; never the path of a file, as what is on this disk is not the page's business."""
    if text.startswith("{"):
        plan = Plan.from_json(text)
        named = called or next((name for name in recipes() if recipe(name) == plan), "the plan given")
        return Wanted(named, plan)
    if text.endswith(".json"):
        raise ValueError(
            f"files of this machine are not read for a page, got the path {text!r:.80}: choose the file in the page, or paste "
            "what it holds"
        )
    return Wanted(text, recipe(text))


def _of_method(name: str, data: dict[str, str]) -> Plan:
    where = data.get("stage", "") or "vision"
    if where not in STAGES:
        raise ValueError(f"the stage must be one of {', '.join(STAGES)}, got {where!r:.40}")
    method = get(name)
    fields = {field.name for field in dataclasses.fields(method)}
    settings: dict[str, Any] = {}
    if threshold := data.get("threshold", "").strip():
        if "threshold" not in fields:
            raise ValueError(f"the method {name} has no threshold: give what it keeps")
        settings["threshold"] = _number("threshold", threshold)
    if tokens := data.get("tokens", "").strip():
        if "keep" not in inspect.signature(method).parameters:
            raise ValueError(f"the method {name} takes no number of tokens to keep")
        settings["keep"] = _number("tokens", tokens)
    layers = data.get("layers", "").strip()
    if where == "connector":
        if layers:
            raise ValueError("the connector stage has no layers: leave them empty")
        return Plan(connector=Stage(method(**settings)))
    slots: dict[str, Any] = {where: Stage(method(**settings), layers=layers or None)}
    return Plan(**slots)


def _number(name: str, text: str) -> int | float:
    """A whole number is a count of tokens, one with a point a share."""
    try:
        return int(text) if text.lstrip("+-").isdigit() and name == "tokens" else float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r:.40}") from error
