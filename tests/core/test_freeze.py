"""``saint.freeze``: a fixed number of tokens per layer, counted on images."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

import saint
from saint import Plan, Stage, methods, testing
from support.families import FAMILIES, prompts
from support.models import build

VOTES = saint.Saint(threshold=0.5, neighbors=2, center=True)
PLANS = {
    "votes": Plan(vision=Stage(VOTES, layers=[0, 1, 2])),
    "votes of a batch": Plan(vision=Stage(dataclasses.replace(VOTES, budget="batch"), layers=[0, 1])),
    "pairs": Plan(vision=Stage(methods.Match(threshold=0.5, center=True), layers=[0, 2], placement="post")),
    "weighed pairs": Plan(vision=Stage(methods.Match(threshold=0.5, fate="weigh"), layers=[0, 1], output="carried")),
    "in front": Plan(
        vision=[
            Stage(methods.Match(threshold=0.5, center=True), placement="input"),
            Stage(methods.Grid(keep=0.9), layers=[0]),
            Stage(VOTES, layers=[1, 2]),
        ]
    ),
}


@pytest.fixture(scope="module")
def vit():
    return build("timm/vit-augreg")


@pytest.fixture(scope="module")
def images(vit):
    return testing.example_inputs(vit)["x"]  # three pictures that lose different numbers


def counts(model, plan, images):
    """Tokens in front of each drop point and behind it, by (placement, layer), a list of images."""
    found = {}
    with saint.pruned(model, plan) as session, torch.no_grad():
        for image in images:
            model(image.unsqueeze(0))
            for step in session.trace:
                found.setdefault((step.placement, step.layer), []).append((int(step.tokens_in), int(step.tokens_out)))
    return found


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_on_one_image_the_frozen_plan_does_the_same(vit, images, plan):
    image = images[2:]
    frozen = saint.freeze(plan, vit, image)
    voted, fixed = counts(vit, plan, image), counts(vit, frozen, image)
    went = {where: pairs for where, pairs in voted.items() if pairs[0][0] > pairs[0][1]}
    assert went
    assert went == {where: pairs for where, pairs in fixed.items() if pairs[0][0] > pairs[0][1]}
    with saint.pruned(vit, plan):
        want = vit(image)
    with saint.pruned(vit, frozen):
        assert torch.allclose(vit(image), want, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_image_keeps_the_mean_number_of_each_layer(vit, images, plan):
    frozen = saint.freeze(plan, vit, images)
    assert all(not isinstance(stage.method.to_dict().get("budget"), str) for stage in frozen.slots["vision"])
    voted, fixed = counts(vit, plan, images), counts(vit, frozen, images)
    assert any(len(set(pairs)) > 1 for pairs in voted.values())  # the images differ, or this proves nothing
    for where, pairs in fixed.items():
        assert len(set(pairs)) == 1
        mean = sum(left for _, left in voted[where]) / len(images)
        assert abs(pairs[0][1] - mean) <= 1, where


def test_a_fixed_plan_stays_as_it_is(vit, images):
    plan = Plan(vision=[Stage(saint.Saint(keep=0.6), layers=[0]), Stage(saint.SaintFullGraph(keep=9), layers=[2])])
    assert saint.freeze(plan, vit, images) == plan


def test_what_leaves_nowhere_has_no_stage(vit, images):
    plan = Plan(vision=[Stage(saint.Saint(threshold=1.0), layers=[0]), Stage(VOTES, layers=[1])])
    assert [stage.layers for stage in saint.freeze(plan, vit, images).slots["vision"]] == [(1,)]


def test_a_frozen_plan_is_written_and_read(vit, images, tmp_path):
    frozen = saint.freeze("vit/published", vit, images[:1] * 0)  # a grey picture: tokens leave
    frozen.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == frozen
    assert saint.status(vit) is None


def test_vision_and_language_of_a_vision_language_model():
    family = FAMILIES["llava-llama"]
    model = family.build()
    asked = [prompts(family, model, [sample]) for sample in ([4, "0", 7], [3, "1", 2], [5, "2", 1])]
    language = saint.Saint(threshold=0.1, neighbors=1)
    plan = Plan(
        vision=Stage(dataclasses.replace(VOTES, threshold=0.2), layers=[0, 1]), language=Stage(language, layers=[0, 2])
    )
    frozen = saint.freeze(plan, model, asked)
    assert set(frozen.slots) == {"vision", "language"}
    seen = set()
    with saint.pruned(model, frozen) as session, torch.no_grad():
        for inputs in asked:
            model(**inputs)
            seen.add(tuple((step.stage, step.layer, *step.tokens_out.tolist()) for step in session.trace))
    assert len(seen) == 1
    assert all(torch.all(step.tokens_out < step.tokens_in) for step in session.trace)


@dataclasses.dataclass(frozen=True)
class Mine(methods.Method):
    """A method of somebody else that says nowhere how many it keeps."""

    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = "none"
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})

    def select(self, candidates):
        return None


@pytest.mark.parametrize(
    ("plan", "given", "error", "message"),
    [
        (VOTES, [], ValueError, "no images"),
        (VOTES, "photos/", TypeError, "images must be a tensor"),
        (Plan(vision=Stage(Mine(), layers=[0])), torch.zeros(1, 3, 48, 48), ValueError, "Mine of the vision stage has no"),
        (saint.Saint(threshold=1.0), torch.randn(1, 3, 96, 96), ValueError, "no token leaves"),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_told(vit, plan, given, error, message):
    with pytest.raises(error, match=message):
        saint.freeze(plan, vit, given)
    assert saint.status(vit) is None


def test_prompts_without_images_say_nothing_of_visual_tokens():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, 7, 3]])
    assert isinstance(inputs, Mapping)
    with pytest.raises(ValueError, match="give prompts with images"):
        saint.freeze(Plan(vision=VOTES), model, [inputs])


def test_a_guard_is_counted_in_and_gone(vit):
    noise = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(noise, testing.example_inputs(vit)["x"].shape[-2:])
    plan = Plan(vision=Stage(methods.Grid(keep=0.4), layers=[0, 1])).guarded(0.8)
    with saint.pruned(vit, plan) as session:
        vit(image)
        kept = [entry.tokens_out.tolist() for entry in session.trace]
        assert kept[-1][0] > 0.4 * int(session.trace[0].tokens_in[0]), "the guard binds, or this tests nothing"
    frozen = saint.freeze(plan, vit, image)
    assert all(stage.guard == 0 for stage in frozen.slots["vision"])
    with saint.pruned(vit, frozen) as session:
        vit(image)
        assert int(session.trace[-1].tokens_out[0]) == round(sum(kept[-1]) / 2)
