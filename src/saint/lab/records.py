"""Result files: what was measured, and under which conditions. JSON, written completely or not at all."""

import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_whole

VERSION = 1

# distributions whose version can change a number
_PACKAGES = {
    "torch": "torch",
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "numpy": "numpy",
    "pillow": "pillow",
}


def environment(device: Any = None) -> dict[str, Any]:
    """Everything about this machine and process that a number depends on; neither host name nor paths.

    Args:
        device: ``torch.device`` or its name; None means the best one there is.
    """
    import torch

    from ..upstream.versions import installed  # loads torch, which writing a file does not need

    cuda = torch.cuda.is_available()
    device = torch.device(device if device is not None else "cuda" if cuda else "cpu")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": _cores(),
        **{name: installed(distribution) for name, distribution in _PACKAGES.items()},
        "torch_build": {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "blas": "mkl" if torch.backends.mkl.is_available() else "other",
            "mkldnn": torch.backends.mkldnn.is_available(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" and cuda else cpu_name(),
        "cuda_available": cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def cpu_name() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # those this process may use, not those of the machine
    return os.cpu_count()


# a list of numbers that is indented, one on a line; in no string, since those hold no bare line breaks
_NUMBER = r"(?:-?\d[\d.eE+-]*|null|true|false)"
_NUMBERS = re.compile(rf"\[\s*\n\s*{_NUMBER}(?:,\n\s*{_NUMBER})*\n\s*\]")


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record, with the format's version, this library's and the date; readers never see half a file.

    Args:
        path: the file; its folder is made.
        record: plain data; NaN and infinity become null, which is what JSON has.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"--json needs a file name, {path} is a directory")
    head = {
        "version": VERSION,
        "saint": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(plain({**head, **record}), indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text)
    write_whole(path, text.encode())


def plain(value: Any) -> Any:
    """Return what JSON holds of a record: NaN and infinity become null, tuples lists, paths text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Tell what differs between settings of two runs, by dotted names: "plan.vision[0].method.threshold: 0.5 there, 0.6 now"."""
    old, new = dict(_leaves("", there)), dict(_leaves("", now))
    # as text: a budget of 1 is one token and one of 1.0 is all of them, and Python calls them equal
    changed = [name for name in {**old, **new} if json.dumps(old.get(name)) != json.dumps(new.get(name))]
    return "; ".join(f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} now" for name in sorted(changed))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}[{index}]", inner)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
