"""How many Python calls pruning adds, as budgets that only go down: lower a number here when the code needs less."""

from contextlib import ExitStack

import pytest
import timm
import torch
import transformers as hf
from torch import nn

import saint
from saint.methods import Grid
from saint.patch import override
from saint.plans import Plan, Stage
from saint.upstream.tiny import IMAGE, make, text_config, tower_config
from support.calls import calls
from support.families import FAMILIES, cache_of, cached, prompts

LLAVA = FAMILIES["llava-llama"]
METHOD = Grid(keep=0.5)  # chooses in a handful of calls, so that what is counted is the mechanism


def vit(depth):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=48, num_heads=4).eval()


def llava(layers):
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config()),
        text_config=hf.LlamaConfig(**text_config(num_hidden_layers=layers)),
        image_token_id=IMAGE,
        image_seq_length=36,
    )
    return make(hf.LlavaForConditionalGeneration, config)


def of_forward(depth, layers):
    """Calls in one forward of an encoder, warm, with drop points behind these layers."""
    model = vit(depth)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with saint.pruned(model, Plan(vision=Stage(METHOD, layers=layers))), torch.no_grad():
        model(images)
        return calls(lambda: model(images))


def test_an_encoder_without_a_drop_point_costs_nothing():
    model = vit(4)
    images = torch.randn(2, 3, 224, 224)
    with saint.pruned(model, Plan()), torch.no_grad():
        assert calls(lambda: model(images)) == 0


def test_what_stands_in_place_of_a_method_costs_no_call_of_its_own():
    model = vit(1)
    with ExitStack() as stack:
        override(stack, model.norm, "forward", lambda original: original)
        assert calls(lambda: model.norm(torch.randn(1, 48))) == 0
        override(stack, model.norm, "forward", lambda original: original)
        assert calls(lambda: model.norm(torch.randn(1, 48))) == 0


def test_an_idle_block():
    assert (of_forward(8, [1]) - of_forward(4, [1])) / 4 <= 1


def test_an_idle_block_of_a_ragged_batch():
    def of(depth):
        model, images = vit(depth), torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with (
            saint.pruned(model, Plan(vision=Stage(saint.Saint(threshold=0.5), layers=[1]))) as session,
            torch.no_grad(),
        ):
            model(images)
            assert len(set(session.trace[0].tokens_out.tolist())) > 1
            return calls(lambda: model(images))

    assert (of(8) - of(4)) / 4 <= 1


def test_a_block_with_a_drop_point():
    idle = (of_forward(8, [0]) - of_forward(4, [0])) / 4
    assert of_forward(4, [0, 1]) - of_forward(4, [0]) + idle <= 51


def test_a_forward_with_one_drop_point():
    assert of_forward(4, [1]) <= 112


def of_step(layers, plan, samples):
    """Calls in one step of an answer, behind the prompt."""
    model = llava(layers)
    inputs = prompts(LLAVA, model, samples)
    step = {
        "input_ids": torch.full((len(samples), 1), 7),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        "position_ids": inputs["attention_mask"].sum(1, keepdim=True),
    }
    with saint.pruned(model, plan), torch.no_grad():
        given = {**step, **cached(model, cache_of(model(**inputs)))}
        return calls(lambda: model(**given))


ONE, RAGGED = [[4, "0", 7]], [[4, "0", 7], [3, "0", 2], [6, "0", 12]]


@pytest.mark.parametrize(("samples", "budget"), [(ONE, 44), (RAGGED, 64)], ids=["one", "ragged"])
def test_a_step_behind_the_door_costs_no_call_per_layer(samples, budget):
    plan = Plan(connector=METHOD)
    few, many = of_step(2, plan, samples), of_step(6, plan, samples)
    assert few == many
    assert few <= budget


@pytest.mark.parametrize(("samples", "budget"), [(ONE, 2), (RAGGED, 3)], ids=["one", "ragged"])
def test_a_step_of_a_layer_behind_a_language_stage(samples, budget):
    plan = Plan(language=Stage(METHOD, layers=[0]))
    assert (of_step(6, plan, samples) - of_step(2, plan, samples)) / 4 <= budget


def of_session(model, plan):
    """Calls of `apply`, of `disabled` and of `remove`, and modules that the model has; its classes were seen before."""
    saint.apply(model, plan).remove()
    session = saint.apply(model, plan)

    def disable():
        with session.disabled():
            pass

    disabled, removed = calls(disable), calls(session.remove)
    applied = calls(lambda: saint.apply(model, plan))
    saint.remove(model)
    return (applied, disabled, removed), len(list(model.modules()))


@pytest.mark.parametrize(
    ("build", "plan", "budgets"),
    [
        (vit, Plan(vision=Stage(METHOD, layers=[1])), (1.32, 0.87, 0.28)),
        (llava, Plan(connector=METHOD), (0, 0, 0)),
        (llava, Plan(language=Stage(METHOD, layers=[0])), (1, 1.47, 0.47)),
    ],
    ids=["encoder", "door", "language"],
)
def test_a_session_per_module(build, plan, budgets):
    """Whatever is asked of each module is asked once, and most of it of its class."""
    (few, small), (many, large) = of_session(build(4), plan), of_session(build(8), plan)
    spent = [(b - a) / (large - small) for a, b in zip(few, many, strict=True)]
    assert all(cost <= budget for cost, budget in zip(spent, budgets, strict=True)), spent


@pytest.mark.parametrize(
    ("build", "plan", "budget"),
    [
        (vit, Plan(vision=Stage(METHOD, layers=[1])), 8),
        (llava, Plan(vision=METHOD, connector=METHOD, language=Stage(METHOD, layers=[0])), 5),
    ],
    ids=["encoder", "all stages"],
)
def test_apply_walks_over_the_model_so_often(build, plan, budget, monkeypatch):
    model, walks, walk = build(4), [], nn.Module.named_modules

    def named_modules(module, *args, **kwargs):
        walks.extend([module] * (module is model))
        return walk(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    saint.apply(model, plan).remove()
    assert len(walks) <= budget, len(walks)
