"""Tokens that go between attention and MLP of decoder layers whose anatomy no table names."""

import pytest
import torch
import transformers as hf

import saint
from saint import testing
from saint.upstream import decoders as facts
from saint.upstream.tiny import make, text_config
from saint.upstream.transformers import qualified
from support.decoders import MODELS, SPECS, TEXTS, batch, inner, prompts
from support.oracles import missing, relative_error

CASES = {
    "sandwich norms, Gemma 2": ("gemma2", "Gemma2", {"sliding_window": 64}),
    "sandwich norms, GLM-4": ("glm4", "Glm4", {"attention_bias": True}),
    "norms behind, OLMo 2": ("olmo2", "Olmo2", {}),
    "residual multipliers, Granite": ("granite", "Granite", {"residual_multiplier": 0.4, "attention_multiplier": 0.3}),
    "block_sparse_moe, Granite": ("granitemoe", "GraniteMoe", {"residual_multiplier": 0.4, "num_local_experts": 4}),
    "mixture, Qwen3": ("qwen3_moe", "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "other names, Apertus": ("apertus", "Apertus", {}),
    "dropout, Phi 3": ("phi3", "Phi3", {}),
}  # fmt: skip


def middle(*layers):
    return saint.Plan(language=saint.Stage(saint.Saint(keep=0.6), layers=list(layers), placement="mid"))


def pruned(part, plan, inputs):
    """Last hidden states and trace."""
    with saint.pruned(part, plan) as session, torch.no_grad():
        out = part(**inputs).last_hidden_state
        trace = session.trace
    assert all(bool((entry.tokens_out < entry.tokens_in).all()) for entry in trace)
    return out, trace


@pytest.mark.parametrize("case", [*CASES, "lfm2", "lfm3", "llama4", "deepseek-v3"])
def test_between_attention_and_mlp(case, monkeypatch):
    """Behind a drop in a layer's middle the attention of that layer saw every token, and its MLP runs on those that stay."""
    if case in CASES:
        module, name, more = CASES[case]
        cls = f"{name}Model"
        config = getattr(hf, f"{name}Config")(**{**text_config(), **more})
        model = make(getattr(hf, f"{name}ForCausalLM"), config)
    else:
        module, cls, build = TEXTS[case]
        model = build()
    monkeypatch.setitem(facts.TEXT, qualified(module, cls), case)
    part, inputs = model.model, prompts()
    mid, trace = pruned(part, middle(1), inputs)
    behind = saint.Plan(language=saint.Stage(saint.Saint(keep=0.6), layers=[1], placement="post"))
    post, same = pruned(part, behind, inputs)
    here = inputs["attention_mask"].bool() & ~missing(trace[0].kept, inner(inputs))
    # which tokens go is read off the keys of the layer, and the MLP joins no tokens
    assert all(torch.equal(one, other) for one, other in zip(trace[0].kept, same[0].kept, strict=True))
    assert relative_error(mid[here], post[here]) < 1e-4
    if case not in ("lfm2", "lfm3", "sandwich norms, Gemma 2"):  # whose attention is recurrent or not torch's own
        expected, _ = testing.masked_oracle(part, middle(1), inputs)
        assert relative_error(mid[here], expected["last_hidden_state"][here]) < 1e-4
    with torch.no_grad():
        assert relative_error(part(**inputs).last_hidden_state[here], mid[here]) > 1e-3


def test_the_mlp_runs_on_fewer_tokens(monkeypatch):
    model = TEXTS["lfm2"][2]()
    monkeypatch.setitem(facts.TEXT, qualified("lfm2", "Lfm2Model"), "lfm2")
    seen = []
    with saint.pruned(model, middle(1)), torch.no_grad():
        hook = model.model.layers[1].feed_forward.register_forward_pre_hook(
            lambda _m, args: seen.append(args[0].shape[1])
        )
        model(**prompts())
    hook.remove()
    assert seen == [
        9 + 2 + 12
    ]  # the second of both prompts: its padding, its ends, and 12 of 20 candidates; 31 places before


def test_a_layer_that_does_more_is_refused(fresh):
    for spec in SPECS:
        saint.register(spec)
    model = MODELS["gemma4-shared-keys"]()
    inputs = batch(model)
    with torch.no_grad():
        before = model(**inputs).logits
    with pytest.raises(saint.ParityError, match='does not compute what its parts.*placement="post"'):
        saint.apply(model, middle(1))
    assert saint.status(model) is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_a_layer_without_known_parts_is_refused():
    model = make(hf.OPTForCausalLM, hf.OPTConfig(hidden_size=48, ffn_dim=64, num_attention_heads=4, num_hidden_layers=2,
                                                 word_embed_proj_dim=48, vocab_size=128))  # fmt: skip
    assert facts.anatomies(model.model.decoder.layers[0]) == []
