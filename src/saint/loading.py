"""Models by name and images by path, for the command line.

A model comes from its own library's loader with its own preprocessing: ``timm:NAME``, ``hf:NAME_OR_PATH``,
``open_clip:NAME/TAG`` or ``demo:NAME`` (works offline).
"""

import contextlib
import difflib
import inspect
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from .errors import MissingExtraError, SaintError
from .plan import Plan
from .presets import recipe
from .vision.locate import locate

FORMS = "timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG (NAME/none: random weights) or demo:NAME"


class DownloadError(SaintError, OSError):
    """A model's weights could not be fetched."""


class UnsafeCheckpointError(SaintError, ValueError):
    """A model's weights are a pickle that could run any code; it was not loaded."""


class Source(NamedTuple):
    """What a library's loader gives."""

    model: nn.Module
    image_size: tuple[int, int]  # height, width
    pixels: Callable[[Image.Image, tuple[int, int]], Tensor]  # image, (height, width) -> [3, height, width]
    norm: Callable[[], tuple[Sequence[float], Sequence[float]]]  # mean and std of the preprocessing
    argument: str  # name of the forward's picture argument
    extra: Mapping[str, Any] = MappingProxyType({})  # further arguments of the forward
    batch: Callable[[list[Image.Image]], dict[str, Tensor]] | None = None  # where pictures are not [B, 3, H, W]
    plan: Plan | None = None
    title: str = ""
    licence: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run, with its own preprocessing.

    Attributes:
        model: eval mode, on ``device``.
        spec: what the user typed.
        title: what people call it.
        device: where it is.
        plan: a plan that suits it.
        licence: of the weights, where known.
    """

    model: nn.Module
    spec: str
    title: str
    device: torch.device
    plan: Plan
    licence: str | None
    source: Source

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the model sees."""
        return self.source.image_size

    def preprocess(self, image: Image.Image) -> Tensor:
        """[3, height, width], float32, on the CPU."""
        return self.source.pixels(image, self.image_size)

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keyword arguments of ``model.forward``: B images as [B, 3, height, width] in the model's dtype and place."""
        if self.source.batch is not None:
            tensors = self.source.batch(list(images))
        else:
            tensors = {self.source.argument: torch.stack([self.preprocess(image) for image in images])}
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        moved = {k: t.to(self.device, dtype if t.is_floating_point() else None) for k, t in tensors.items()}
        return {**moved, **self.source.extra}

    def picture(self, image: Image.Image, scale: int = 2) -> Image.Image:
        """What the model sees of ``image``, for people: the same crop, ``scale`` times the resolution.

        Raises:
            ValueError: the model takes its patches flattened.
        """
        if self.source.batch is not None:
            raise ValueError(f"{self.spec} takes its patches flattened, in any shape: there is no fixed crop to draw")
        height, width = self.image_size
        values = self.source.pixels(image, (height * scale, width * scale))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in self.source.norm())
        array = ((values * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            ValueError: the model shows none.
        """
        _, encoder, row = locate(self.model)
        if row.patch is None:
            raise ValueError(f"{self.spec} shows no patch grid, so there is nothing to draw on")
        stride: Any = encoder.get_submodule(row.patch).stride
        return self.image_size[0] // stride[0], self.image_size[1] // stride[1]


# -- models -----------------------------------------------------------------------------------------------------------


def load_model(
    spec: str, device: str | torch.device = "cpu", pretrained: bool = True, *, size: int | None = None
) -> Loaded:
    """The model called ``spec``, through its own library's loader.

    Args:
        spec: ``timm:NAME``, ``hf:NAME_OR_PATH``, ``open_clip:NAME/TAG`` or ``demo:NAME``.
        device: where to put it.
        pretrained: False gives random weights (always the same) and downloads none.
        size: side of the pictures in pixels; None means the model's own.

    Returns:
        The model and its preprocessing.

    Raises:
        ValueError: not such a name, or the device is not there.
        MissingExtraError: the library is not installed.
        DownloadError: the weights cannot be fetched.
        UnsafeCheckpointError: the weights are a pickle of more than tensors.

    Example:
        >>> load_model("timm:test_vit", pretrained=False).image_size
        (160, 160)
    """
    device = resolve_device(device)
    library, colon, name = spec.partition(":")
    if not colon or library not in _SOURCES or not name:
        close = difflib.get_close_matches(library, _SOURCES) if colon else []
        hint = f" (did you mean {close[0]}:{name}?)" if close else ""
        raise ValueError(f"a model is {FORMS}; got {spec!r}{hint}")
    if size is not None and size < 1:
        raise ValueError(f"size must be a number of pixels >= 1, got {size}")
    with _explained(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = _SOURCES[library](name, pretrained, size)
    model = source.model.eval().to(device)
    return Loaded(
        model, spec, source.title or spec, device, source.plan or recipe("vit/published"), source.licence, source
    )


def names_a_model(spec: str) -> bool:
    """Whether ``spec`` looks like one of ``FORMS``; it need not exist."""
    library, colon, name = spec.partition(":")
    return bool(colon and name) and library in _SOURCES


def resolve_device(device: str | torch.device) -> torch.device:
    """A device that exists; "auto" is CUDA where there is one.

    Raises:
        ValueError: not a device, or not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device; use auto, cpu, cuda, cuda:1 or mps") from error
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type, 0)
    if (found.index or 0) >= count:
        raise ValueError(f"device {device} is not available here ({count} of that kind found); use --device cpu")
    return found


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        if error.name is not None and error.name != module:
            raise  # installed, but broken: its own message says more
        raise MissingExtraError(f'{module} is not installed: pip install "saint-vlm[{extra}]"') from error


# names, because the classes belong to httpx, httpcore, requests, urllib and huggingface_hub, whichever is in use
_UNREACHABLE = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ProxyError",
    "ReadTimeout",
    "URLError",
    "gaierror",
}


@contextlib.contextmanager
def _explained(spec: str) -> Iterator[None]:
    try:
        yield
    except SaintError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, pickle.UnpicklingError):
                raise UnsafeCheckpointError(
                    f"the weights of {spec} are a pickle that holds more than tensors, or is damaged; loading such a file can "
                    "run any code in it, so it was not loaded: give safetensors weights (load it where you trust it, then "
                    "save_pretrained, or safetensors.torch.save_file)"
                ) from error
            if not _UNREACHABLE.isdisjoint(cls.__name__ for cls in type(cause).__mro__):
                raise DownloadError(
                    f"could not download {spec} ({_line(cause)}): no network, or the hub does not answer. "
                    "demo:clip-b16 works offline; --no-pretrained runs random weights"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:120]


def _timm(name: str, pretrained: bool, size: int | None) -> Source:
    timm = _library("timm", "timm")
    if not (":" in name or Path(name).is_dir() or timm.is_model(name)):
        stem = name.partition(".")[0]
        close = difflib.get_close_matches(stem, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
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


def _open_clip(name: str, pretrained: bool, size: int | None) -> Source:
    open_clip = _library("open_clip", "open-clip")
    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"open_clip {open_clip.__version__} has no model {architecture!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag != "none" and tag not in tags:
        raise ValueError(
            f"open_clip:{architecture} needs a tag: {', '.join(tags)}, or none for random weights; "
            f"got {tag!r}, e.g. open_clip:{architecture}/{tags[0] if tags else 'none'}"
        )
    options = {} if size is None else {"force_image_size": size}
    whole, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=tag if pretrained and tag != "none" else None, **options
    )
    model = whole.visual  # pruning is about the image tower; the text tower is left behind
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
    library = _library("transformers", "transformers")
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


def _demo(name: str, pretrained: bool, size: int | None) -> Source:
    from . import demo

    if f"demo:{name}" == _DEMO_VLM:
        raise ValueError(
            f"demo:{name} is a vision-language model: saint chat, view, bench and eval vqa take it; an encoder is expected here"
        )
    if name not in demo.MODELS:
        raise ValueError(f"there is no demo:{name}; there are {', '.join(f'demo:{known}' for known in demo.MODELS)}")
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


_DEMO_VLM = "demo:small-llava"  # `loading_vlm` knows it

_SOURCES: dict[str, Callable[[str, bool, int | None], Source]] = {
    "timm": _timm,
    "hf": _hf,
    "open_clip": _open_clip,
    "demo": _demo,
}


# -- plans ------------------------------------------------------------------------------------------------------------


def read_plan(text: str) -> Plan:
    """The plan that ``text`` is (JSON), is in (a ``.json`` file) or names (a recipe).

    Raises:
        ValueError: none of these.
        OSError: the file cannot be read.
    """
    text = text.strip()
    if text.endswith(".json"):
        return Plan.from_json(Path(text).read_text(encoding="utf-8"))
    if text.startswith(("{", "[")) or _is_json(text):
        return Plan.from_json(text)
    return recipe(text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True  # 5, null or "text": no plan, and no recipe either


# -- images -----------------------------------------------------------------------------------------------------------


class Photo(NamedTuple):
    """An image that could be read."""

    name: str  # the file's without its ending, or with it where two files would share a name
    image: Image.Image  # upright, opaque, 8-bit RGB


class Unreadable(NamedTuple):
    """An image that could not."""

    name: str
    reason: str


def load_images(path: str | Path, limit: int | None = None) -> tuple[list[Photo], list[Unreadable]]:
    """Read an image, or those of a folder (not of its subfolders), by name.

    Args:
        path: a file, or a folder, in which files without an image's ending are passed over.
        limit: at most so many files.

    Returns:
        Those that could be read, and those that could not with the reason.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: an empty folder, or nothing that can be read.
    """
    from .demo.models import as_rgb

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such image or folder: {path}")
    if path.is_dir():
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in endings)
        if not files:
            raise ValueError(f"no images in the folder {path}: looked for .jpg, .png, .webp and the like")
    else:
        files = [path]
    good: list[Photo] = []
    bad: list[Unreadable] = []
    files = files[:limit]
    for name, file in zip(_names(files), files, strict=True):
        try:
            with Image.open(file) as image:
                good.append(Photo(name, as_rgb(image)))
        except UnidentifiedImageError:
            bad.append(Unreadable(file.name, "not an image that Pillow can read"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(Unreadable(file.name, " ".join(str(error).split()) or type(error).__name__))
    if not good:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
        raise ValueError(f"none of the {len(bad)} image(s) at {path} can be read ({reasons})")
    return good, bad


def _names(files: Sequence[Path]) -> list[str]:
    """A name per file, no two alike (also where upper and lower case are the same): pictures are written under them."""
    stems = Counter(file.stem.casefold() for file in files)
    names = [file.stem if stems[file.stem.casefold()] == 1 else file.name for file in files]
    whole = len({name.casefold() for name in names}) == len(names)
    return names if whole else [file.name for file in files]  # a.jpg, a.png and a.jpg.png
