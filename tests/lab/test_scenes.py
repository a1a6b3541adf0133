"""Generated scenes: the same from the same seed, and questions whose answers follow from the picture."""

import re

import pytest
import torch

from saint.lab.demo import scenes, small_llava
from saint.lab.eval import read_questions

SEEDS = range(60)


def test_a_seed_is_a_scene():
    assert scenes.scene(3) == scenes.scene(3)
    assert scenes.scene(3) != scenes.scene(4)
    assert scenes.scene(3).questions(2) == scenes.scene(3).questions(2)
    assert scenes.scene(3).questions(2) != scenes.scene(3).questions(2, draw=1)


def test_things_do_not_touch_and_stay_inside():
    for seed in SEEDS:
        things = scenes.scene(seed).things
        for i, a in enumerate(things):
            assert a.radius <= a.x <= scenes.SIDE - a.radius
            assert a.radius <= a.y <= scenes.SIDE - a.radius
            for b in things[:i]:
                assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2


def _answer(scene: scenes.Scene, text: str) -> str:
    """The answer read off the text of the question alone, independently of how it was made."""

    def find(words: str) -> list[scenes.Thing]:
        return [t for t in scene.things if set(words.split()) <= {t.colour, t.shape}]

    if found := re.fullmatch(r"what color is the (\w+)", text):
        (thing,) = find(found[1])
        return thing.colour
    if found := re.fullmatch(r"what shape is the thing in (\w+)", text):
        (thing,) = find(found[1])
        return thing.shape
    if found := re.fullmatch(r"how many things (?:are|have the shape) (\w+)", text):
        return scenes.NUMBERS[len(find(found[1]))]
    if found := re.fullmatch(r"where is the (\w+ \w+)", text):
        (thing,) = find(found[1])
        return f"{'top' if thing.y < 112 else 'bottom'} {'left' if thing.x < 112 else 'right'}"
    if found := re.fullmatch(r"is the (\w+ \w+) (left of|above) the (\w+ \w+)", text):
        (a,), (b,) = find(found[1]), find(found[3])
        return "yes" if (a.x < b.x if found[2] == "left of" else a.y < b.y) else "no"
    if found := re.fullmatch(r"is there any (\w+ \w+)", text):
        return "yes" if find(found[1]) else "no"
    assert text == "what word is written"
    return scene.word


def test_every_answer_follows_from_the_scene():
    asked = set()
    for seed in SEEDS:
        scene = scenes.scene(seed)
        for question in scene.questions(3):
            assert question.answer == _answer(scene, question.text), question
            asked.add(question.category)
    assert asked == set(scenes.CATEGORIES)


def test_every_word_is_in_the_vocabulary():
    tokenizer = pytest.importorskip("transformers") and small_llava.tokenizer()
    for seed in SEEDS:
        for question in scenes.scene(seed).questions(3):
            ids = tokenizer(f"{question.text} {question.answer}").input_ids
            assert tokenizer.unk_token_id not in ids, question
            assert tokenizer.decode(ids) == f"{question.text} {question.answer}"


def test_the_picture_shows_the_things():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    right = 0
    for seed in SEEDS:
        scene = scenes.scene(seed)
        image = scene.image()
        assert (image.size, image.mode) == ((scenes.SIDE, scenes.SIDE), "RGB")
        solid = [t for t in scene.things if t.shape in ("circle", "square", "star", "cross")]  # filled at the centre
        for t in solid:
            seen = image.getpixel((round(t.x), round(t.y)))
            nearest = min(
                scenes.COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(scenes.COLOURS[c], seen, strict=True))
            )
            right += nearest == t.colour
            assert nearest == t.colour, (seed, t, seen)
    assert right > 100


def test_the_model_is_a_llava_that_takes_its_processor():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, processor = small_llava.blank(), small_llava.processor()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    size = sum(value.numel() for value in small_llava.trained_state(model).values()) * 2
    assert size < 8e6  # bytes in float16
    from PIL import Image

    inputs = processor(
        images=[Image.new("RGB", (300, 200))], text=["<image> what color is the star"], return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == small_llava.IMAGE_TOKENS
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 2


def test_scenes_become_a_question_file(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    file = scenes.save(tmp_path / "held", 3)
    questions, bad = read_questions(file, file.parent)
    wanted = [q for i in range(3) for q in scenes.scene(scenes.HELD_OUT + i).questions()]
    assert not bad
    assert [(q.question, q.answers, q.category) for q in questions] == [
        (q.text, (q.answer,), q.category) for q in wanted
    ]
    assert all(q.image.exists() for q in questions)


def test_the_command_says_how_it_is_used():
    for wrong in ([], ["a"], ["a", "0"], ["a", "many"]):
        with pytest.raises(SystemExit, match="FOLDER COUNT"):
            scenes.main(wrong)
