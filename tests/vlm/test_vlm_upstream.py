"""What transformers' own model tests do, with a plan that keeps everything: the same results as unpatched.

Contrastive search and DoLa are not in transformers 5 (it fetches their code from the hub), static caches are refused.
"""

import copy

import pytest
import torch

import saint
from support.families import FAMILIES, cache_of, cached, checkpoint, one_at_a_time, prompts
from support.plans import SPECIAL

BATCH = [[4, "0", 7], [3, "1", 2], [6, "0", 12]]
ONE = [[5, "0", 9]]
KEEP = saint.Stage(saint.Saint(threshold=1.0, keep=1.0), layers=[0, 2])
ALL = saint.SaintFullGraph(keep=1.0)
WAYS = {
    "greedy": {},
    "without-cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beam": {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 3},
}


def keep_everything(family):
    vision = saint.Stage(ALL, layers=[1]) if family.tower else None
    return saint.Plan(vision=vision, connector=ALL, language=KEEP)


def same(actual, expected):
    """Bitwise, but for the blocks of a tower, which are run in two halves."""
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def models():
    return one_at_a_time(lambda name: (FAMILIES[name], FAMILIES[name].build()))


def both(model, plan, call):
    """Result of ``call`` unpatched and under the plan, which must have seen visual tokens and dropped none."""
    torch.manual_seed(0)
    expected = call()
    with saint.pruned(model, plan) as session:
        torch.manual_seed(0)
        actual = call()
        trace = session.trace
    assert {entry.stage for entry in trace} == set(plan.slots)
    assert all(torch.equal(e.tokens_in, e.tokens_out) and int(e.tokens_in.sum()) for e in trace)
    return actual, expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_generate(models, name, way):
    family, model = models(name)
    inputs = prompts(family, model, BATCH)

    def call():
        return model.generate(
            **inputs, max_new_tokens=6, suppress_tokens=SPECIAL, output_logits=True, output_scores=True,
            return_dict_in_generate=True, **{"do_sample": False, **WAYS[way]},
        )  # fmt: skip

    actual, expected = both(model, keep_everything(family), call)
    assert torch.equal(actual.sequences, expected.sequences)
    assert same(torch.stack(actual.logits), torch.stack(expected.logits))
    if "num_beams" in WAYS[way]:
        assert same(actual.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_lookup(models, name):
    family, model = models(name)
    inputs = prompts(family, model, ONE)

    def call():
        return model.generate(
            **inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3, suppress_tokens=SPECIAL
        )

    assert torch.equal(*both(model, keep_everything(family), call))


@pytest.mark.parametrize("name", FAMILIES)
def test_continued_from_its_cache(models, name):
    family, model = models(name)
    # no padding: Qwen-VL's own forward makes no positions for a step under a longer mask
    inputs = prompts(family, model, [[4, "0", 7], [7, "0", 4]])
    del inputs["attention_mask"]

    def call():
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            logits = []
            for step in range(3):
                ids = torch.tensor([[7], [9]]) + step
                logits.append(model(input_ids=ids, **cached(model, cache_of(out))).logits)
        return torch.cat([out.logits, *logits], 1)

    assert same(*both(model, keep_everything(family), call))


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_attentions_and_loss(models, name):
    family, model = models(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = prompts(family, eager, BATCH)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def call():
        with torch.no_grad():
            return eager(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)

    actual, expected = both(eager, keep_everything(family), call)
    assert same(actual.loss, expected.loss)
    for part in ("hidden_states", "attentions"):
        assert len(actual[part]) == len(expected[part]) > 0
        assert all(same(a, b) for a, b in zip(actual[part], expected[part], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(models, name, checkpointing):
    family, model = models(name)
    model = copy.deepcopy(model)
    inputs = prompts(family, model, BATCH)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if checkpointing:
        model.train()
        checkpoint(model)

    def call():
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    actual, expected = both(model, keep_everything(family), call)
    assert len(actual) == len(expected) > 0
    for weight, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert float((actual[weight] - gradient).abs().max() / scale) < 1e-3, weight


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load(models, name, tmp_path):
    family, model = models(name)
    inputs = prompts(family, model, BATCH)
    with torch.no_grad():
        expected = model(**inputs).logits
        with saint.pruned(model, keep_everything(family)):
            model.save_pretrained(tmp_path)
            loaded = type(model).from_pretrained(tmp_path).eval()
            assert loaded.state_dict().keys() == model.state_dict().keys()
            assert saint.status(loaded) is None
            assert torch.equal(loaded(**inputs).logits, expected)
            with saint.pruned(loaded, keep_everything(family)):
                assert same(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_pruned_model(models, checkpointing):
    """Running layers again in the backward pass drops the same tokens."""
    family, model = models("llava-llama")
    inputs = prompts(family, model, BATCH)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plan = saint.Plan(language=saint.Stage(saint.Saint(threshold=0.9, keep=0.4), layers=[1, 2], evict=True))
    gradients = []
    for again in (False, checkpointing):
        twin = copy.deepcopy(model).train()
        if again:
            checkpoint(twin)
        with saint.pruned(twin, plan) as session:
            twin(**inputs, labels=labels).loss.backward()
            assert int(session.trace[-1].tokens_out[0]) < 36
            assert len(session.trace) == 2
        gradients.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    for weight, gradient in gradients[0].items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert float((gradients[1][weight] - gradient).abs().max() / scale) < 1e-3, weight
