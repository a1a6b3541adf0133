"""What goes wrong when weights are fetched, told in one line: no network, or a pickle that could run code."""

import contextlib
import pickle
from collections.abc import Iterator

from ...errors import SaintError


class DownloadError(SaintError, OSError):
    """A model's weights could not be fetched."""


class UnsafeCheckpointError(SaintError, ValueError):
    """A model's weights are a pickle that could run any code; it was not loaded."""


# names, because the classes belong to httpx, httpcore, requests, urllib and huggingface_hub, whichever is in use
_UNREACHABLE = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ProxyError",
    "ReadTimeout",
    "URLError",
    "gaierror",
}


@contextlib.contextmanager
def explained(spec: str) -> Iterator[None]:
    """Says of an error inside the block, wherever it comes from, what it means for the user.

    Args:
        spec: what is being loaded, for the message.

    Raises:
        DownloadError: no network, or the hub does not answer.
        UnsafeCheckpointError: a pickle of more than tensors.
    """
    try:
        yield
    except SaintError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, pickle.UnpicklingError):
                raise UnsafeCheckpointError(
                    f"the weights of {spec} are a pickle that holds more than tensors, or is damaged; loading such a file can "
                    "run any code in it, so it was not loaded: give safetensors weights (load it where you trust it, then "
                    "save_pretrained, or safetensors.torch.save_file)"
                ) from error
            if not _UNREACHABLE.isdisjoint(cls.__name__ for cls in type(cause).__mro__):
                raise DownloadError(
                    f"could not download {spec} ({_line(cause)}): no network, or the hub does not answer. "
                    "demo:clip-b16 works offline; --no-pretrained runs random weights"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:120]
