"""Applying to vision-language models: exact undo, refusals, trace, recipes, wrapped models."""

import copy
import itertools
import types

import pytest
import torch
import transformers as hf

import saint
from saint import presets
from support.families import FAMILIES, IMAGE, LAYERS, VIDEO, cache_of, prompts
from support.plans import CONNECTOR, LANGUAGE, VISION

LLAVA = FAMILIES["llava-llama"]
BATCH = [[4, "0", 7], [3, "0", 2]]
HYBRID = saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE)


@pytest.fixture
def llava():
    model = LLAVA.build()
    with torch.no_grad():  # transformers installs its own output hooks at the first forward
        model(**prompts(LLAVA, model, BATCH), output_hidden_states=True)
    return model


def snapshot(model):
    return {
        name: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def best_plan(family):
    return HYBRID if family.tower else saint.Plan(connector=CONNECTOR, language=LANGUAGE)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_undo(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, BATCH)
    with torch.no_grad():
        base = model(**inputs, output_hidden_states=True).logits
        before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
        session = saint.apply(model, best_plan(family))
        assert not torch.equal(model(**inputs).logits, base)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        saint.remove(model)
        assert snapshot(model) == before
        assert saint.status(model) is None
        assert {entry.stage for entry in session.trace} == set(session.plan.slots)  # of the last forward, still
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, BATCH)
    keep = saint.Saint(threshold=1.0, keep=1.0)
    plan = saint.Plan(connector=saint.SaintFullGraph(keep=1.0), language=saint.Stage(keep, layers=[0, 2]))
    with torch.no_grad():
        base, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with saint.pruned(model, plan) as session:
            assert torch.equal(model(**inputs).logits, base)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
            assert all(torch.equal(e.tokens_in, e.tokens_out) for e in session.trace)


def test_undo_after_an_exception(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    before = snapshot(llava)
    with torch.no_grad():
        base = llava(**inputs).logits
        hook = llava.model.language_model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), saint.pruned(llava, HYBRID):
            llava(**inputs)
        hook.remove()
        assert snapshot(llava) == before
        assert torch.equal(llava(**inputs).logits, base)


def test_a_forward_after_a_failed_one_is_right(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, HYBRID), torch.no_grad():
        expected = llava(**inputs).logits
        hook = llava.model.language_model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llava(**inputs)
        hook.remove()
        assert torch.equal(llava(**inputs).logits, expected)
        text = prompts(LLAVA, llava, [[5]])
        llava(**text)


def test_status_and_trace(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, HYBRID) as session, torch.no_grad():
        assert session.trace == []
        stages = saint.status(llava).stages
        assert list(stages) == ["vision", "connector", "language"]
        assert stages["language"][0].layers == [1, 2]
        assert stages["language"][0].module == "model.language_model"
        assert stages["vision"][0].module == "model.vision_tower"
        llava(**inputs)
        trace = session.trace
    assert [(e.stage, e.layer) for e in trace] == [("vision", 1), ("connector", 0), ("language", 1), ("language", 2)]
    for earlier, later in itertools.pairwise(trace):
        assert torch.equal(earlier.tokens_out, later.tokens_in)
        for a, b in zip(earlier.kept, later.kept, strict=True):
            assert set(b.tolist()) < set(a.tolist())
            assert b.tolist() == sorted(b.tolist())


def test_applied_twice(llava):
    with saint.pruned(llava, HYBRID):
        for target in (llava, llava.model, llava.model.vision_tower):
            with pytest.raises(saint.AlreadyAppliedError, match="remove"):
                saint.apply(target, saint.Plan(language=LANGUAGE))


@pytest.mark.parametrize(
    ("plan", "error", "match"),
    [
        (saint.Plan(language=saint.Stage(saint.Saint(), layers=[LAYERS])), ValueError, r"out of range.*0\.\.4"),
        (saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=9), layers=[9])), ValueError, r"out of range"),
        (saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=9), layers=[3])), ValueError, "behind the features"),
        (saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.3), layers=[0, 3])), ValueError, "behind the features"),
        (saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=9), layers=[1], output="nearest")), ValueError, "survivors"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(llava, plan, error, match):
    before = snapshot(llava)
    with pytest.raises(error, match=match):
        saint.apply(llava, plan)
    assert snapshot(llava) == before
    assert saint.status(llava) is None


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tower is None])
def test_families_without_vision_stage_say_why(name):
    model = FAMILIES[name].build()
    with pytest.raises(saint.UnsupportedModelError, match=r"cannot do the vision stage: its .* use the connector"):
        saint.apply(model, saint.Plan(vision=VISION))


def test_a_model_of_unknown_layers_is_refused():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    with pytest.raises(saint.UnsupportedModelError, match=r"no visual tokens.*without images.*Llama"):
        saint.apply(model, saint.Plan(language=saint.Saint()))


def test_more_placeholders_than_features(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        expected = llava(**inputs).logits
        with saint.pruned(llava, HYBRID):
            wrong = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
            with pytest.raises(ValueError, match="do not match"):
                llava(**wrong)
        assert torch.equal(llava(**inputs).logits, expected)


def test_budget_larger_than_the_prompt(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    plan = saint.Plan(language=saint.Stage(saint.Saint(keep=99), layers=[1]))
    with saint.pruned(llava, plan), pytest.raises(ValueError, match="only 36 candidates"):
        llava(**inputs)


def test_unread_images_are_an_error(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, saint.Plan(language=LANGUAGE)):
        # a model that finds its placeholders in another way
        llava.model.get_placeholder_mask = types.MethodType(type(llava.model).get_placeholder_mask, llava.model)
        with pytest.raises(saint.HookNeverFiredError, match="get_placeholder_mask"):
            llava(**inputs)


def test_an_empty_plan_changes_nothing(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        base = llava(**inputs).logits
        with saint.pruned(llava, saint.Plan()) as session:
            assert torch.equal(llava(**inputs).logits, base)
            assert session.trace == []
            assert session.kv_memory is None
            assert saint.status(llava).plan == saint.Plan()
        assert saint.status(llava) is None


def test_two_models_are_independent(llava):
    other = copy.deepcopy(llava)
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        base = other(**inputs).logits
        with saint.pruned(llava, HYBRID):
            assert torch.equal(other(**inputs).logits, base)


@pytest.mark.parametrize(
    ("name", "equivalent"),
    [(f"{m}-{e}", e) for m in ("vit", "llm", "hybrid", "fastv", "divprune") for e in (192, 128, 64)]
    + [("sparsevlm-192", 188), ("sparsevlm-128", 124), ("sparsevlm-64", 62)],
)
def test_recipes_keep_what_they_state(name, equivalent):
    """Mean over 32 LLM layers of the visual tokens present, at the real token count."""
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=24, num_attention_heads=2, image_size=48, patch_size=2
    )
    text = hf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=2, vocab_size=128
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )
    ids = torch.full((1, 580), IMAGE)
    ids[:, [0, -1, -2, -3]] = 5
    name = f"llava-1.5/{name}"
    with saint.pruned(model.eval(), name) as session, torch.no_grad():
        cache = cache_of(model(input_ids=ids, pixel_values=torch.randn(1, 3, 48, 48)))
        assert session.trace
    present = [layer.keys.shape[-2] - 4 for layer in cache.layers]
    assert abs(sum(present) / 32 - equivalent) < 1
    told = f"{equivalent} in the mean" if "sparsevlm" in name else f"{equivalent} equivalent"
    assert told in saint.recipes()[name]


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision"])
def test_videos(name):
    model = FAMILIES[name].build()
    g = torch.Generator().manual_seed(0)
    if name == "llava-onevision":
        inputs = {"pixel_values_videos": torch.randn(1, 3, 3, 24, 24, generator=g)}
    else:
        inputs = {
            "pixel_values_videos": torch.randn(128, 96, generator=g),
            "video_grid_thw": torch.tensor([[2, 8, 8]]),
        }
    count = 28 if name == "llava-onevision" else 32  # 3 frames of 3 x 3 and a newline; 2 of 4 x 4 groups
    inputs["input_ids"] = torch.tensor([[5, 6, *[VIDEO] * count, 7, 8]])
    if name != "llava-onevision":
        # Qwen3-VL places each frame (temporal patch) on its own, behind a time stamp
        half = [VIDEO] * (count // 2)
        if name == "qwen3-vl":
            inputs["input_ids"] = torch.tensor([[5, 6, *half, 9, *half, 7, 8]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == VIDEO).long() * 2
    plan = saint.Plan(connector=CONNECTOR, language=LANGUAGE)
    with saint.pruned(model, plan) as session, torch.no_grad():
        logits = model(**inputs).logits
        first = session.trace[0]
        assert (first.stage, int(first.tokens_in)) == ("connector", count)
        assert int(session.trace[-1].tokens_out) < count // 2
        assert torch.isfinite(logits).all()
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == logits.shape[1] + 3


def test_published_recipes():
    for name in ("llava-1.5/vit", "llava-1.5/llm", "llava-1.5/hybrid"):
        assert "published" in saint.recipes()[name]
    plan = presets.recipe("llava-1.5/hybrid")
    assert plan.vision == (saint.Stage(saint.SaintFullGraph(keep=375, step=16), layers=[19]),)
    assert plan.language == (saint.Stage(saint.Saint(threshold=0.83), layers=range(7, 17)),)


def test_peft(llava):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    inputs = prompts(LLAVA, llava, BATCH)
    before = snapshot(model)
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(model, HYBRID) as session:
            assert not torch.equal(model(**inputs).logits, base)
            assert len(session.trace) == 4
        assert snapshot(model) == before
        assert torch.equal(model(**inputs).logits, base)


def test_torchao(llava):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(llava.model.language_model, quantization.Int8WeightOnlyConfig())
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        base = llava(**inputs).logits
        with saint.pruned(llava, HYBRID):
            assert not torch.equal(llava(**inputs).logits, base)
        assert torch.equal(llava(**inputs).logits, base)


def test_accelerate_hooks(llava):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad(), saint.pruned(llava, HYBRID):
        expected = llava(**inputs).logits
    for layer in llava.model.language_model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    before = snapshot(llava)
    with torch.no_grad(), saint.pruned(llava, HYBRID):
        assert torch.equal(llava(**inputs).logits, expected)
    assert snapshot(llava) == before
