"""Golden records: what commands write and print, small enough to read in a diff, and how two of them are compared.

Figures are kept with six digits and compared to two parts in ten thousand, text with the numbers in it as they are printed, all
else exactly. What no reader checks is made smaller by a rule: a long list to its length, ends, mean and a checksum where it holds
integers; a picture to its size and mean colour.
"""

import base64
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HOME = Path(__file__).parents[1] / "golden"
RELATIVE, ABSOLUTE = 2e-4, 1e-6
ROUGH = 2e-3  # of logarithms of what a fit leaves over, where other processors round otherwise
NOISE = 1e-5  # errors of rounding, as they are printed
SIMULATED = (
    5e-3  # of shares of some hundred simulations: rounding turns over one or two that are level with the measured
)
LONG = 16  # numbers; a longer list is told by its ends and its mean
# facts of the machine, the day and the releases, by the name of the entry
LEFT_OUT = {
    "blas", "bytes", "cores", "cpu", "cpu_capability", "cuda", "cuda_available", "date", "device_name", "environment", "free",
    "hip", "mkldnn", "numpy", "open_clip", "pillow", "platform", "python", "saint", "timm", "torch", "torch_build",
    "transformers", "versions", "weights",
}  # fmt: skip


def small(value: Any) -> Any:
    """A record without facts of the machine, short."""
    if isinstance(value, Mapping):
        return {str(name): small(entry) for name, entry in value.items() if not _of_machine(name, entry)}
    if isinstance(value, str):
        return _picture(value) if value.startswith("data:image/") else value
    if isinstance(value, (list, tuple)):
        flat = list(_numbers(value))
        return _short(value, flat) if len(flat) > LONG else [small(entry) for entry in value]
    return _rounded(value)


def _of_machine(name: str, entry: Any) -> bool:
    """A method is called "saint" too, and what it did is no version."""
    return name in LEFT_OUT and (name != "saint" or (isinstance(entry, str) and entry[:1].isdigit()))


def _numbers(value: Any) -> Iterator[Any]:
    """The numbers of a list, or of a list of lists, of nothing else; nothing where there is something else."""
    found: list[Any] = []
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, (list, tuple)):
            waiting += reversed(entry)
        elif entry is None or isinstance(entry, (int, float)):
            found.append(entry)
        else:
            return
    yield from found


def _short(value: Any, flat: list[Any]) -> dict[str, Any]:
    real = [entry for entry in flat if entry is not None and math.isfinite(entry)]
    told = {
        "shape": _shape(value),
        "ends": [_rounded(entry) for entry in (*flat[:3], *flat[-3:])],
        "numbers": len(real),
    }
    if all(isinstance(entry, int) for entry in flat):
        return told | {"sum": sum(flat), "crc": zlib.crc32(json.dumps(flat).encode())}
    weights = [1 + place % 7 for place in range(len(real))]  # an exchange of two shows too
    mean = sum(w * entry for w, entry in zip(weights, real, strict=True)) / max(sum(weights), 1)
    return told | {"mean": _rounded(mean), "spread": _rounded(float(np.std(real)) if real else 0.0)}


def _shape(value: Any) -> list[int]:
    out = []
    while isinstance(value, (list, tuple)):
        out.append(len(value))
        value = value[0] if value else None
    return out


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _picture(uri: str) -> dict[str, Any]:
    return seen(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def seen(image: Image.Image) -> dict[str, Any]:
    """A picture: its size, and the mean of each channel and of each quarter."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    height, width = pixels.shape[:2]
    quarters = [
        pixels[rows, columns].mean()
        for rows in (slice(height // 2), slice(height // 2, None))
        for columns in (slice(width // 2), slice(width // 2, None))
    ]
    return {
        "size": [width, height],
        "colour": [round(float(v), 1) for v in pixels.mean((0, 1))],
        "quarters": [round(float(v), 1) for v in quarters],
    }


_SHARE = re.compile(r"\bp = (0\.\d+)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def differences(want: Any, got: Any, path: str = "", exact: bool = False) -> list[str]:
    """Where two golden records differ, each with what was there and what came.

    Args:
        exact: printed numbers are equal to the last digit: of pages made of fixed records, where nothing is rounded anew.
    """
    if isinstance(want, dict) and isinstance(got, dict):
        if "colour" in want and "colour" in got:  # a shade between two machines' decoders
            same = want["size"] == got["size"] and all(
                abs(a - b) <= 1 for key in ("colour", "quarters") for a, b in zip(want[key], got[key], strict=True)
            )
            return [] if same else [f"{path}: {want} there, {got} now"]
        names = [*want, *(name for name in got if name not in want)]
        return [
            line
            for name in names
            for line in (
                differences(want[name], got[name], f"{path}.{name}", exact)
                if name in want and name in got
                else [f"{path}.{name}: {'new' if name in got else 'gone'}"]
            )
        ]
    if isinstance(want, list) and isinstance(got, list):
        if len(want) != len(got):
            return [f"{path}: {len(want)} entries there, {len(got)} now"]
        return [
            line
            for i, pair in enumerate(zip(want, got, strict=True))
            for line in differences(*pair, f"{path}[{i}]", exact)
        ]
    if isinstance(want, str) and isinstance(got, str):
        shares = [[float(found) for found in _SHARE.findall(text)] for text in (want, got)]
        near = len(shares[0]) == len(shares[1]) and all(abs(a - b) <= SIMULATED for a, b in zip(*shares, strict=True))
        if near and not exact:
            want, got = _SHARE.sub("p = #", want), _SHARE.sub("p = #", got)
        same = (
            want == got
            if exact
            else _NUMBER.sub("#", want) == _NUMBER.sub("#", got)
            and all(map(_as_printed, _NUMBER.findall(want), _NUMBER.findall(got)))
        )
    elif isinstance(want, (int, float)) and isinstance(got, (int, float)) and bool not in (type(want), type(got)):
        whole = isinstance(want, int) and isinstance(got, int)
        same = (
            want == got
            if whole
            else math.isclose(want, got, rel_tol=ROUGH if ".bic." in path else RELATIVE, abs_tol=_least(path))
        )
    else:
        same = type(want) is type(got) and want == got
    return [] if same else [f"{path}: {want!r} there, {got!r} now"]


def _least(path: str) -> float:
    """The absolute difference that counts."""
    return SIMULATED if path.endswith((".p_smooth", ".p_permutation")) else ABSOLUTE


def _as_printed(want: str, got: str) -> bool:
    """Two printed numbers: whole ones are equal, others differ by their last digit at most, which rounding may turn over."""
    if want == got or ("e-" in want and "e-" in got and max(abs(float(want)), abs(float(got))) < NOISE):
        return True
    places = [len(text.partition(".")[2]) for text in (want, got)]
    if "e" in want + got or places[0] != places[1] or not places[0]:
        return "e" in want and math.isclose(float(want), float(got), rel_tol=1e-2)
    return abs(float(want) - float(got)) < 1.5 * 10.0 ** -places[0] and abs(float(want)) >= 10 ** (1 - places[0])


def write(name: str, record: Any) -> None:
    """Replace a golden record."""
    HOME.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\s+((?:[^\[\]{}\"]|(?<!\\)\"[^\"\n]{0,12}\")*?)\s+\]", _one_line, text)
    (HOME / f"{name}.json").write_text(text, encoding="utf-8")


def _one_line(found: re.Match[str]) -> str:
    inside = re.sub(r"\s*\n\s*", " ", found[1])
    return f"[{inside}]" if len(inside) < 160 else found[0]


def read(name: str) -> Any:
    """A golden record."""
    return json.loads((HOME / f"{name}.json").read_text(encoding="utf-8"))
