"""What installed packages add through entry points. A group is read once per process, on first use."""

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError


def described(point: EntryPoint) -> str:
    """The entry point and the distribution it belongs to, for messages."""
    dist = point.dist
    package = f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"
    return f"{point.name} = {point.value} (entry point of {package}, group {point.group})"


@functools.cache
def points(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name; nothing is imported for them.

    Raises:
        PluginError: two distributions use the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        first = found.setdefault(point.name, point)
        if first.value != point.value:
            raise PluginError(f"two plug-ins have one name: {described(first)} and {described(point)}; uninstall one")
    return found


def load(point: EntryPoint) -> Any:
    """The object that ``point`` names.

    Raises:
        PluginError: it cannot be imported; the message names the distribution.
    """
    try:
        return point.load()
    except Exception as error:  # whatever its import runs into
        raise PluginError(
            f"cannot load {described(point)}: {type(error).__name__}: {error}; update or uninstall that package"
        ) from error
