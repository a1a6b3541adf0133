"""What is measured of values that are not finite: an error of their row, or a refusal; the rows beside it are as they were."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab.eval import Question, evaluate_images, evaluate_vqa
from saint.lab.kinds import VLM, Encoder, around
from saint.lab.sources.items import Item
from saint.lab.sources.samples import Samples
from saint.lab.tuning.trials import Trials
from saint.methods import Random
from saint.plans import Plan
from saint.samples import read_samples
from support.checkpoints import PLAN, TEMPLATE, save
from support.models import build
from support.records import by_key

HALF = Plan(vision=saint.Stage(Random(keep=0.5), layers=[1]))
VALUES = [torch.nan, torch.inf, -torch.inf]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("row", "place"), [(0, 0), (1, -1), (2, 7)])
def test_an_embedding_with_one_number_that_is_not_finite_is_an_error_of_its_row(
    tmp_path, monkeypatch, value, row, place
):
    pytest.importorskip("pyarrow")
    from saint.lab.embed import embed
    from saint.lab.kinds.features import Features

    for number in range(3):
        noise(number).save(tmp_path / f"{number}.png")
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    good = by_key(embed(tmp_path, loaded, HALF, batch=3))
    real = Features.__call__

    def poisoned(self, inputs):
        features, logits = real(self, inputs)
        features = features.clone()
        features[row, place] = value
        return features, logits

    monkeypatch.setattr(Features, "__call__", poisoned)
    made = embed(tmp_path, loaded, HALF, batch=3)
    found = by_key(made)
    bad = found.pop(f"{row}.png")
    assert (bad["embedding"], bad["error"]) == (None, "the embedding is not finite")
    assert made.errors == 1
    assert found == {key: one for key, one in good.items() if key != f"{row}.png"}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("variant", ["base", "half"])
@pytest.mark.parametrize("what", ["features", "logits"])
def test_a_picture_whose_features_or_logits_are_not_finite_is_not_scored(monkeypatch, value, variant, what):
    images = sys.modules["saint.lab.eval.images"]
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    seen = []

    class Poisoned(images.Features):
        def __init__(self, model):
            super().__init__(model)
            self.mine = ["base", "half"][len(seen)] == variant
            seen.append(model)

        def __call__(self, inputs):
            made = dict(zip(("features", "logits"), super().__call__(inputs), strict=True))
            marked = inputs["x"][:, 0, 0, 0] == 9
            if self.mine and bool(marked.any()):
                made[what] = made[what].clone()
                made[what][marked, 3] = value
            return made["features"], made["logits"]

    def inputs(pictures):
        made = loaded.pixels(pictures)
        for sample, one in enumerate(pictures):
            if one.getpixel((0, 0)) == (1, 2, 3):
                made["x"][sample, 0, 0, 0] = 9
        return made

    def read(number):
        one = noise(number)
        if number == 2:
            one.putpixel((0, 0), (1, 2, 3))
        return one

    monkeypatch.setattr(images, "Features", Poisoned)
    samples = Samples([Item(str(n), f"{n}.png", lambda n=n: read(n)) for n in range(4)])
    report = evaluate_images(loaded.model, samples, {"half": HALF}, inputs=inputs, batch=4)
    assert [failure.id for failure in report.failures] == ["2"]
    assert report.failures[0].reason == f"the {what} of the {variant} model are not finite"
    assert all(summary.n == 3 for summary in report.agreement["half"].values())


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return VLM.load(save(tmp_path_factory.mktemp("asked"), TEMPLATE))


@pytest.mark.parametrize(("value", "bad"), [(torch.nan, True), (torch.inf, True), (-torch.inf, False)])
def test_an_answer_of_logits_that_are_not_finite_is_no_wrong_answer(generator, value, bad):
    """A token of -inf cannot come, which is a number; NaN and inf are none."""
    head = generator.model.get_output_embeddings()
    calls = []

    def poison(_, __, logits):
        calls.append(1)
        logits = logits.clone()
        logits[..., 3] = value
        return logits

    handle = head.register_forward_hook(poison)
    try:
        asked = [Question(noise(0), "what", ("w5",))]
        plans = {"c": Plan.from_json(PLAN)}
        if bad:
            with pytest.raises(ValueError, match="the logits of the base model are not finite"):
                evaluate_vqa(generator.model, generator.processor, asked, plans, max_new_tokens=2)
        else:
            assert evaluate_vqa(generator.model, generator.processor, asked, plans, max_new_tokens=2).evaluated == 1
    finally:
        handle.remove()
    assert calls


@pytest.mark.parametrize("value", VALUES)
def test_a_loss_that_is_not_finite_tunes_nothing(value):
    model = build("timm/vit-augreg")
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    calls = []

    def poison(_, __, out):
        calls.append(len(out))
        if len(calls) == 2:  # of the plan
            out = out.clone()
            out[1, 2] = value
        return out

    handle = model.head.register_forward_hook(poison)
    try:
        with pytest.raises(ValueError, match=r"image\(s\) \[1\] is not finite"):
            Trials(around(model), read_samples(images), facts={}).run(HALF, range(3))
    finally:
        handle.remove()
    assert calls == [3, 3]
