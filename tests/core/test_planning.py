"""`saint.plan_for` and `keep`: the share that is asked for is the share that runs, on every encoder and family."""

import copy
import functools

import pytest
import torch

import saint
from saint import testing
from saint.flops import count_flops
from saint.methods import Match
from saint.vision.locate import locate
from saint.vlm.locate import find
from support.families import FAMILIES, prompts
from support.models import NAMES, build, snapshot
from support.text import tiny

SHARES = (0.7, 0.5, 0.35)
# a position table that is resized takes FLOPs whatever leaves: a hundredth of this tiny model's
CLOSE = {"transformers/siglip2": 0.03}


def counted(model, inputs, paths):
    """FLOPs in the modules at ``paths``; "" is the model."""
    with torch.no_grad():
        found = count_flops(lambda: model(**inputs))[1].by_module
    name = type(model).__name__
    return sum(sum(found[f"{name}.{path}" if path else "Global"].values()) for path in paths)


def told_least(share, error):
    """The least that a model of few tokens can be left with, which the error names: more than was asked for."""
    assert str(error).startswith(f"keep={share:g}: no plan leaves so little of the work; the least for this model is ")
    assert float(str(error).rpartition(" ")[2]) > share + 0.015


@functools.cache
def encoder(name):
    model = build(name)
    inputs = testing.example_inputs(model, batch=1)
    path = locate(model)[0]
    return model, inputs, path, counted(model, inputs, [path])


@pytest.mark.parametrize("keep", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_is_left_with_the_share_that_was_asked_for(name, keep):
    model, inputs, path, whole = encoder(name)
    try:
        plan = saint.plan_for(model, keep=keep)
    except ValueError as error:
        return told_least(keep, error)
    assert not any(stage.method.votes for stage in plan.vision)
    with saint.apply(model, plan):
        assert counted(model, inputs, [path]) / whole == pytest.approx(keep, abs=CLOSE.get(name, 0.02))


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_an_encoder_holds_its_oracle(name):
    model = encoder(name)[0]
    testing.check_oracle(model, saint.plan_for(model), testing.example_inputs(model))


@functools.cache
def family(name):
    described = FAMILIES[name]
    model = described.build()
    inputs = prompts(described, model, [[4, "0", 7]])
    path, _, spec = find(model)
    paths = [f"{path}.{one}" for one in ([spec.tower] if spec.no_vision is None else []) + [spec.decoder]]
    return model, inputs, paths, counted(model, inputs, paths)


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "shape"])
@pytest.mark.parametrize("keep", SHARES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_vision_language_model_is_left_with_the_share_that_was_asked_for(name, keep, given):
    """Closely for the inputs it is asked for; for a picture that is only thought of, as closely as tiny models allow."""
    model, inputs, paths, whole = family(name)
    try:
        plan = saint.plan_for(model, keep, inputs if given else None)
    except ValueError as error:
        return told_least(keep, error)
    assert not plan.language
    close = 0.03 if name == "llava-next" or not given else 0.02  # newlines between tiles leave as well
    with saint.apply(model, plan):
        assert counted(model, inputs, paths) / whole == pytest.approx(keep, abs=close)


@pytest.mark.parametrize("name", [*NAMES, *FAMILIES])
def test_a_plan_needs_shapes_and_no_weights(name):
    model = encoder(name)[0] if name in NAMES else family(name)[0]
    plan = saint.plan_for(model, keep=0.7)
    assert saint.plan_for(copy.deepcopy(model).to("meta"), keep=0.7) == plan


def test_apply_takes_a_share_and_half_where_nothing_is_said():
    model, inputs, _, _ = encoder("timm/vit-augreg")
    for given, share in (({}, 0.5), ({"keep": 0.7}, 0.7)):
        with saint.apply(model, **given) as session:
            assert session.plan == saint.plan_for(model, keep=share)
        with saint.pruned(model, **given) as session:
            assert session.plan == saint.plan_for(model, keep=share)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"give a plan, or keep=0\.5 for one"):
        saint.apply(model, saint.Saint(), keep=0.5)
    for wrong in (0, -1, 1.5, True, float("nan"), "half"):
        with pytest.raises(ValueError, match="keep must be"):
            saint.apply(model, keep=wrong)
    assert snapshot(model) == before
    with saint.apply(model, keep=1.0), torch.no_grad():
        kept = model(**inputs)
    with torch.no_grad():
        assert torch.equal(kept, model(**inputs))


def test_what_the_plan_is_follows_from_what_reads_the_output():
    clip = build("transformers/clip")
    front, behind = saint.plan_for(clip, keep=0.8).vision
    assert {front.method, behind.method} == {Match(keep=stage.method.keep, fate="weigh") for stage in (front, behind)}
    assert (front.placement, behind.layers) == ("input", (1, 2, 3))
    assert front.output == behind.output == "survivors"

    class Head(torch.nn.Module):  # may lay the rows on their grid, for all that can be known
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, pixel_values):
            return self.backbone(pixel_values).last_hidden_state

    (stage,) = saint.plan_for(Head(clip), keep=0.7).vision
    assert (stage.method.fate, stage.layers, stage.output) == ("merge", (0, 1, 2, 3), "similar")


def test_an_attention_that_takes_no_weights_gets_a_plan_that_drops():
    model = build("transformers/clip")
    model.vision_model.config._attn_implementation = "flash_attention_2"
    assert {stage.method.fate for stage in saint.plan_for(model, keep=0.7).vision} == {"drop"}


def test_text_is_not_left_out_unasked():
    with pytest.raises(saint.UnsupportedModelError, match="what leaves of a prompt is text"):
        saint.plan_for(tiny("llama"))
