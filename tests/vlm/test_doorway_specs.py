"""Decoders that no family is written for, by specs of a few lines: recurrent layers, shared keys, side inputs, image blocks."""

import pytest
import torch
import transformers as hf

import saint
from saint import testing
from saint.upstream.names import ENCODED, Parameters
from saint.vlm.prompts import answered
from support.decoders import MODELS, SPECIAL, SPECS, batch, pad_behind
from support.families import IMAGE
from support.oracles import relative_error

pytest.importorskip("transformers.models.qwen3_5", reason="not in this release of transformers")
pytest.importorskip("transformers.models.gemma4", reason="not in this release of transformers")

if not Parameters(hf.Qwen3_5Model.forward).has(ENCODED):
    pytest.skip("this release takes no features that were computed earlier", allow_module_level=True)

PLAN = saint.Plan(connector=saint.SaintFullGraph(keep=0.6, step=4))


@pytest.fixture(autouse=True)
def _known(fresh):
    for spec in SPECS:
        saint.register(spec)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_answer_equal_the_oracles(name):
    model = MODELS[name]()
    inputs = batch(model)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": SPECIAL}

    with saint.pruned(model, PLAN) as session, torch.no_grad():
        prompt = model(**inputs).logits
        out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **greedy)
        static = model.generate(**inputs, cache_implementation="static", **greedy)
        trace, memory = session.trace, session.kv_memory

    new, logits = out.sequences[:, length:], torch.stack(out.logits, 1)
    assert trace[0].tokens_out.tolist() == [14, 10]
    assert memory.kept < memory.unpruned
    removed, _ = testing.removal_oracle(model, PLAN, answered(model, inputs, new))
    words = inputs["attention_mask"].bool() & (ids != IMAGE)
    assert relative_error(prompt[words], removed["logits"][:, :length][words]) < 1e-4
    assert relative_error(logits, removed["logits"][:, length - 1 : -1]) < 1e-4
    if "qwen" not in name:  # a hole in a mask is no hole for a recurrent layer
        holes = testing.holes_oracle(model, PLAN, inputs, new, suppress_tokens=SPECIAL)
        assert relative_error(logits, holes) < 1e-4
    assert torch.equal(static, out.sequences)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[words], prompt[words]) > 1e-3


def test_padding_behind_a_sample_would_be_seen(monkeypatch):
    """Recurrent layers run over what stands behind a sample: its prompt stays right, and its answer does not."""
    model = MODELS["qwen3.5"]()
    inputs = batch(model)
    length = inputs["input_ids"].shape[1]

    pad_behind(monkeypatch)
    with saint.pruned(model, PLAN), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
                             suppress_tokens=SPECIAL)  # fmt: skip
    new, logits = out.sequences[:, length:], torch.stack(out.logits, 1)
    removed, _ = testing.removal_oracle(model, PLAN, answered(model, inputs, new))
    wrong = relative_error(logits, removed["logits"][:, length - 1 : -1])
    assert wrong > 1e-2
