"""`saint check` of vision-language models: the contracts hold on every family, and see what is wrong."""

import pytest
import torch

import saint
from saint.testing.vlm import CONTRACTS, check_vlm, hybrid_plan
from support.families import FAMILIES, maker


@pytest.mark.parametrize(
    "name", ["llava-llama", "qwen2.5-vl", "gemma3", "paligemma", "llava-next", "llava-onevision", "idefics3", "smolvlm"]
)
def test_contracts_hold(name):
    family = FAMILIES[name]
    model = family.build()
    results = {result.contract: result for result in check_vlm(model, maker(family, model))}
    assert list(results) == list(CONTRACTS)
    assert {r.outcome for r in results.values()} == {"passed"}, results


@pytest.mark.parametrize(
    ("slot", "method"),
    [("connector", name) for name in ("cdpruner", "mmr")]
    + [("language", name) for name in ("fastv", "sparsevlm", "priortr", "scope")],
)
def test_methods_that_look_at_the_text_look_at_that_of_the_prompt(slot, method):
    """The oracles of an answer leave what the prompt decided."""
    family, cls = FAMILIES["llava-llama"], saint.methods.get(method)
    model = family.build()
    behind = saint.Stage(saint.Saint(threshold=0.1), layers=[2])
    language = behind if slot == "connector" else saint.Stage(cls(keep=0.5), layers=[1])
    plan = saint.Plan(connector=cls(keep=0.5) if slot == "connector" else (), language=language)
    results = check_vlm(model, maker(family, model), plan)
    assert {r.outcome for r in results} == {"passed"}, results


@pytest.mark.parametrize("slot", ["vision", "language"])
def test_of_methods_that_merge_no_oracle_of_hidden_tokens_is_asked(slot):
    family = FAMILIES["llava-llama"]
    model = family.build()
    stages = {"language": saint.Stage(saint.Saint(threshold=0.1), layers=[2])}
    stages[slot] = saint.Stage(saint.methods.ToMe(keep=0.5), layers=[1])
    outcomes = {r.contract: r.outcome for r in check_vlm(model, maker(family, model), saint.Plan(**stages))}
    skipped = {"masked oracle", "generation"} | ({"removal oracle"} if slot == "vision" else set())
    assert outcomes == {name: "skipped" if name in skipped else "passed" for name in CONTRACTS}


def test_contracts_see_a_wrong_mask(monkeypatch):
    from saint.language import decoder

    family = FAMILIES["llava-llama"]
    model = family.build()
    monkeypatch.setattr(decoder, "gather_rotary", lambda tables, tokens: tuple(t[:, : tokens.slots] for t in tables))
    failed = {r.contract for r in check_vlm(model, maker(family, model)) if r.outcome == "failed"}
    assert {"masked oracle", "generation"} <= failed


def test_a_default_plan_uses_every_stage():
    assert list(hybrid_plan(FAMILIES["llava-llama"].build()).slots) == ["vision", "connector", "language"]
    assert list(hybrid_plan(FAMILIES["llava-onevision"].build()).slots) == ["connector", "language"]
    with pytest.raises(saint.UnsupportedModelError):
        hybrid_plan(torch.nn.Linear(2, 2))


def test_the_command(run, demo_llava):
    code, out, _ = run("check", "demo:small-llava")
    assert code == 0, out
    assert out.count("passed") == len(CONTRACTS)
