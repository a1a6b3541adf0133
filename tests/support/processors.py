"""Processors of transformers with the settings of their classes and a small tokenizer: nothing is downloaded."""

import inspect
import re
import sys
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as SOUNDS
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as PICTURES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES as PROCESSORS
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES as VIDEOS

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "what", "is", "this"]
# what the repository of a checkpoint says beside the class
SAID = {"num_image_tokens": 729, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
OWN = {"aya_vision": {"img_size": 384, "patch_size": 32}, "mistral3": {"patch_size": 16}}
LENGTHS = {"gemma3n": 256, "paligemma": 256}  # tokens of a picture, said by the image processor's file


def here(*kinds: str) -> list[str]:
    """Return those of the types of models that this release has."""
    return [kind for kind in kinds if hasattr(hf, PROCESSORS.get(kind, "none"))]


def tokenizer(processor: type) -> Any:
    """One that knows a few words and the tokens that the module of a processor names, or reads off its tokenizer."""
    source = inspect.getsource(sys.modules[processor.__module__])
    literal = dict.fromkeys(re.findall(r"""['"](<[^"'<> {}]+>|\[[A-Z_]+\]|\][^"'\s]+\[)['"]""", source))
    read = re.findall(r'tokenizer(?:\.|, ")([a-z_]+_token)\b', source)
    special = {name: f"<{name}>" for name in read if not name.startswith(("add_", "pad_", "unk_", "bos_", "eos_"))}
    special |= {"image_token": "<image>"} | {f"literal_{i}": token for i, token in enumerate(literal)}
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*WORDS, *special.values()]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        padding_side="left", extra_special_tokens=special,
    )  # fmt: skip


def processor(kind: str, pictures: dict[str, Any] | None = None, **said: Any) -> Any:
    """The processor of a type of models, e.g. "qwen2_vl".

    Args:
        kind: the type.
        pictures: settings of its image processor.
        said: its own settings.
    """
    cls = getattr(hf, PROCESSORS[kind])
    wanted = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {"tokenizer": tokenizer(cls)}
    for name, classes in (("image_processor", PICTURES), ("video_processor", VIDEOS), ("feature_extractor", SOUNDS)):
        if name in wanted and (found := _first(classes.get(kind))):
            parts[name] = getattr(hf, found)(**(pictures or {} if name == "image_processor" else {}))
    if kind in LENGTHS:
        parts["image_processor"].image_seq_length = LENGTHS[kind]
    patch = getattr(parts["image_processor"], "patch_size", None)
    usual = {**SAID, "patch_size": patch if isinstance(patch, int) else 14, **OWN.get(kind, {})}
    return cls(**parts, **{name: value for name, value in usual.items() if name in wanted} | said)


def _first(found: Any) -> Any:
    """The class, of those for different libraries of pictures that which comes first."""
    return next((one for one in found.values() if one), None) if isinstance(found, dict) else found
