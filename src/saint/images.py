"""Image files as every model here is given them: upright, opaque, 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def as_rgb(image: Image.Image) -> Image.Image:
    """Upright, opaque (on white), 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys do not fit convert()
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(source: Path | bytes) -> Image.Image:
    """An image as upright, opaque, 8-bit RGB.

    Raises:
        ValueError: it cannot be decoded.
        OSError: it cannot be read.
    """
    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(f"no such image: {source}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return as_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("not an image that Pillow can read") from error
    except (SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises on some broken files
        raise ValueError(" ".join(str(error).split())) from error


def endings() -> set[str]:
    """File endings of the formats that the installed Pillow reads, lower case with a point: {".jpg", ".png", ...}."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
