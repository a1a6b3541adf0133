"""Errors of this library. Each also is the builtin error it refines, so ``except ValueError`` keeps working."""

import difflib
from collections.abc import Sequence


class SaintError(Exception):
    """Base of every error raised on purpose by this library."""


class UnsupportedModelError(SaintError, ValueError):
    """No supported encoder found in the model, or it cannot do what the plan asks."""


class AlreadyAppliedError(SaintError, RuntimeError):
    """The model already carries a session."""


class ParityError(SaintError, RuntimeError):
    """A block recomposed from its own modules does not reproduce its own forward: the model is not what we know."""


class HookNeverFiredError(SaintError, RuntimeError):
    """A module whose output is needed was never called."""


class MissingExtraError(SaintError, ImportError):
    """An optional dependency is missing; the message names the extra."""


class PluginError(SaintError, ImportError):
    """What an installed package adds through an entry point cannot be used; the message names the package."""


class UnknownSettingError(SaintError, TypeError):
    """A method was given a setting that it has not.

    Args:
        method: its class.
        setting: what was given.
        known: what there is.
    """

    def __init__(self, method: str, setting: str, known: Sequence[str]) -> None:
        close = difflib.get_close_matches(setting, known)
        if setting in _SAME and (same := [name for name in _SAME if name in known]):
            close = same
        hint = f"did you mean {' or '.join(close)}? It" if close else "it"
        super().__init__(f"{method} has no setting {setting!r}; {hint} has: {', '.join(known) or 'none'}")


_SAME = ("keep", "budget", "r", "ratio", "num_tokens", "compression_ratio")  # what others call the number of tokens
