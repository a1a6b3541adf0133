"""The language stage on decoders that are no plain stack of attention.

Where layers are recurrent the masked oracle means nothing: a hidden key is no removed token. What holds there: a forward of each
prompt alone whose layers lose the rows themselves, and that no sample depends on its batch mates, in prompt and answer.
"""

import pytest
import torch
import transformers as hf

import saint
from saint import testing
from saint.upstream import decoders as facts
from saint.upstream.names import ENCODED, Parameters
from saint.upstream.tiny import make, text_config
from saint.upstream.transformers import qualified
from support.decoders import (
    DEEPSTACK,
    MODELS,
    SPECIAL,
    SPECS,
    TEXTS,
    batch,
    deep,
    inner,
    prompts,
    stacked,
    text,
    without,
)
from support.families import IMAGE, cached
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


def check(model, decoder, plan, make, candidates, stepwise=False):
    """Prompt and answer of a ragged, left padded batch, against each prompt alone: pruned, and losing its rows by hand.

    ``stepwise``: the answer is fed token by token. Mamba's steps differ from its scan by 2e-4 upstream, unpruned.
    """
    both = make((0, 1))
    length = both["input_ids"].shape[1]
    # not every head of a language model is known to read what it should
    with saint.pruned(decoder if model.model is decoder else model, plan) as session, torch.no_grad():
        prompt = model(**both).logits
        out = model.generate(**both, **GREEDY)
        trace, memory = session.trace, session.kv_memory
        alone = [model.generate(**make((row,)), **GREEDY) for row in range(2)]
    logits, new = torch.stack(out.logits, 1), out.sequences[:, length:]
    places = candidates(both)
    assert all(bool((entry.tokens_out < entry.tokens_in).all()) for entry in trace)
    assert len(set(trace[-1].tokens_out.tolist())) == 2, "the batch is not ragged"
    assert memory.kept < memory.unpruned
    for row in range(2):
        assert torch.equal(alone[row].sequences[0, -STEPS:], new[row])
        assert relative_error(logits[row], torch.stack(alone[row].logits, 1)[0]) < 1e-4
        real = both["attention_mask"][row].bool()
        one = make((row,))
        first = int((~real).sum())
        gone = {e.layer: missing(e.kept, places)[row, first:] for e in trace}
        more = new[row, :0] if stepwise else new[row]
        left = {k: (~torch.nn.functional.pad(v, (0, len(more)))).nonzero().flatten() for k, v in gone.items()}
        ids = torch.cat([one["input_ids"], more.unsqueeze(0)], 1)
        grown = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in one:
            grown["mm_token_type_ids"] = (ids == IMAGE).long()
        expected = without(model, decoder.layers, grown, left, new[row] if stepwise else None)[0]
        assert relative_error(logits[row], expected[-STEPS - 1 : -1]) < 1e-4
        stay = ~gone[max(gone)]
        assert relative_error(prompt[row, first:][stay], expected[:-STEPS]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**both).logits[:, -1], prompt[:, -1]) > 1e-3, "the plan changes nothing"


@pytest.mark.parametrize("name", TEXTS)
def test_text_models_equal_prompts_that_lose_their_rows(name):
    model = TEXTS[name][2]()
    check(model, model.model, plan_at(1), prompts, inner, stepwise=name == "nemotron-h")


@pytest.mark.parametrize("name", ["lfm2", "nemotron-h", "lfm3"])
def test_several_drop_points(name):
    model = TEXTS[name][2]()
    last = 5 if name == "lfm3" else 4
    check(model, model.model, plan_at(1, last), prompts, inner, stepwise=name == "nemotron-h")


@pytest.mark.parametrize("name", ["llama4", "deepseek-v3"])
def test_attention_alone_equals_the_masked_oracle(name):
    model = TEXTS[name][2]()
    inputs = prompts()
    plan, part = plan_at(1, 2), model.model
    with saint.pruned(part, plan) as session, torch.no_grad():
        actual, trace = part(**inputs).last_hidden_state, session.trace
    expected, _ = testing.masked_oracle(part, plan, inputs)
    here = inputs["attention_mask"].bool() & ~missing(trace[-1].kept, inner(inputs))
    assert relative_error(actual[here], expected["last_hidden_state"][here]) < 1e-4


@pytest.mark.skipif(not Parameters(hf.Qwen3_5Model.forward).has(ENCODED), reason="no features alone")
@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe"])
def test_recurrent_vision_language_models(name):
    model = deep(name)
    check(model, model.model.language_model, plan_at(3), lambda which: batch(model, which),
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


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", DEEPSTACK)
def test_features_that_are_added_between_layers(name, layers):
    model = DEEPSTACK[name]()
    inputs = stacked(model)
    plan = plan_at(*layers)
    with saint.pruned(model, plan) as session, torch.no_grad():
        actual, trace = model(**inputs).logits, session.trace
        out = model.generate(**inputs, **GREEDY)
        alone = [model.generate(**stacked(model, (row,)), **GREEDY) for row in range(2)]
    expected, _ = testing.masked_oracle(model, plan, inputs)
    here = inputs["attention_mask"].bool() & ~missing(trace[-1].kept, inputs["input_ids"] == IMAGE)
    assert relative_error(actual[here], expected["logits"][here]) < 1e-4
    for row in range(2):
        both, one = torch.stack(out.logits, 1)[row], torch.stack(alone[row].logits, 1)[0]
        assert relative_error(both, one) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[here], actual[here]) > 1e-3


# -- what goes wrong, and what is refused ------------------------------------------------------------------------------------


def test_padding_behind_a_sample_would_be_seen(monkeypatch):
    """The prompt stays right, and the answer does not."""
    from saint.language import decoder

    def behind(tokens):
        slots = torch.arange(tokens.slots).expand_as(tokens.index)
        return slots, slots, tokens

    monkeypatch.setattr(decoder, "in_front", behind)
    model, plan = deep("qwen3.5"), plan_at(3)
    with saint.pruned(model, plan), torch.no_grad():
        out = model.generate(**batch(model), **GREEDY)
        alone = [model.generate(**batch(model, (row,)), **GREEDY) for row in range(2)]
    errors = [
        [relative_error(out.logits[step][row], alone[row].logits[step][0]) for step in (0, 1)] for row in range(2)
    ]
    assert max(first for first, _ in errors) < 1e-4
    assert max(second for _, second in errors) > 1e-2


def test_a_ragged_second_turn_is_refused_where_padding_would_pass_through_a_state():
    model = deep("qwen3.5")
    both = batch(model)
    cache = hf.DynamicCache(config=model.config.get_text_config())
    with saint.pruned(model, plan_at(3)), torch.no_grad():
        model(**both, **cached(model, cache))
        more, length = batch(model), both["input_ids"].shape[1]
        places = torch.arange(length, 2 * length).expand(3, 2, -1)
        mask = torch.cat([both["attention_mask"], more["attention_mask"]], 1)
        with pytest.raises(ValueError, match="different numbers of tokens.*holds of earlier turns.*keep=64"):
            model(**{**more, "attention_mask": mask}, position_ids=places, **cached(model, cache))


def test_layers_without_keys_are_refused_with_the_nearest():
    model = deep("qwen3.5")
    with pytest.raises(
        ValueError, match=r"layers \[1, 4\] of this model's language stage.*the nearest that do: \[3, 7\]"
    ):
        saint.apply(model, plan_at(1, 3, 4))
    assert saint.status(model) is None


@pytest.mark.parametrize(
    ("layers", "found"), [("all", [3, 7]), ("first_half", [3]), (None, [7])]
)  # of eight layers SAINT would choose the last
def test_layers_that_are_not_numbered_are_those_that_show_keys(layers, found):
    model = deep("qwen3.5")
    plan = saint.Plan(language=saint.Stage(saint.Saint(keep=0.6), layers=layers))
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**batch(model))
        assert [entry.layer for entry in session.trace] == found


def test_a_method_whose_layer_shows_no_keys_takes_the_next_that_does():
    model = deep("qwen3.5")
    with saint.pruned(model, saint.Plan(language=saint.methods.FastV(keep=0.6))) as session, torch.no_grad():
        model(**batch(model))
        assert [entry.layer for entry in session.trace] == [3]


REFUSED = {
    "gemma3n": ("gemma3n", "Gemma3nTextModel", "several streams", lambda: make(
        hf.Gemma3nForCausalLM, hf.Gemma3nTextConfig(**text_config(
            num_hidden_layers=5, num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128,
            intermediate_size=[64] * 5, laurel_rank=8, activation_sparsity_pattern=[0.0] * 5,
            layer_types=["sliding_attention"] * 4 + ["full_attention"])))),
    "inkling2": ("inkling2", "Inkling2TextModel", "keys pass through a convolution", lambda: make(
        hf.Inkling2ForCausalLM, hf.Inkling2TextConfig(**text_config(
            swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=12, moe_intermediate_size=32,
            unpadded_vocab_size=128, n_routed_experts=4, num_experts_per_tok=2)))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_lose_tokens_are_refused_when_a_plan_is_applied(name, monkeypatch):
    module, cls, why, build = REFUSED[name]
    monkeypatch.setitem(facts.TEXT, qualified(module, cls), name)
    model = build()
    with pytest.raises(saint.UnsupportedModelError, match=f"{why}.*in front of the language model"):
        saint.apply(model.model, plan_at(1))
    assert saint.status(model) is None


def test_queries_that_are_scaled_by_place_are_refused():
    model = text("Llama4ForCausalLM", "Llama4TextConfig", num_hidden_layers=4, intermediate_size_mlp=64, num_local_experts=4,
                 attention_chunk_size=24, floor_scale=30)  # fmt: skip
    both, short = prompts(), prompts((1,))
    with saint.pruned(model.model, plan_at(1)), torch.no_grad():
        model(**short)
        with pytest.raises(ValueError, match="ends at position 31.*by place from 30 on.*in front"):
            model(**both)
