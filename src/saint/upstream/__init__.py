"""All that is assumed about other libraries' code, and nothing else: a renaming in a release is mended here.

``names`` spells arguments, methods and fields; ``specs`` says what a spec holds; ``timm``, ``transformers``, ``open_clip`` and
``families`` are the tables of specs, each with tiny models; ``registry`` adds what other packages bring; ``verify`` holds a
spec against an instance before anything is touched; ``versions`` says which releases the tests have seen.

The names below are what a package needs that brings a spec of its own, see :func:`register`.
"""

from .names import Role
from .registry import register
from .specs import BlockSpec, EncoderSpec, FamilySpec, RowLayout, RowSpec

__all__ = ["BlockSpec", "EncoderSpec", "FamilySpec", "Role", "RowLayout", "RowSpec", "register"]
