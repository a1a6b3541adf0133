"""Optional dependencies, imported on use."""

from importlib import import_module
from typing import Any

from .errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """The optional module called ``module``.

    Args:
        module: name of the import, e.g. "sklearn" or "PIL.Image".
        extra: of this library's package that brings it, e.g. "eval".

    Raises:
        MissingExtraError: not installed; the message names the extra.
        ImportError: installed, but broken: an import inside of it failed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        if error.name not in (None, root, module):
            raise  # its own message says more
        raise MissingExtraError(f'{root} is not installed: pip install "saint-vlm[{extra}]"') from error
