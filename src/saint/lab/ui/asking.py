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
from ...presets import recipe
from ..images import read_untrusted
from .guard import LARGEST

STAGES = ("vision", "connector", "language")
_FIELDS = {"image", "name", "model", "question", "plan", "stage", "method", "threshold", "keep", "layers"}
_LONGEST = {"plan": 30_000}  # characters of a text: a tuned plan has a stage per layer
_LONGEST_OTHER = 2000


@dataclass(frozen=True)
class Asked:
    """A request that makes sense.

    Attributes:
        image: upright, opaque, 8-bit RGB.
        model: one of those that are offered.
        question: for vision-language models.
        plan: None means the model's own.
    """

    image: Image.Image
    model: str
    question: str
    plan: Plan | None


def read(body: bytes, models: Collection[str]) -> Asked:
    """The request in ``body``, JSON: "image" in base64, "model", and optionally "name", "question", and either "plan" (a recipe's
    name or JSON) or "method" with "stage", "threshold" or "keep", and "layers".

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
    plan = _plan(data)  # before the image: it is cheaper to refuse
    return Asked(_image(data["image"]), data["model"], data.get("question", "").strip(), plan)


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


def _plan(data: dict[str, str]) -> Plan | None:
    text = data.get("plan", "").strip()
    if text:
        # never the path of a file: what is on this disk is not the page's business
        return Plan.from_json(text) if text.startswith("{") else recipe(text)
    name = data.get("method", "").strip()
    if not name:
        return None
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
    if keep := data.get("keep", "").strip():
        if "keep" not in inspect.signature(method).parameters:
            raise ValueError(f"the method {name} takes no number of tokens to keep")
        settings["keep"] = _number("keep", keep)
    layers = data.get("layers", "").strip()
    if where == "connector":
        if layers:
            raise ValueError("the connector stage has no layers: leave them empty")
        return Plan(connector=Stage(method(**settings)))
    return Plan(**{where: Stage(method(**settings), layers=layers or None)})


def _number(name: str, text: str) -> int | float:
    """A whole number is a count of tokens, one with a point a share."""
    try:
        return int(text) if text.lstrip("+-").isdigit() and name == "keep" else float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r:.40}") from error
