"""Which releases of other libraries the full suite has passed on, and what to say on a newer one.

Versions decide nothing: what a release has is read off its modules. They are for messages.
"""

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# distribution -> oldest and newest release that the suite has passed on; docs/versions.md has the runs
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.15.0"),
    "transformers": ("5.10.1", "5.24.0"),  # encoders
    "timm": ("1.0.20", "1.0.31"),
    "open_clip_torch": ("3.0.0", "3.3.0"),
}
VLM_FLOOR = {"transformers": "5.17.0"}  # the oldest for vision-language models
_PACKAGES = {"open_clip": "open_clip_torch"}  # import name -> distribution, where they differ
_told: set[str] = set()


@cache  # the metadata of a package is read and parsed anew each time it is asked for
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
    """Return where the facts about ``library`` come from, for messages."""
    name = _PACKAGES.get(library, library)
    here = f"installed is {installed(name) or 'none'}"
    if name not in TESTED:  # of a spec that another package brought
        return f"its spec was registered for {name}, {here}"
    oldest, newest = TESTED[name]
    return f"known from {name} {oldest} to {newest}, {here}"


def releases(name: str, vlm: bool = False) -> tuple[str, str]:
    """Oldest and newest tested release of a distribution, for encoders or for vision-language models."""
    oldest, newest = TESTED[name]
    return (VLM_FLOOR.get(name, oldest) if vlm else oldest), newest


def warn_if_untested(*libraries: str, vlm: bool = False) -> None:
    """One warning per process and library whose installed release lies outside the tested ones."""
    for library in libraries:
        name = _PACKAGES.get(library, library)
        here = installed(name)
        if name not in TESTED or name in _told or here is None:
            continue
        oldest, newest = releases(name, vlm)
        if release(oldest) <= release(here) <= release(newest):
            continue
        _told.add(name)
        warnings.warn(
            f"{name} {here} is {'newer' if release(here) > release(newest) else 'older'} than the releases saint was tested "
            f"on ({oldest} to {newest}); a plan is refused where a model is not what saint knows. `saint check MODEL` proves "
            "that yours is pruned right",
            stacklevel=5,
        )
