"""What lmms-eval finds under the entry point `lmms_eval.models`. Light: it is loaded whenever lmms-eval starts."""

from typing import Any


def manifest() -> Any:
    """Registers ``--model saint_hf``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="saint_hf", chat_class_path="saint.lab.eval.lmms.SaintHF")
