"""Encoders by name, and devices."""

import difflib
import os

import torch

from .failures import explained
from .libraries import CHECKS, SOURCES
from .source import Source

FORMS = "timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG (NAME/none: random weights) or demo:NAME"


def find_source(spec: str, pretrained: bool = True, size: int | None = None) -> Source:
    """Load the encoder called ``spec`` through its own library.

    Args:
        spec: see :data:`FORMS`.
        pretrained: False gives random weights (always the same) and downloads none.
        size: side of the pictures in pixels; None means the model's own.

    Raises:
        ValueError: not such a name.
        MissingExtraError: the library is not installed.
        DownloadError: the weights cannot be fetched.
        UnsafeCheckpointError: the weights are a pickle of more than tensors.
    """
    library, name = _parted(spec)
    if size is not None and size < 1:
        raise ValueError(f"size must be a number of pixels >= 1, got {size}")
    with explained(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SOURCES[library](name, pretrained, size)


def check_source(spec: str) -> None:
    """Refuse a name that the installed library does not have; loads nothing, and asks no hub.

    Raises:
        ValueError: not such a name.
        MissingExtraError: the library is not installed.
    """
    library, name = _parted(spec)
    if library in CHECKS:
        CHECKS[library](name)


def _parted(spec: str) -> tuple[str, str]:
    """Library and name."""
    library, colon, name = spec.partition(":")
    if not colon or library not in SOURCES or not name:
        close = difflib.get_close_matches(library, SOURCES) if colon else []
        hint = f" (did you mean {close[0]}:{name}?)" if close else ""
        hint = " (a picture comes with --images)" if os.path.isfile(spec) else hint
        raise ValueError(f"a model is {FORMS}; got {spec!r}{hint}")
    return library, name


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
