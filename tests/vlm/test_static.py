"""Static caches under a language stage: the tokens of a dynamic cache, with room for what stays, in one compiled step."""

import copy

import pytest
import torch
import transformers as hf

import saint
from saint.language.static import StaticRagged
from support.families import FAMILIES, IMAGE, cache_of, cached, one_at_a_time, prompts
from support.oracles import relative_error
from support.plans import CONNECTOR, GREEDY, SPECIAL
from support.text import MODELS, batch, tiny

BATCH = [[4, "0", 7], [3, "1", 2]]  # left padding, images of two sizes
LLAVA = FAMILIES["llava-llama"]
FIXED = saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[0, 2])
PLANS = {
    "fixed": saint.Plan(language=FIXED),
    "hybrid": saint.Plan(connector=CONNECTOR, language=FIXED),
    "votes": saint.Plan(language=saint.Stage(saint.Saint(threshold=0.9, budget=0.5), layers=[1])),
    "merged": saint.Plan(language=saint.Stage(saint.methods.ToMe(keep=0.5), layers=[1])),
    "evict": saint.Plan(language=saint.Stage(saint.methods.Random(keep=0.5), layers=[2], evict=True)),
}
STATIC = {"cache_implementation": "static"}
WORDS = {"do_sample": False, "suppress_tokens": SPECIAL, "min_new_tokens": 64}


@pytest.fixture(scope="module")
def models():
    return one_at_a_time(lambda name: FAMILIES[name].build())


@pytest.fixture
def llava():
    return LLAVA.build()


def generated(model, plan, inputs, steps, **more):
    with saint.pruned(model, plan) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **GREEDY, **more
        )
        memory = session.kv_memory
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), memory, cache_of(out)


@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name in FAMILIES for plan in PLANS])
def test_every_family(models, name, plan):
    family, model, plan = FAMILIES[name], models(name), PLANS[plan]
    inputs = prompts(family, model, BATCH, seed=1)

    dynamic, logits, grown, _ = generated(model, plan, inputs, 64)
    static, same, memory, cache = generated(model, plan, inputs, 64, **STATIC)

    assert torch.equal(static, dynamic)
    assert relative_error(same, logits) < 1e-4
    if not any(layer.is_sliding for layer in cache.layers):  # a window of fixed places also holds what has left it
        assert memory.kept / memory.unpruned == pytest.approx(grown.kept / grown.unpruned, rel=0.05)
    assert memory.kept < memory.unpruned
    assert any(isinstance(layer, StaticRagged) for layer in cache.layers)


@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name in MODELS for plan in ("fixed", "evict", "votes")])
def test_text(name, plan):
    model, inputs, plan = tiny(name), batch([19, 9, 2, 24]), PLANS[plan]
    dynamic, logits, _, _ = generated(model, plan, inputs, 40)
    static, same, _, _ = generated(model, plan, inputs, 40, **STATIC)
    assert torch.equal(static, dynamic)
    assert relative_error(same, logits) < 1e-4
