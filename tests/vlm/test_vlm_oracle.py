"""Masked-oracle equality of prefill logits, and of greedy tokens, over families, stages and batches."""

import pytest
import torch

import saint
import saint.testing
from support.families import FAMILIES, one_at_a_time, prompts
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import CONNECTOR, LANGUAGE, PADDED, SPECIAL, VISION

ONE = [[4, "0", 7]]
IMAGES = [[3, "0", 4, "1", 5]]
MIXED = [[4, "0", 3, "1", 2], [9], [2, "1", 3]]  # several images, none, one

MODES = {
    "language": saint.Plan(language=LANGUAGE),
    "connector": saint.Plan(connector=CONNECTOR),
    "vision": saint.Plan(vision=VISION),
    "hybrid": saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE),
    "connector+language": saint.Plan(connector=CONNECTOR, language=LANGUAGE),
}
CASES = [
    (name, mode)
    for name, family in FAMILIES.items()
    for mode in MODES
    if (mode == "connector+language")
    == (family.tower is None and mode not in ("language", "connector", "vision", "hybrid"))
    and (family.tower is not None or mode not in ("vision", "hybrid"))
]


@pytest.fixture(scope="module")
def models():
    def make(name):
        model = FAMILIES[name].build()
        return model, oracle_model(model)

    return one_at_a_time(make)


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("samples", [PADDED, IMAGES, MIXED], ids=["padded", "images", "mixed"])
def test_prefill_logits(models, name, mode, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples)

    with saint.pruned(model, MODES[mode]) as session, torch.no_grad():
        actual = model(**inputs).logits
        trace = session.trace

    oracle = Oracle(family, twin, trace, inputs)
    assert all(int((e.tokens_in - e.tokens_out).sum()) > 0 for e in trace)
    assert [e.stage for e in trace] == sorted((e.stage for e in trace), key=["vision", "connector", "language"].index)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert actual.shape[:2] == inputs["input_ids"].shape
    assert relative_error(actual[here], oracle().logits[here]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[here], actual[here]) > 1e-3, "the plan changes nothing"


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("samples", [ONE, PADDED], ids=["one", "padded"])
def test_greedy_tokens(models, name, mode, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples, seed=1)
    steps = 32

    with saint.pruned(model, MODES[mode]) as session, torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            suppress_tokens=SPECIAL,
            output_logits=True,
            return_dict_in_generate=True,
        )
        trace = session.trace

    assert all(int((e.tokens_in - e.tokens_out).sum()) > 0 for e in trace)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == steps
    expected = Oracle(family, twin, trace, inputs).continued(new)
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4
    expected[..., SPECIAL] = -torch.inf
    assert torch.equal(new, expected.argmax(-1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed"])
def test_the_public_oracle_agrees(models, name, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples)
    plan = MODES["hybrid" if family.tower else "connector+language"]
    outputs, trace = saint.testing.masked_oracle(model, plan, inputs)
    oracle = Oracle(family, twin, trace, inputs)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    with torch.no_grad():
        unpruned = model(**inputs).logits
    expected = oracle().logits[here]
    assert saint.status(model) is None
    assert relative_error(unpruned[here], expected) > 1e-3
    assert relative_error(outputs["logits"][here], expected) < 1e-4
