"""`saint.demo`: models and pictures as the pages of the documentation use them."""

import pytest
import torch
from PIL import Image

import saint
from saint.lab import demo
from saint.lab.demo import scenes

pytest.importorskip("onnx", reason="needs .[demo]")
pytest.importorskip("skimage", reason="needs .[demo]")


@pytest.fixture(scope="module")
def clip():
    try:
        return saint.demo.model("clip-b16")
    except demo.DemoUnavailableError as error:
        pytest.skip(str(error))


def test_pictures_are_photographs_by_name():
    every = saint.demo.pictures()
    assert len(every) > 5
    assert all(picture.mode == "RGB" for picture in every)
    rocket, coffee = saint.demo.pictures("rocket", "coffee")
    assert rocket.tobytes() == dict(demo.photos())["rocket"].tobytes()
    assert coffee.tobytes() == dict(demo.photos())["coffee"].tobytes()
    with pytest.raises(ValueError, match=r"no photograph 'rockett'; there are astronaut, .*rocket"):
        saint.demo.pictures("coffee", "rockett")


def test_inputs_are_what_the_models_preprocessing_makes(clip):
    pictures = saint.demo.pictures("coffee", "rocket")
    inputs = saint.demo.inputs("clip-b16", pictures)
    assert list(inputs) == ["pixel_values"]
    expected = torch.stack([demo.MODELS["clip-b16"].preprocess(picture) for picture in pictures])
    assert torch.equal(inputs["pixel_values"], expected)
    assert torch.equal(saint.demo.inputs("clip-b16", pictures[1])["pixel_values"], expected[1:])
    assert not clip.training
    with torch.inference_mode():
        assert clip(**inputs).image_embeds.shape == (2, 512)


def test_inputs_of_a_question_are_those_of_its_processor():
    pictures = [saint.demo.scene(number).image() for number in (0, 1)]
    inputs = saint.demo.inputs("small-llava", pictures, "what word is written")
    one = saint.demo.processor()(images=pictures[1], text="<image> what word is written", return_tensors="pt")
    assert torch.equal(inputs["input_ids"][1:], one["input_ids"])
    assert torch.equal(inputs["pixel_values"][1:], one["pixel_values"])
    several = saint.demo.inputs("small-llava", pictures, ["what word is written", "how many things are there"])
    assert several["input_ids"].shape[0] == 2
    assert not torch.equal(several["input_ids"][0], several["input_ids"][1])


def test_scenes_are_held_out_and_always_the_same():
    assert saint.demo.scene(3).seed == scenes.HELD_OUT + 3
    assert saint.demo.scene(3) == saint.demo.scene(3) != saint.demo.scene(4)


BLANK = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: saint.demo.model("clip"), "no demo model 'clip'; there are clip-b16, dinov2-s, small-llava"),
        (lambda: saint.demo.processor("clip-b16"), r"clip-b16 takes pictures alone.*saint\.demo\.inputs\('clip-b16'"),
        (lambda: saint.demo.inputs("nothing", BLANK), "no demo model 'nothing'"),
        (lambda: saint.demo.inputs("clip-b16", []), "no images"),
        (lambda: saint.demo.inputs("clip-b16", BLANK, "what"), "takes pictures alone, got the prompt 'what'"),
        (lambda: saint.demo.inputs("small-llava", BLANK), r"one for each of the 1 picture\(s\); got None"),
        (lambda: saint.demo.inputs("small-llava", [BLANK], ["a", "b"]), r"one for each of the 1 picture\(s\)"),
        (lambda: saint.demo.scene(-1), "counted from 0, got -1"),
    ],
)
def test_what_there_is_not_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
