"""Weights over several devices (``device_map``): hooks of accelerate move inputs, or bring weights from disk layer by layer."""

import pytest
import torch

import saint
from saint.errors import UnsupportedModelError
from saint.testing import snapshot
from support.families import FAMILIES, prompts
from support.plans import GREEDY

accelerate = pytest.importorskip("accelerate")
LLAVA = FAMILIES["llava-llama"]
HALF = saint.SaintFullGraph(keep=0.5)
PLANS = {
    "connector": saint.Plan(connector=HALF),
    "language": saint.Plan(language=saint.Stage(saint.Saint(keep=0.5), layers=[1, 2])),
    "mid": saint.Plan(language=saint.Stage(saint.Saint(keep=0.5), layers=[1], placement="mid")),
    "hybrid": saint.Plan(vision=saint.Stage(HALF, layers=[0]), connector=HALF, language=saint.Stage(HALF, layers=[1])),
}


def spread(model, second, folder, tower="cpu"):
    """Every other layer of the decoder on a second device, which is the disk or, in name, another CPU."""
    layers = {
        f"model.language_model.layers.{i}": second if i % 2 else "cpu"
        for i in range(len(model.model.language_model.layers))
    }
    rest = ("multi_modal_projector", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb")
    others = {f"model.{name}": "cpu" for name in rest}
    places = {"model.vision_tower": tower, **others, "lm_head": "cpu", **layers}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def answer(model, inputs):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, **GREEDY)


@pytest.mark.parametrize("order", ["spread plan", "plan spread"])
@pytest.mark.parametrize("second", ["cpu", "disk"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_on_a_model_over_two_devices(plan, second, order, tmp_path):
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, [[4, "0", 7], [3, "0", 2]], seed=1)
    base, plan_name, plan = answer(model, inputs), plan, PLANS[plan]
    with saint.pruned(model, plan):
        want = answer(model, inputs)
    assert not torch.equal(base, want)

    if order == "spread plan" and second == "disk" and plan_name == "mid":
        spread(model, second, tmp_path)
        before = snapshot(model)
        with pytest.raises(UnsupportedModelError, match="meta device: load its weights before applying a plan"):
            saint.apply(model, plan)
        assert snapshot(model) == before
        return
    session = None
    for step in order.split():
        if step == "plan":
            session = saint.apply(model, plan)
        else:
            spread(model, second, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters()) == (second == "disk")
    assert torch.equal(answer(model, inputs), want)
    session.remove()
    assert torch.equal(answer(model, inputs), base)


@pytest.mark.parametrize("first", ["plan", "hooks"])
def test_what_comes_off_first(first):
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, [[4, "0", 7]], seed=1)
    base = answer(model, inputs)
    with saint.pruned(model, PLANS["hybrid"]):
        want = answer(model, inputs)
    session = saint.apply(model, PLANS["hybrid"])
    spread(model, "cpu", "unused")
    off = {"plan": session.remove, "hooks": lambda: accelerate.hooks.remove_hook_from_submodules(model)}
    off.pop(first)()
    assert torch.equal(answer(model, inputs), base if first == "plan" else want)
    off.popitem()[1]()
    assert torch.equal(answer(model, inputs), base)
    left = [value for module in model.modules() for value in vars(module).values()]
    assert not any(type(value).__module__.startswith("saint") for value in left)
