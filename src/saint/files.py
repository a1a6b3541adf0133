"""Files that are written completely or not at all, and where those are kept that can be made again."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of what can be made again: ``$SAINT_CACHE``, else one in the user's cache (``$XDG_CACHE_HOME``)."""
    if path := os.environ.get("SAINT_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saint"


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that readers see all of it or what was there before: into a temporary file beside it, then renamed.

    Args:
        path: the file; its folder is made.
        data: its contents.

    Raises:
        OSError: it cannot be written (a full disk, say); nothing is left behind, and the message names ``path``.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, 0o666 & ~umask)  # mkstemp's files are private
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write the file ({error.strerror or error})", str(path)) from error
