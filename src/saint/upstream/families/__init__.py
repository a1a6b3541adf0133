"""Vision-language models, one file per family: its facts, the encoder that only it has, and its tiny models."""

from ..specs import FamilySpec
from . import gemma3, idefics, internvl, llava, llava_onevision, paligemma, qwen_vl

SPECS: tuple[FamilySpec, ...] = (
    *llava.SPECS,
    *llava_onevision.SPECS,
    *qwen_vl.SPECS,
    *internvl.SPECS,
    *gemma3.SPECS,
    *paligemma.SPECS,
    *idefics.SPECS,
)
