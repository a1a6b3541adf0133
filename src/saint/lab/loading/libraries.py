"""One loader per library: timm, transformers ("hf"), open_clip and the demo models."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...extras import require
from ...presets import recipe
from ...vision.locate import locate
from ..demo import smollm2
from .source import Source


def _check_timm(name: str) -> None:
    timm = require("timm", "timm")
    if not (":" in name or Path(name).is_dir() or timm.is_model(name)):
        hint = _meant(name.partition(".")[0], timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")


def _meant(typed: str, known: Iterable[str]) -> str:
    """Names that may have been meant, behind a message; "" for none. What was typed is often a beginning, with a slip."""
    heads: dict[str, str] = {}  # first names by their beginnings
    for name in known:
        heads.setdefault(name[: len(typed) + 1], name)
    close = [heads[head] for head in difflib.get_close_matches(typed, heads, n=3)]
    return f"; did you mean {', '.join(close)}?" if close else ""


def _timm(name: str, pretrained: bool, size: int | None) -> Source:
    timm = require("timm", "timm")
    _check_timm(name)
    options = {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if size is None:
            raise
        raise ValueError(f"timm:{name} runs at its own size only: leave --size out ({error})") from error
    config = timm.data.resolve_model_data_config(model)
    height, width = (size, size) if size is not None else config["input_size"][1:]

    def pixels(image: Image.Image, at: tuple[int, int]) -> Tensor:
        return timm.data.create_transform(**{**config, "input_size": (3, *at)}, is_training=False)(image)

    licence = (model.pretrained_cfg or {}).get("license") if pretrained else None
    return Source(model, (height, width), pixels, lambda: (config["mean"], config["std"]), "x", licence=licence)


def _check_open_clip(name: str) -> None:
    open_clip = require("open_clip", "open-clip")
    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise ValueError(
            f"open_clip {open_clip.__version__} has no model {architecture!r}{_meant(architecture, known)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag != "none" and tag not in tags:
        raise ValueError(
            f"open_clip:{architecture} needs a tag: {', '.join(tags)}, or none for random weights; "
            f"got {tag!r}, e.g. open_clip:{architecture}/{tags[0] if tags else 'none'}"
        )


def _open_clip(name: str, pretrained: bool, size: int | None) -> Source:
    open_clip = require("open_clip", "open-clip")
    _check_open_clip(name)
    architecture, _, tag = name.partition("/")
    options = {} if size is None else {"force_image_size": size}
    both, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=tag if pretrained and tag != "none" else None, **options
    )
    model = both.visual  # pruning is about the image tower; the text tower is left behind
    config = model.preprocess_cfg
    side = model.image_size
    height, width = (side, side) if isinstance(side, int) else side

    def pixels(image: Image.Image, at: tuple[int, int]) -> Tensor:
        if at == (height, width):
            return transform(image)
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**{**config, "size": at}), is_train=False)(image)

    return Source(model, (height, width), pixels, lambda: (config["mean"], config["std"]), "x")


# classes whose head is part of what users measure; everything else is loaded without its head
_WITH_HEAD = re.compile(r"ForImageClassification|Backbone$|VisionModelWithProjection$")


def _hf(name: str, pretrained: bool, size: int | None) -> Source:
    library = require("transformers", "transformers")
    config = library.AutoConfig.from_pretrained(name)
    kind = next(iter(config.architectures or []), "")
    cls = getattr(library, kind, None) if _WITH_HEAD.search(kind) else None
    if pretrained:
        model = (cls or library.AutoModel).from_pretrained(name)
    else:
        model = cls(config) if cls is not None else library.AutoModel.from_config(config)
    if hasattr(config, "vision_config"):
        model = locate(model)[1]  # the image tower of a two-tower model
    own = getattr(model.config, "image_size", None)
    made: list[Any] = []  # loaded on use: checks and bare timings need no preprocessing

    def processor() -> Any:
        if not made:
            made.append(library.AutoImageProcessor.from_pretrained(name))
        return made[0]

    if size is None and own is None and "num_patches" not in model.config.to_dict():
        crop = processor().crop_size or processor().size
        own = crop["height"]
    side = size or own or 0
    height, width = (side, side) if isinstance(side, int) else side

    def pixels(image: Image.Image, at: tuple[int, int]) -> Tensor:
        process = processor()
        target = {"height": at[0], "width": at[1]}
        given = dict(process.size)
        if "shortest_edge" in given:  # resize, then crop: keep the two in proportion
            crop = dict(getattr(process, "crop_size", None) or {}).get("height") or given["shortest_edge"]
            sized = {"size": {"shortest_edge": round(given["shortest_edge"] * min(at) / crop)}, "crop_size": target}
        else:
            sized = {"size": target}
        return process(images=image, return_tensors="pt", **sized)["pixel_values"][0]

    def flattened(images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(processor()(images=images, return_tensors="pt"))

    interpolated = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    extra = {"interpolate_pos_encoding": True} if interpolated and own is not None and (height != own) else {}
    return Source(
        model,
        (height, width),
        pixels,
        lambda: (processor().image_mean, processor().image_std),
        "pixel_values",
        extra,
        batch=flattened if not side else None,
    )


def _check_demo(name: str) -> None:
    from .. import demo

    if f"demo:{name}" == _DEMO_VLM:
        raise ValueError(
            f"demo:{name} is a vision-language model: saint chat, view, bench and eval vqa take it; an encoder is expected here"
        )
    if name == smollm2.NAME:
        raise ValueError(
            f"demo:{name} is a language model without images: saint analyze takes it; an encoder is expected here"
        )
    if name not in demo.MODELS:
        raise ValueError(f"there is no demo:{name}; there are {', '.join(f'demo:{known}' for known in demo.MODELS)}")


def _demo(name: str, pretrained: bool, size: int | None) -> Source:
    from .. import demo

    _check_demo(name)
    facts = demo.MODELS[name]
    if not pretrained:
        raise ValueError("a demo model is its weights: leave --no-pretrained out")
    side = size or facts.image_sizes[0]
    low, high = min(facts.image_sizes), max(facts.image_sizes)
    if not low <= side <= high:
        sizes = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"demo:{name} takes pictures of {sizes} pixels, got {side}")
    model = facts.load()
    argument = next(iter(inspect.signature(model.forward).parameters))
    return Source(
        model,
        (side, side),
        lambda image, at: facts.preprocess(image, at[0]),
        lambda: (facts.mean, facts.std),
        argument,
        plan=recipe(facts.recipe),
        title=facts.title,
        licence=facts.licence,
    )


_DEMO_VLM = "demo:small-llava"  # loading/vlm.py knows it

SOURCES: dict[str, Callable[[str, bool, int | None], Source]] = {
    "timm": _timm,
    "hf": _hf,
    "open_clip": _open_clip,
    "demo": _demo,
}

# by library, what refuses a name that it does not have, without loading anything; of "hf" the hub alone knows
CHECKS: dict[str, Callable[[str], None]] = {"timm": _check_timm, "open_clip": _check_open_clip, "demo": _check_demo}
