"""Optional dependencies, imported on use."""

from importlib import import_module
from typing import Any

from .errors import MissingExtraError


def install_hint(extra: str) -> str:
    """The command that installs ``extra``: from a checkout, for there is no release in the index."""
    return f'pip install ".[{extra}]" in a checkout of saint'


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
        raise MissingExtraError(f"{root} is not installed: {install_hint(extra)}") from error
