"""Real photographs inside the scikit-image and scikit-learn wheels: nothing is downloaded."""

from pathlib import Path

from PIL import Image

from ...extras import require

_SKIMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
)
_SKLEARN = ("china.jpg", "flower.jpg")


def photos() -> list[tuple[str, Image.Image]]:
    """Names and RGB photographs; those that the installed releases do not ship are left out.

    Raises:
        MissingExtraError: scikit-image or scikit-learn is missing.
    """
    skimage, sklearn = require("skimage", "demo"), require("sklearn", "demo")
    folders = [
        (Path(skimage.__file__).parent / "data", _SKIMAGE),
        (Path(sklearn.__file__).parent / "datasets" / "images", _SKLEARN),
    ]
    files = [folder / name for folder, names in folders for name in names if (folder / name).exists()]
    return [(file.stem, Image.open(file).convert("RGB")) for file in files]
