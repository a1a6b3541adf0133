"""Smaller pictures through processors of the real classes: fewer tokens as asked, or an error that says what is possible."""

import re

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import saint
from saint.errors import UnsupportedModelError
from saint.testing import zoo
from saint.testing.shrink import shrunken
from saint.testing.twins import grown
from saint.upstream.names import IMAGE_FEATURES, IMAGE_TOKEN, POOLED
from saint.vlm.prompts import with_picture
from support.processors import here, processor

SHAPES = [(640, 480), (200, 700), (900, 300), (1900, 1300), (500, 500)]  # width and height
# what is turned down, by type; of both, that which leaves more tokens of the picture at hand
FOLLOW = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "apertus1p5", "cosmos3_edge", "lfm3_vl", "video_llama_3"]
FOLLOW += ["mistral3", "lighton_ocr", "kimi_k25", "minimax_m3_vl", "muse_spark", "hy_v4_vl"]
TILES = ["internvl", "aya_vision", "cohere2_vision", "idefics3", "llama4", "perception_lm", "granite_docling"]
TILES += ["lfm2_vl", "llava_next", "llava_onevision", "granite4_vision", "minicpmv4_6", "molmo2"]
LISTED = ["gemma4", "gemma4_unified", "aria"]  # take some numbers alone
FIXED = ["llava", "vipllava", "gemma3", "gemma3n", "paligemma", "deepseek_vl", "janus", "chameleon"]


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def tokens(made, images, options=None):
    """Visual tokens of a prompt with pictures: what stands in it most often."""
    text = " ".join(with_picture(made, "what is this ?") for _ in images)
    ids = made(text=[text], images=[list(images)], return_tensors="pt", **(options or {}))["input_ids"][0]
    return int(ids.bincount().max())


@pytest.fixture(scope="module")
def made():
    known = {}
    return lambda kind: known.setdefault(kind, processor(kind))


# -- as many as asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", here(*FOLLOW, *TILES, *LISTED))
def test_fewer_tokens_as_asked(kind, made):
    for shape in (
        (640, 480),
        (1900, 1300),
        *(SHAPES[1:3] if kind not in TILES else ()),
    ):  # of long ones some have few tiles
        image = picture(*shape)
        found = saint.smaller_pictures(made(kind), [image], 0.6)
        (before,), (after,) = found.before, found.after
        assert before == tokens(made(kind), [image])
        assert after == tokens(made(kind), found.images, found.options)
        assert 0 < after <= 0.6 * before
        if found.by == "picture":
            assert found.options == {}
            assert found.images[0].width < image.width
            assert found.images[0].width / found.images[0].height == pytest.approx(shape[0] / shape[1], rel=0.03)
        else:
            assert found.images[0] is image
            assert found.by.split(".")[0] in found.options


@pytest.mark.parametrize("kind", here("qwen2_vl", "apertus1p5", "mistral3", "kimi_k25", "muse_spark"))
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_what_follows_the_size_comes_near(kind, share, made):
    for shape in SHAPES:
        found = saint.smaller_pictures(made(kind), [picture(*shape)], share)
        assert 0.7 * share < found.after[0] / found.before[0] <= share, shape


def test_a_picture_above_the_cap_is_shrunk_from_the_cap(made):
    qwen, large, larger = made("qwen2_vl"), picture(1900, 1300), picture(3800, 2600)
    found, again = (saint.smaller_pictures(qwen, [image], 0.5) for image in (large, larger))
    assert found.before[0] == again.before[0]  # both are more than the processor shows
    assert found.by == again.by == "picture"
    assert found.images[0].size == pytest.approx(again.images[0].size, rel=0.02)
    assert found.after[0] > 0.47 * found.before[0]


def test_at_most_so_many_tokens(made):
    few, many = picture(200, 200), picture(900, 600)
    found = saint.smaller_pictures(made("qwen2_vl"), [few, many], 100)
    assert found.before[0] <= 100 < found.before[1]
    assert found.images[0] is few
    assert found.after[0] == found.before[0]
    assert 80 < found.after[1] <= 100
    again = saint.smaller_pictures(made("internvl"), [many], 256)
    assert again.after == (256,)  # without the marks around it


def test_nothing_to_do(made):
    image = picture(300, 200)
    for pixels in (1.0, 10_000):
        found = saint.smaller_pictures(made("qwen2_vl"), [image], pixels)
        assert found.images == [image]
        assert found.images[0] is image
        assert (found.options, found.by, found.before) == ({}, None, found.after)
    assert saint.smaller_pictures(made("qwen2_vl"), [], 0.5).images == []


@pytest.mark.parametrize("kind", ["gemma4", "qwen2_vl", "idefics3"])
def test_one_call_for_pictures_of_several_shapes(kind, made):
    images = [picture(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    found = saint.smaller_pictures(made(kind), images, 0.5)
    alone = [tokens(made(kind), [image], found.options) for image in found.images]
    assert list(found.after) == alone
    assert all(after <= 0.5 * before for after, before in zip(found.after, found.before, strict=True))
    assert tokens(made(kind), found.images, found.options) == sum(found.after)


def test_numbers_that_a_processor_takes_are_found_by_trying(made):
    by_share = {share: saint.smaller_pictures(made("gemma4"), [picture(640, 480)], share) for share in (0.5, 0.25)}
    assert [found.options for found in by_share.values()] == [{"max_soft_tokens": 140}, {"max_soft_tokens": 70}]
    found = saint.smaller_pictures(made("aria"), [picture(640, 480)], 0.5)
    assert (found.options, found.after) == ({"max_image_size": 490}, (128,))


def test_tiles_are_fewer_and_no_picture_is_shrunk_to_be_made_larger(made):
    for shape in (64, 48), (640, 480):  # a picture of 2 x 2 would be one tile as well
        image = picture(*shape)
        found = saint.smaller_pictures(made("internvl"), [image], 0.2)
        assert found.by == "max_patches"
        assert found.images[0] is image


def test_what_there_is_at_least_goes_down_too(made):
    found = saint.smaller_pictures(made("lfm2_vl"), [picture(64, 48)], 0.5)  # enlarged to the least that there is
    assert found.by == "max_image_tokens"
    assert found.options["min_image_tokens"] == found.options["max_image_tokens"]
    assert found.before[0] >= 64
    assert found.after[0] > 0.3 * found.before[0]
    # whose own count overlooks this option
    assert saint.smaller_pictures(made("qwen2_vl"), [picture(64, 48)], 0.5).after == (2,)
    for kind in here("cosmos3_edge"):
        size = saint.smaller_pictures(made(kind), [picture(64, 48)], 0.5).options["size"]
        assert size["longest_edge"] == size["shortest_edge"]


def test_palettes_and_masks_are_resized_in_colour(made):
    for mode in ("P", "1", "L", "RGBA"):
        found = saint.smaller_pictures(made("qwen2_vl"), [picture(400, 300).convert(mode)], 0.5)
        assert found.images[0].mode == {"P": "RGB", "1": "RGB"}.get(mode, mode)
        assert tokens(made("qwen2_vl"), found.images) == found.after[0]


def test_through_a_chat_template():
    qwen = processor("qwen2_vl")
    qwen.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<|image_pad|>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    ).replace("<|image_pad|>", qwen.image_token)
    for found in (
        saint.smaller_pictures(qwen, [picture(640, 480)], 0.5),
        saint.smaller_pictures(qwen, [picture(56, 56)], 0.5),
    ):
        chat = [
            {"role": "user", "content": [{"type": "image", "image": found.images[0]}, {"type": "text", "text": "what"}]}
        ]
        inputs = qwen.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=found.options
        )
        assert int((inputs["input_ids"] == qwen.image_token_id).sum()) == found.after[0]


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", here(*FIXED))
def test_a_fixed_number_of_tokens_is_an_error(kind, made):
    image = picture(640, 480)
    with pytest.raises(UnsupportedModelError, match="whatever is turned down") as raised:
        saint.smaller_pictures(made(kind), [image], 0.5)
    assert f"makes {tokens(made(kind), [image])} visual tokens of a picture of 640 x 480" in str(raised.value)
    assert "saint.Plan(pixels=...)" in str(raised.value)


@pytest.mark.parametrize("kind", ["gemma4", "internvl", "llava_next", "llava_onevision", "aria", "lfm2_vl"])
def test_the_least_that_is_possible_is_said_and_possible(kind, made):
    image = picture(640, 480)
    for tiny in (0.05, 7):
        with pytest.raises(ValueError, match="the least that was found is pixels=") as raised:
            saint.smaller_pictures(made(kind), [image], tiny)
        assert "max_" in str(raised.value) or kind.startswith("llava")
        least = re.search(r"pixels=([\d.]+),", str(raised.value))[1]
        found = saint.smaller_pictures(made(kind), [image], float(least) if isinstance(tiny, float) else int(least))
        assert found.after[0] < found.before[0]
        if found.by == "picture":  # and with as little it shows next to nothing
            assert found.images[0].width * found.images[0].height > 40 * found.after[0]


def test_a_picture_of_one_tile_holds_back_the_others(made):
    images = [picture(640, 480), picture(500, 500)]
    with pytest.raises(ValueError, match="makes 256 visual tokens of a picture of 500 x 500 whatever") as raised:
        saint.smaller_pictures(made("internvl"), images, 0.5)
    assert not isinstance(raised.value, UnsupportedModelError)  # of the picture, not of the model
    found = saint.smaller_pictures(made("internvl"), images, 300)  # a number is no less than it has
    assert found.after == (256, 256)


def test_a_processor_without_visual_tokens():
    with pytest.raises(UnsupportedModelError, match="MllamaProcessor writes no visual tokens"):
        saint.smaller_pictures(processor("mllama"), [picture(640, 480)], 0.5)


@pytest.mark.parametrize("pixels", [0, 0.0, -1, 1.5, True, "0.5", None, float("nan")])
def test_what_is_neither_a_share_nor_a_number(pixels, made):
    with pytest.raises(ValueError, match="pixels is a share of the visual tokens"):
        saint.smaller_pictures(made("qwen2_vl"), [picture(64, 64)], pixels)


def test_what_is_no_picture(made):
    with pytest.raises(TypeError, match="images are PIL images; got ndarray"):
        saint.smaller_pictures(made("qwen2_vl"), [np.zeros((64, 64, 3), np.uint8)], 0.5)


# -- through models -------------------------------------------------------------------------------------------------------

# settings of image processors and processors that fit the small models
SMALL = {
    "gemma4": ({"patch_size": 4}, {}),
    "qwen2_vl": ({"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 96 * 96}}, {}),
    "mistral3": ({"patch_size": 4, "size": {"longest_edge": 64}}, {"patch_size": 4, "spatial_merge_size": 2}),
    "internvl": ({"size": {"height": 32, "width": 32}}, {"image_seq_length": 16}),
    "idefics3": ({"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}, {"image_seq_len": 16}),
    "llava_onevision": (
        {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
        {"patch_size": 4, "num_image_tokens": 64, "vision_feature_select_strategy": "full"},
    ),
    "lfm2_vl": ({"encoder_patch_size": 4, "tile_size": 32, "min_image_tokens": 4, "max_image_tokens": 16}, {}),
}


def small(kind):
    if kind != "gemma4":
        return zoo.build(kind)
    # its configuration has no tower unless one is given
    return grown(hf.Gemma4ForConditionalGeneration, shrunken(hf.Gemma4Config(vision_config=hf.Gemma4VisionConfig())))


@pytest.mark.parametrize("kind", SMALL)
def test_a_model_takes_them(kind):
    pictures, said = SMALL[kind]
    made, model = processor(kind, pictures, **said), small(kind)
    setattr(model.config, IMAGE_TOKEN.of(model.config), made.image_token_id)
    images = [picture(90, 70), picture(60, 90, 1)]
    found = saint.smaller_pictures(made, images, 0.75)
    assert sum(found.after) < sum(found.before)
    for shown, options, counts in ((images, {}, found.before), (found.images, found.options, found.after)):
        text = [with_picture(made, "what is this ?")] * len(images)
        inputs = made(text=text, images=[[image] for image in shown], return_tensors="pt", padding=True, **options)
        assert (inputs["input_ids"] == made.image_token_id).sum(1).tolist() == list(counts)
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()  # it refuses what does not match its features
            asked = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
            asked.pop("mm_token_type_ids", None)
            features = POOLED.get(IMAGE_FEATURES.get(model.model)(**asked))
        rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        assert rows.flatten(0, -2).shape[0] == sum(counts)
