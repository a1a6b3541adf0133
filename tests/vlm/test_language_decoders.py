"""The language stage on decoders that are no plain stack of attention.

Where layers are recurrent the masked oracle means nothing: a hidden key is no removed token. What holds there: a forward of each
prompt alone whose layers lose the rows themselves, and that no sample depends on its batch mates, in prompt and answer.
"""

import pytest
import torch

import saint
from saint import testing
from saint.upstream import decoders as facts
from saint.upstream.names import ENCODED, Parameters
from saint.upstream.transformers import qualified
from support.decoders import MODELS, SPECIAL, SPECS, TEXTS, batch, deep, prompts, without
from support.families import IMAGE
from support.oracles import missing, relative_error

pytest.importorskip("transformers.models.lfm3", reason="not in this release of transformers")

STEPS = 8
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SPECIAL, "output_logits": True,
          "return_dict_in_generate": True}  # fmt: skip
HYBRID = ["lfm2", "lfm3", "nemotron-h"]


@pytest.fixture(autouse=True)
def _known(fresh, monkeypatch):
    for spec in SPECS:
        saint.register(spec)
    for name, (module, cls, _) in TEXTS.items():
        monkeypatch.setitem(facts.TEXT, qualified(module, cls), name)


def plan_at(*layers, keep=0.6, placement="post"):
    return saint.Plan(language=saint.Stage(saint.Saint(keep=keep), layers=list(layers), placement=placement))


def inner(inputs):
    """Candidates of a prompt without images, bool [B, L]."""
    real = inputs["attention_mask"].bool()
    return real & (real.cumsum(1) > 1) & (real.flip(1).cumsum(1).flip(1) > 1)


def check(model, layers, plan, make, candidates, steps=STEPS):
    """Prompt and answer of a ragged, left padded batch, against each prompt alone: pruned, and losing its rows by hand."""
    both = make((0, 1))
    length = both["input_ids"].shape[1]
    with saint.pruned(model, plan) as session, torch.no_grad():
        prompt = model(**both).logits
        out = model.generate(**both, **{**GREEDY, "max_new_tokens": steps})
        trace, memory = session.trace, session.kv_memory
        alone = [model.generate(**make((row,)), **{**GREEDY, "max_new_tokens": steps}) for row in range(2)]
    logits, new = torch.stack(out.logits, 1), out.sequences[:, length:]
    places = candidates(both)
    assert all(bool((entry.tokens_out < entry.tokens_in).all()) for entry in trace)
    assert len(set(trace[-1].tokens_out.tolist())) == 2, "the batch is not ragged"
    assert memory.kept < memory.unpruned
    for row in range(2):
        assert torch.equal(alone[row].sequences[0, -steps:], new[row])
        assert relative_error(logits[row], torch.stack(alone[row].logits, 1)[0]) < 1e-4
        real = both["attention_mask"][row].bool()
        one = make((row,))
        first = int((~real).sum())
        gone = {e.layer: missing(e.kept, places)[row, first:] for e in trace}
        left = {k: (~torch.nn.functional.pad(v, (0, steps))).nonzero().flatten() for k, v in gone.items()}
        ids = torch.cat([one["input_ids"], new[row : row + 1]], 1)
        grown = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in one:
            grown["mm_token_type_ids"] = (ids == IMAGE).long()
        expected = without(model, layers, grown, left)[0]
        assert relative_error(logits[row], expected[-steps - 1 : -1]) < 1e-4
        stay = ~gone[max(gone)]
        assert relative_error(prompt[row, first:][stay], expected[:-steps]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**both).logits[:, -1], prompt[:, -1]) > 1e-3, "the plan changes nothing"


@pytest.mark.parametrize("name", TEXTS)
def test_text_models_equal_prompts_that_lose_their_rows(name):
    model = TEXTS[name][2]()
    check(model, list(model.model.layers), plan_at(1), prompts, inner)


@pytest.mark.parametrize("name", ["lfm2", "nemotron-h", "lfm3"])
def test_several_drop_points(name):
    model = TEXTS[name][2]()
    last = 5 if name == "lfm3" else 4
    check(model, list(model.model.layers), plan_at(1, last), prompts, inner)


@pytest.mark.parametrize("name", ["llama4", "deepseek-v3"])
def test_attention_alone_equals_the_masked_oracle(name):
    model = TEXTS[name][2]()
    inputs = prompts()
    plan = plan_at(1, 2)
    with saint.pruned(model, plan) as session, torch.no_grad():
        actual, trace = model(**inputs).logits, session.trace
    expected, _ = testing.masked_oracle(model, plan, inputs)
    here = inputs["attention_mask"].bool() & ~missing(trace[-1].kept, inner(inputs))
    assert relative_error(actual[here], expected["logits"][here]) < 1e-4


@pytest.mark.skipif(not Parameters(__import__("transformers").Qwen3_5Model.forward).has(ENCODED), reason="no features alone")
@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe"])
def test_recurrent_vision_language_models(name):
    model = deep(name)
    check(model, list(model.model.language_model.layers), plan_at(3), lambda which: batch(model, which),
          lambda inputs: inputs["input_ids"] == IMAGE)  # fmt: skip


GEMMAS = ["gemma4", "gemma4-shared-keys", "gemma4-causal"]


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", GEMMAS)
def test_side_inputs_and_shared_keys(name, layers):
    model = MODELS[name]()
    inputs = batch(model)
    places = inputs["input_ids"] == IMAGE
    plan = plan_at(*layers)
    with saint.pruned(model, plan) as session, torch.no_grad():
        actual, trace = model(**inputs).logits, session.trace
        out = model.generate(**inputs, **GREEDY)
        alone = [model.generate(**batch(model, (row,)), **GREEDY) for row in range(2)]
    expected, _ = testing.masked_oracle(model, plan, inputs)
    here = inputs["attention_mask"].bool() & ~missing(trace[-1].kept, places)
    assert relative_error(actual[here], expected["logits"][here]) < 1e-4
    logits, length = torch.stack(out.logits, 1), inputs["input_ids"].shape[1]
    for row in range(2):
        assert relative_error(logits[row], torch.stack(alone[row].logits, 1)[0]) < 1e-4
    ids = out.sequences
    grown = {**inputs, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long(),
             "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)}  # fmt: skip
    answered, _ = testing.masked_oracle(model, plan, grown)
    assert relative_error(logits, answered["logits"][:, length - 1 : -1]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[here], actual[here]) > 1e-3
