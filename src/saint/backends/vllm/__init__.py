"""vLLM's plug-in: visual tokens leave between projector and language model, by a fixed budget.

``register`` is the entry point ``saint`` of the group ``vllm.general_plugins``. vLLM calls it in each of its processes.
"""

import logging
import os

from ...errors import PluginError
from . import budget, names

logger = logging.getLogger(__name__)


def register() -> None:
    """Put a pruning subclass in place of each known architecture. A second call changes nothing.

    Raises:
        PluginError: this vLLM is not built as expected, and ``SAINT_PLAN`` asks for pruning. Without that it is a warning,
            and vLLM is left alone: an installed package must not break an engine that does not use it.
        ValueError: ``SAINT_PLAN`` is no plan that vLLM can follow.
    """
    budget.default()  # a bad plan is told before any model is loaded
    try:
        names.verify()
    except PluginError as error:
        if os.environ.get(budget.VARIABLE):
            raise
        logger.warning("visual tokens are not pruned: %s", error)
        return
    registry = names.model_registry()
    for architecture in names.ARCHITECTURES:
        registry.register_model(architecture, f"{__name__}.model:{architecture}")
