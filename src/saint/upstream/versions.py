"""Which releases of other people's libraries the whole suite has passed on, and what to say on a newer one.

Versions decide nothing: what a release has is read off its modules. They are for messages.
"""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

# distribution -> oldest and newest release that the suite has passed on; docs/versions.md has the runs
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.14.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "timm": ("1.0.20", "1.0.31"),
    "open_clip_torch": ("3.0.0", "3.3.0"),
}
_PACKAGES = {"open_clip": "open_clip_torch"}  # import name -> distribution, where they differ
_told: set[str] = set()


def installed(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """Leading numbers of a version, without a local or development part: "2.14.1+cpu" -> (2, 14, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def known_from(library: str) -> str:
    """Where the facts about ``library`` come from, for messages."""
    name = _PACKAGES.get(library, library)
    oldest, newest = TESTED[name]
    return f"known from {name} {oldest} to {newest}, installed is {installed(name) or 'none'}"


def warn_if_newer(*libraries: str) -> None:
    """One warning per process and library whose installed release is newer than any tested one."""
    for library in libraries:
        name = _PACKAGES.get(library, library)
        here = installed(name)
        if name not in TESTED or name in _told or here is None or release(here) <= release(TESTED[name][1]):
            continue
        _told.add(name)
        warnings.warn(
            f"{name} {here} is newer than the releases saint was tested on ({' to '.join(TESTED[name])}); a plan is refused "
            "where a model has changed beyond what saint knows. `saint check MODEL` proves that yours is pruned right",
            stacklevel=4,
        )
