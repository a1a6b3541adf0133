"""Values that are not finite are refused at every stage, and what the unpruned model would cache is said right."""

import dataclasses

import pytest
import torch

import saint
from saint import testing
from saint.methods import DivPrune, Random
from saint.plans import Plan, Stage
from saint.vision.locate import locate
from support.families import FAMILIES, prompts
from support.models import prepared

VISION = Stage(saint.SaintFullGraph(keep=0.5), layers=[1])
BATCH = [[4, "0", 7], [3, "1", 2]]
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]


def build(name: str):
    family = FAMILIES[name]
    model = family.build()
    return model, prompts(family, model, BATCH)


def poison(module: torch.nn.Module, value: float) -> None:
    """One output channel is not finite, of every token."""
    with torch.no_grad():
        module.weight[-1] = value


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["llava-llama", "paligemma"])
def test_a_connector_that_gives_nan_is_no_dropped_token(name, value):
    model, inputs = build(name)
    projector = model.model.multi_modal_projector
    poison(projector.linear_2 if name == "llava-llama" else projector.linear, value)
    before = set(vars(model.model))
    with saint.pruned(model, Plan(vision=VISION)), torch.no_grad():
        if value != value:
            with pytest.raises(ValueError, match="image features are NaN: check the pixels"):
                model(**inputs)
    assert set(vars(model.model)) == before
    plan = Plan(connector=DivPrune(0.5))
    with (
        saint.pruned(model, plan),
        torch.no_grad(),
        pytest.raises(ValueError, match="image features are NaN or Inf for sample"),
    ):
        model(**inputs)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("placement", ["input", "mid", "post"])
@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/eva02", "transformers/clip", "open_clip/vit"])
def test_one_number_of_a_sample_of_an_encoder(name, placement, value):
    """Of one token, of one sample, at the place where tokens are chosen: refused, and the sample is named."""
    model, _, inputs = prepared(name)
    _, encoder, spec = locate(model)
    prefix = spec.prefix(encoder)

    def spoil(_module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[1, prefix + 4, 2] = value
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    plan = Plan(
        vision=Stage(saint.SaintFullGraph(keep=0.5), layers=None if placement == "input" else [1], placement=placement)
    )
    layer = encoder.get_submodule(spec.blocks)[0 if placement == "input" else 1]
    hook = layer.register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        with saint.pruned(model, plan), pytest.raises(ValueError, match=r"are NaN or Inf for sample\(s\) \[1\]"):
            testing.run(model, inputs)
    finally:
        hook.remove()
    with saint.pruned(model, plan):
        assert all(bool(torch.isfinite(out).all()) for out in testing.run(model, inputs).values())


@pytest.mark.parametrize("name", ["qwen2-vl", "internvl", "gemma3"])
def test_a_merger_that_gives_nan_is_no_dropped_group(name):
    model, inputs = build(name)
    path = {"qwen2-vl": "visual.merger.mlp.2", "internvl": "multi_modal_projector.linear_2"}.get(name)
    if path is None:
        with torch.no_grad():
            model.model.multi_modal_projector.mm_input_projection_weight[:, -1] = torch.nan
    else:
        poison(model.model.get_submodule(path), torch.nan)
    with (
        saint.pruned(model, Plan(vision=VISION)),
        torch.no_grad(),
        pytest.raises(ValueError, match="image features are NaN"),
    ):
        model(**inputs)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("method", [saint.Saint(keep=0.5), Random(0.5)], ids=lambda m: m.name)
def test_keys_of_the_language_model_that_are_not_finite(value, method):
    model, inputs = build("llava-llama")
    poison(model.model.language_model.layers[1].self_attn.v_proj, 0.0)
    poison(model.model.language_model.layers[1].self_attn.k_proj, value)
    plan = Plan(language=Stage(method, layers=[1, 2]))
    with (
        saint.pruned(model, plan),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"keys of .*layer 1 are NaN or Inf"),
    ):
        model(**inputs)
    assert saint.status(model) is None


@pytest.mark.parametrize(("window", "held"), [(None, 47), (16, 15), (40, 39), (300, 47)])
def test_what_the_unpruned_model_would_cache(window, held):
    """Layers with a window hold one position less than it."""
    family = FAMILIES["llava-mistral"]
    model = family.build()
    model.config.text_config.sliding_window = window
    inputs = prompts(family, model, [[4, "0", 7]])
    per_token = 2 * 2 * 12 * 4  # keys and values of 2 heads of 12 numbers
    plan = Plan(language=Stage(saint.Saint(keep=0.5), layers=[1]))
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**inputs)
        memory = session.kv_memory
    assert memory.unpruned == 5 * held * per_token
    assert memory.kept < memory.unpruned or window == 16
    evicting = Plan(language=dataclasses.replace(plan.language[0], evict=True))
    with saint.pruned(model, evicting) as session, torch.no_grad():
        model(**inputs)
        assert session.kv_memory.unpruned == memory.unpruned
        assert session.kv_memory.kept <= memory.kept
