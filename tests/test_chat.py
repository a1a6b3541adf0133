"""`saint chat` and `saint bench` of a vision-language model, through a checkpoint and a processor on disk."""

import json

import pytest
import torch
import transformers as hf
from PIL import Image
from test_cli import one_line, run  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, models, pre_tokenizers
from vlm_models import FAMILIES, IMAGE

from saint.loading_vlm import is_vlm, load_vlm

TEMPLATE = (
    "{% for m in messages %}USER: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
PLAN = json.dumps({"version": 1, "connector": {"method": {"method": "saint_full_graph", "keep": 9, "step": 4}}})


def save(path, template):
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


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return save(tmp_path_factory.mktemp("chatty"), TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_prompts_follow_the_template_or_the_image_token(spec, plain, picture):
    for name, first in ((spec, 127), (plain, IMAGE)):
        loaded = load_vlm(name)
        inputs = loaded.inputs(["what", "what w5 w6"], [Image.open(picture).convert("RGB")] * 2)
        ids = inputs["input_ids"]
        assert ((ids == IMAGE).sum(1) == 36).all()
        assert inputs["pixel_values"].shape == (2, 3, 24, 24)
        assert ids[1, 0] == first
        assert (inputs["attention_mask"][0] == 0).sum() == 2  # padded on the left
        assert not inputs["attention_mask"][0, :2].any()
        assert ids[0, -1] == (126 if name == plain else 1)


def test_chat(run, spec, picture, tmp_path):  # noqa: F811
    file = tmp_path / "chat.json"
    code, out, err = run(
        "chat", "--model", spec, "--image", picture, "--prompt", "what", "--plan", PLAN, "--max-new-tokens", 5, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    assert all(word in out for word in ("unpruned", "\npruned", "saint_full_graph"))
    record = json.loads(file.read_text())
    loaded = load_vlm(spec)
    inputs = loaded.inputs(["what"], [Image.open(picture)])
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answers = record["answers"]
    assert answers["unpruned"]["text"] == loaded.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert answers["pruned"]["new_tokens"] == answers["unpruned"]["new_tokens"] == 5
    assert answers["unpruned"]["kv_bytes"] - answers["pruned"]["kv_bytes"] == 27 * 5 * 2 * 2 * 12 * 4
    assert record["plan"]["connector"]["method"]["keep"] == 9


def test_bench_per_mode(run, spec, tmp_path):  # noqa: F811
    file = tmp_path / "bench.json"
    code, out, err = run("bench", spec, "--repeats", 1, "--warmup", 0, "--new-tokens", 2, "--batch", 2, "--json", file)
    assert code == 0, err
    record = json.loads(file.read_text())
    assert record["kind"] == "bench/generation"
    assert list(record["plans"]) == ["connector", "language", "vision", "hybrid"]
    assert all(name in out for name in ("unpruned", *record["plans"], "efficiency"))
    assert record["conditions"]["batch"] == 2
    assert record["conditions"]["new_tokens"] == 2
    assert all(gain["kv"] < 1 < gain["bound"] for gain in record["gains"].values())

    code, _, err = run("bench", spec, "--plan", PLAN, "--repeats", 1, "--warmup", 0, "--new-tokens", 1, "--json", file)
    assert code == 0, err
    assert list(json.loads(file.read_text())["plans"]) == ["plan"]


def test_encoders_are_no_vlm(spec, tmp_path):
    hf.CLIPConfig().save_pretrained(tmp_path)
    assert is_vlm(spec)
    assert not is_vlm(f"hf:{tmp_path}")
    assert not is_vlm("timm:test_vit")


def test_errors(run, spec, picture, tmp_path):  # noqa: F811
    ask = ["chat", "--image", picture, "--model"]
    one_line(run(*ask, "timm:test_vit")[2], "hf:NAME_OR_PATH")
    one_line(run(*ask, spec, "--plan", "llava-1.5/vti")[2], "unknown recipe")
    one_line(run(*ask, spec, "--plan", "llava-1.5/vit")[2], "out of range")
    one_line(run(*ask, spec, "--dtype", "int8")[2], "float32")
    one_line(run("chat", "--model", spec, "--image", tmp_path / "none.png")[2], "no such image")
    one_line(run("bench", spec, "--threshold", 0.5)[2], "--plan")
    hf.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path / "clip")
    one_line(run(*ask, f"hf:{tmp_path / 'clip'}")[2], "does not answer")
