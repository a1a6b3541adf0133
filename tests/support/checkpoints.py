"""Vision-language models on disk, with a processor: what commands load by name."""

import json

import pytest
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from saint.lab import demo
from saint.lab.kinds import VLM
from saint.testing import zoo
from saint.upstream.names import IMAGE_TOKEN
from support.families import FAMILIES, IMAGE
from support.processors import processor

TEMPLATE = (
    "{% for m in messages %}USER: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
PLAN = json.dumps({"version": 1, "connector": {"method": {"method": "saint_full_graph", "keep": 9, "step": 4}}})


def save(path, template):
    """A tiny LLaVA with a processor and this chat template, in a folder: what MODEL is called."""
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, IMAGE)}, "<image>": IMAGE}
    words |= {f"w{i}": i for i in range(IMAGE + 1, 126)} | {"what": 126, "USER:": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", additional_special_tokens=["<image>"]
    )
    pictures = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    hf.LlavaProcessor(
        image_processor=pictures, tokenizer=fast, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(path)  # fmt: skip
    FAMILIES["llava-llama"].build().save_pretrained(path)
    return f"hf:{path}"


def save_tiles(path):
    """A tiny LLaVA-OneVision, whose tower cannot be shown smaller pictures, with its processor: what MODEL is called."""
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    made = processor(
        "llava_onevision", {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": pinpoints}, patch_size=4,
        num_image_tokens=64, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = zoo.build("llava_onevision")
    setattr(model.config, IMAGE_TOKEN.of(model.config), made.image_token_id)
    made.save_pretrained(path)
    model.save_pretrained(path)
    return f"hf:{path}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """MODEL: a tiny LLaVA on disk."""
    return save(tmp_path_factory.mktemp("chatty"), TEMPLATE)


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.fixture(scope="module")
def demo_llava():
    """The small LLaVA of the demo. Skips where the tower's wheel cannot be had."""
    pytest.importorskip("onnx", reason="needs .[demo]")
    try:
        return VLM.load("demo:small-llava")
    except demo.DemoUnavailableError as error:
        pytest.skip(str(error))
