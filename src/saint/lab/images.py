"""Image files as every model here is given them: upright, opaque, 8-bit RGB; and images as text inside other files."""

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# what Pillow's decoders raise on broken files besides OSError and ValueError
BROKEN = (SyntaxError, EOFError, RuntimeError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
_LONGEST = 300  # characters of a reason


def as_rgb(image: Image.Image) -> Image.Image:
    """Upright, opaque (on white), 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # greys of 12, 16, 32 bits and floats do not fit convert()
        image = _grey(np.asarray(image, dtype=np.float64))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """Greys of any range in 8 bits: 0 (the lowest value, where that is negative) is black, the highest value is white.

    Files do not say which range they use (12 bits in 16, floats to 1 or to 255), and a guess from the values would jump.

    Raises:
        ValueError: values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a grey picture with values that are not finite: replace NaN and inf first")
    low = min(0.0, float(values.min()))
    span = float(values.max()) - low
    return Image.fromarray(((values - low) / (span or 1.0) * 255).round().astype(np.uint8))


def read_image(source: Path | bytes) -> Image.Image:
    """An image as upright, opaque, 8-bit RGB.

    Raises:
        ValueError: it cannot be decoded.
        OSError: it cannot be read.
    """
    if isinstance(source, Path) and not source.exists():
        link = f" (a link to {source.readlink()}, which is not there)" if source.is_symlink() else ""
        raise FileNotFoundError(f"no such image: {source}{link}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return as_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("not an image that Pillow can read") from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(reason(error)) from error


def mark(source: Path | Image.Image) -> int:
    """Return what tells a picture from another under its name, cheaply: the bytes of a file, a checksum of pixels in memory.

    -1 where there is none; reading it says why.
    """
    try:
        if isinstance(source, Path):
            return source.stat().st_size
        about = repr((source.mode, source.size, source.getpalette(), source.info.get("transparency")))
        return zlib.crc32(source.tobytes(), zlib.crc32(about.encode()))
    except (OSError, ValueError, *BROKEN):
        return -1


def endings() -> set[str]:
    """File endings of the formats that the installed Pillow reads, lower case with a point: {".jpg", ".png", ...}."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


SAFE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_PREFIX = "data:image/jpeg;base64,"


def read_untrusted(data: bytes, pixels: int = 40_000_000) -> Image.Image:
    """An image from untrusted bytes as upright, opaque, 8-bit RGB; the first frame of an animation.

    The size is read off the header before anything is decoded, and only decoders of ``SAFE_FORMATS`` see the bytes, whatever a
    file is called.

    Args:
        data: contents of a file.
        pixels: width x height of the largest image that is decoded.

    Raises:
        ValueError: of another format, too large, or broken.
    """
    expected = f"a {', '.join(SAFE_FORMATS[:-1])} or {SAFE_FORMATS[-1]} image is expected"
    most = f"at most {pixels / 1e6:.0f} million pixels are decoded; scale it down"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            with Image.open(io.BytesIO(data), formats=SAFE_FORMATS) as image:
                width, height = image.size
                small = width * height <= pixels
                whole = as_rgb(image) if small else image
    except UnidentifiedImageError as error:
        raise ValueError(f"{expected}; the contents are none of these, whatever the file is called") from error
    except Image.DecompressionBombError as error:  # twice Pillow's own limit, also by the header alone
        raise ValueError(f"the image is too large ({reason(error)}): {most}") from error
    except (OSError, *BROKEN, MemoryError, ValueError) as error:
        raise ValueError(f"the image is damaged ({reason(error)}); {expected}") from error
    if not small:
        raise ValueError(f"the image is too large ({width} x {height} pixels): {most}")
    return whole


def reason(error: BaseException) -> str:
    """Say why an image could not be read, in one line of a sane length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def data_uri(image: Image.Image, side: int = 320, limit: int = 30_000) -> str:
    """A small JPEG of ``image`` as text: "data:image/jpeg;base64,...".

    Args:
        image: RGB.
        side: pixels of its longer side at most.
        limit: length of the text at most; quality, then size go down until it fits.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    while True:
        for quality in (85, 70, 50):
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            text = _PREFIX + base64.b64encode(buffer.getvalue()).decode()
            if len(text) <= limit or max(small.size) <= 32:
                return text
        small = small.resize((max(1, small.width * 4 // 5), max(1, small.height * 4 // 5)), Image.Resampling.LANCZOS)
