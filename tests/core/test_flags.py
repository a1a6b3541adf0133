"""What one forward was asked for ends with it: the next forward, without the argument, gives what it gave before."""

import pytest
import torch

import saint
from saint import testing
from saint.methods import FastV, Random, ToMe
from saint.plans import Plan, Stage
from saint.vision.locate import locate
from support.families import FAMILIES, cache_of, prompts
from support.models import NAMES, backbones, prepared, restage
from support.padded import naflex, patches
from support.plans import CONNECTOR, LANGUAGE, VISION
from support.text import MODELS, batch, tiny


def features(model, inputs) -> torch.Tensor:
    """In front of the head; some call pictures patches there."""
    out = model.forward_features(*inputs.values())
    return out["patches"] if isinstance(out, dict) else out


def intermediates(model, inputs, **asked):
    first, *_ = inputs.values()
    return model.forward_intermediates(first, **dict(list(inputs.items())[1:]), **asked)


CALLS = {  # of encoders; a class has some of them
    "forward_intermediates": intermediates,
    "forward_intermediates of tokens": lambda m, i: intermediates(m, i, output_fmt="NLC"),
    "forward_intermediates of one": lambda m, i: m.forward_intermediates(
        *i.values(), indices=1, intermediates_only=True
    ),
    "forward_intermediates that stops": lambda m, i: intermediates(m, i, indices=[1], stop_early=True),
    "get_intermediate_layers": lambda m, i: m.get_intermediate_layers(*i.values(), n=2),
    "too many intermediates": lambda m, i: intermediates(m, i, indices=99),
    "get too many layers": lambda m, i: m.get_intermediate_layers(*i.values(), n=[99]),
    "hidden states": lambda m, i: m(**i, output_hidden_states=True),
    "attentions": lambda m, i: m(**i, output_attentions=True),
    "tuple": lambda m, i: m(**i, return_dict=False),
    "tuple of hidden states": lambda m, i: m(**i, return_dict=False, output_hidden_states=True),
    "bad pixels": lambda m, i: m(*(torch.zeros(1, 2, 3) for _ in i), output_hidden_states=True),
    "features": features,
    "train": lambda m, i: m.train()(**i) and m.eval(),
}


def seen(model, inputs) -> dict[str, torch.Tensor]:
    """Outputs of a forward, and of the features in front of the head."""
    out = testing.run(model, inputs)
    if hasattr(model, "forward_features"):
        with torch.no_grad():
            out["features"] = features(model, inputs)
    return out


def check_unchanged(model, plan, inputs) -> set[str]:
    """Each call leaves the next forward as it was; returns the calls that the model has."""
    had = set()
    with saint.pruned(model, plan) as session, torch.no_grad():
        want, trace = seen(model, inputs), session.trace
        for name, call in CALLS.items():
            try:
                call(model, inputs)
                had.add(name)
            except (AttributeError, TypeError, ValueError, AssertionError, IndexError, RuntimeError):
                pass  # no such call, or one that fails: a failure leaves nothing behind either
            model.eval()
            got = seen(model, inputs)
            assert {key: value.shape for key, value in got.items()} == {key: v.shape for key, v in want.items()}, name
            assert all(torch.equal(got[key], value) for key, value in want.items()), name
            assert all(
                torch.equal(a, b)
                for one, other in zip(trace, session.trace, strict=True)
                for a, b in zip(one.kept, other.kept, strict=True)
            ), name
    return had


@pytest.mark.parametrize("output", ["survivors", "similar"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_of_an_encoder_do_not_stick(name, output):
    model, plan, inputs = prepared(name)
    assert check_unchanged(model, restage(plan, layers=[0, 2], output=output), inputs)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_calls_of_an_encoder_of_patches_do_not_stick(pool):
    for output in ("survivors", "similar"):  # the former has no grid to find stand-ins on, and refuses
        plan = Plan(vision=Stage(saint.Saint(keep=0.6), layers=[0, 2], output=output))
        had = check_unchanged(naflex(pool), plan, patches())
        assert ("forward_intermediates of tokens" in had) == (output == "similar")


def test_every_call_is_one_of_some_encoder():
    had = set()
    for name in ("timm/vit-avg", "transformers/clip", "transformers/dinov2"):
        model, plan, inputs = prepared(name)
        had |= check_unchanged(model, restage(plan, layers=[0, 2]), inputs)
    assert set(CALLS) - had <= {"too many intermediates", "get too many layers", "bad pixels", "train"}


def test_maps_of_a_backbone_do_not_stick():
    for name, model in backbones().items():
        model.eval()
        inputs = testing.example_inputs(model)
        _, encoder, spec = locate(model)
        rows = []
        hook = encoder.get_submodule(spec.blocks)[1].register_forward_hook(
            lambda _m, _a, y, to=rows: to.append((y[0] if isinstance(y, tuple) else y).shape)
        )
        with saint.pruned(model, Stage(saint.Saint(keep=0.5), layers=[0], output="similar")), torch.no_grad():
            first = testing.run(model, inputs)
            again = testing.run(model, inputs)
        hook.remove()
        assert all(torch.equal(first[key], again[key]) for key in first), name
        assert rows[0] == rows[1]


# -- language models ----------------------------------------------------------------------------------------------------

ASKED = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "tuple": {"return_dict": False},
    "no cache": {"use_cache": False},
    "cache": {"use_cache": True},
    "last logits": {"logits_to_keep": 1},
    "labels": {"labels": None},
    "everything": {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 2},
    "generate": {},
    "a failure": {"output_hidden_states": True, "position_ids": torch.zeros(7, 7, 7)},
}


def check_asked(model, plan, inputs) -> None:
    with saint.pruned(model, plan) as session, torch.no_grad():
        base = model(**inputs)
        trace, memory = session.trace, session.kv_memory
        stored = [layer.keys.shape for layer in cache_of(base).layers]
        for name, asked in ASKED.items():
            asked = {key: inputs["input_ids"] if key == "labels" else value for key, value in asked.items()}
            try:
                if name == "generate":
                    model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=list(range(100, 104)))
                else:
                    model(**inputs, **asked)
            except (TypeError, RuntimeError, ValueError, IndexError):
                assert name in ("a failure", "attentions"), name
            again = model(**inputs)
            assert torch.equal(again.logits, base.logits), name
            assert again.hidden_states is None
            assert [layer.keys.shape for layer in cache_of(again).layers] == stored, name
            assert session.kv_memory == memory
            assert [entry.tokens_out.tolist() for entry in session.trace] == [e.tokens_out.tolist() for e in trace]


PLANS = {
    "hybrid": Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE),
    "evict": Plan(language=Stage(saint.Saint(threshold=0.9, keep=0.4), layers=[1, 2], evict=True)),
    "merge": Plan(language=Stage(ToMe(keep=0.5), layers=[0, 2])),
    "row": Plan(language=Stage(FastV(keep=0.5), layers=[1])),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_of_a_vision_language_model_do_not_stick(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
    for plan in PLANS.values() if name == "llava-llama" else (PLANS["hybrid"],):
        if family.tower is None:
            plan = Plan(connector=plan.connector, language=plan.language)
        check_asked(model, plan, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_a_language_model_do_not_stick(name):
    model, inputs = tiny(name), batch([14, 9])
    check_asked(model, Plan(language=Stage(saint.Saint(keep=0.5), layers=[1, 3])), inputs)


@pytest.mark.parametrize("output", ["similar", "nearest", "carried"])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("transformers/")])
def test_hidden_states_that_are_asked_for_are_as_long_as_the_output(name, output):
    """By the argument and by the config: of every layer, and each the map that the next layer would have had."""
    model, plan, inputs = prepared(name)
    _, _, spec = locate(model)
    if output == "nearest" and spec.patch is None:
        pytest.skip("no grid")
    with torch.no_grad():
        base = model(**inputs, output_hidden_states=True).hidden_states
        with saint.pruned(model, restage(plan, method=Random(keep=0.5), layers=[1], output=output)) as session:
            got = model(**inputs, output_hidden_states=True).hidden_states
            assert [state.shape for state in got] == [state.shape for state in base]
            assert session.trace[0].tokens_out.sum() < session.trace[0].tokens_in.sum()
            assert "hidden_states" not in model(**inputs)
