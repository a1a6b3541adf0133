"""Errors of this library. Each also is the builtin error it refines, so ``except ValueError`` keeps working."""


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
