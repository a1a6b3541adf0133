"""Eviction: behind a prompt, no layer's cache keeps a token that a later layer dropped."""

import dataclasses

import pytest
import torch
import transformers as hf

import saint
from support.families import FAMILIES, LAYERS, cache_of, cached, prompts
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import CONNECTOR, GREEDY, LANGUAGE, VISION, threshold_at

LLAVA = FAMILIES["llava-llama"]
BATCH = [[4, "0", 7], [3, "0", 2, "0", 3], [9], [6, "1", 12]]
EVICT = dataclasses.replace(LANGUAGE, evict=True)


class EvictingOracle(Oracle):
    """Positions behind the prompt (``length``) see, in every layer, only what is left behind the last one."""

    def __init__(self, *args, length):
        super().__init__(*args)
        self.length = length

    def __call__(self, **changes):
        layers = self.twin.get_submodule(self.family.decoder)
        hooks = [layer.register_forward_pre_hook(self.hide_from_new, with_kwargs=True) for layer in layers]
        try:
            return super().__call__(**changes)
        finally:
            for hook in hooks:
                hook.remove()

    def hide_from_new(self, _module, args, kwargs):
        mask, gone = kwargs["attention_mask"], self.gone_before(99)
        new = torch.arange(mask.shape[2]) >= self.length
        hidden = torch.nn.functional.pad(gone, (0, mask.shape[3] - gone.shape[1]))[:, None, None] & new[:, None]
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}


def plan_for(family):
    return saint.Plan(vision=VISION if family.tower else None, connector=CONNECTOR, language=EVICT)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_the_oracle(name):
    family = FAMILIES[name]
    model = family.build()
    twin = oracle_model(model)
    inputs = prompts(family, model, BATCH)
    length = inputs["input_ids"].shape[1]

    with saint.pruned(model, plan_for(family)) as session, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=32, output_logits=True, return_dict_in_generate=True, **GREEDY)
        trace = session.trace

    new = out.sequences[:, length:]
    logits = torch.stack(out.logits, 1)
    assert relative_error(logits, EvictingOracle(family, twin, trace, inputs, length=length).continued(new)) < 1e-4
    kept = Oracle(family, twin, trace, inputs).continued(new)
    assert relative_error(logits[:, :1], kept[:, :1]) < 1e-4  # the prompt's own forward saw them
    assert relative_error(logits[:, 1:], kept[:, 1:]) > 1e-3, "eviction changes nothing"
    if name != "gemma3":  # its sliding layers store less
        assert len({layer.keys.shape[-2] for layer in cache_of(out).layers}) == 1


def test_bytes_fall():
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, [[4, "0", 7]])
    memory, stored, logical = {}, {}, {}
    for evict in (False, True):
        plan = saint.Plan(language=dataclasses.replace(LANGUAGE, evict=evict))
        with saint.pruned(model, plan) as session, torch.no_grad():
            cache = cache_of(model(**inputs))
        # the session is over: what it measured must come from inside
        stored[evict] = [layer.keys.shape[-2] for layer in cache.layers]
        logical[evict] = [cache.get_seq_length(i) for i in range(LAYERS)]
        with saint.pruned(model, plan) as session, torch.no_grad():
            model(**inputs)
            memory[evict], left = session.kv_memory, 11 + int(session.trace[-1].tokens_out)
    per_token = 2 * 2 * 12 * 4  # keys and values, 2 KV heads of 12 float32
    assert stored[True] == [left] * LAYERS
    assert logical[True] == logical[False] == [47] * LAYERS
    assert memory[True].kept == left * LAYERS * per_token < memory[False].kept == sum(stored[False]) * per_token
    assert memory[True].unpruned == memory[False].unpruned == 47 * LAYERS * per_token


def test_prompt_is_as_without_eviction():
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, BATCH)
    with torch.no_grad():
        with saint.pruned(model, saint.Plan(language=LANGUAGE)):
            expected = model(**inputs).logits
        with saint.pruned(model, saint.Plan(language=EVICT)):
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model(**inputs, use_cache=False).logits, expected)


def test_every_sample_keeps_its_own_number():
    model = LLAVA.build()
    twin = oracle_model(model)
    inputs = prompts(LLAVA, model, BATCH)
    length = inputs["input_ids"].shape[1]
    method = saint.Saint(threshold=threshold_at(model, inputs, 1, 0.7))
    with saint.pruned(model, saint.Plan(language=saint.Stage(method, layers=[1, 3], evict=True))) as session:
        out = model.generate(**inputs, max_new_tokens=16, output_logits=True, return_dict_in_generate=True, **GREEDY)
        trace = session.trace
    assert len(set(trace[-1].tokens_out.tolist())) == 4
    expected = EvictingOracle(LLAVA, twin, trace, inputs, length=length).continued(out.sequences[:, length:])
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


@pytest.mark.parametrize("window", [16, 40])
def test_sliding_window(window):
    family = FAMILIES["llava-mistral"]
    model = family.build()
    model.config.text_config.sliding_window = window
    twin = oracle_model(model)
    inputs = prompts(family, model, BATCH)
    length = inputs["input_ids"].shape[1]
    with saint.pruned(model, saint.Plan(language=EVICT)) as session, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40, output_logits=True, return_dict_in_generate=True, **GREEDY)
        trace = session.trace
    expected = EvictingOracle(family, twin, trace, inputs, length=length).continued(out.sequences[:, length:])
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


def test_second_image_on_the_same_cache():
    """Each prompt evicts its own; what the first left is seen by all layers of the second."""
    model = LLAVA.build()
    twin = oracle_model(model)
    first, text, more = (
        prompts(LLAVA, model, sample, seed=seed)
        for seed, sample in enumerate(([[4, "0", 7], [8, "0", 3]], [[6], [6]], [[5, "0", 4], [5, "0", 4]]))
    )
    cache = hf.DynamicCache(config=model.config.get_text_config())
    traces, logits = [], []
    with saint.pruned(model, saint.Plan(language=EVICT)) as session, torch.no_grad():
        mask = first["attention_mask"][:, :0]
        for turn in (first, text, more):
            mask = torch.cat([mask, turn["attention_mask"]], 1)
            logits.append(model(**{**turn, "attention_mask": mask}, **cached(model, cache)).logits)
            traces.append(session.trace)
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = torch.tensor([[7], [8]])
            logits.append(model(input_ids=step, attention_mask=mask, **cached(model, cache)).logits)

    ids = torch.cat([turn["input_ids"] for turn in (first, text, more)] + [torch.tensor([[7] * 3, [8] * 3])], 1)
    pixels = [first["pixel_values"], more["pixel_values"]]
    whole = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.stack([pixels[turn][row] for row in range(2) for turn in range(2)]),
    }
    ends = (first["input_ids"].shape[1], ids.shape[1] - 3)
    joined = [
        saint.LayerTrace(
            a.stage, a.layer, a.tokens_in, a.tokens_out, [torch.cat([x, y + 36]) for x, y in zip(a.kept, b.kept, strict=True)]
        )
        for a, b in zip(traces[0], traces[2], strict=True)
    ]  # fmt: skip

    class Turns(EvictingOracle):
        def hide_from_new(self, module, args, kwargs):
            for end in ends:  # what a turn dropped is hidden from everything behind it
                self.length = end
                gone = self.gone_before(99) & (torch.arange(ids.shape[1]) < end)
                kwargs = self.hide_rows(kwargs, gone)
            return args, kwargs

        def hide_rows(self, kwargs, gone):
            mask = kwargs["attention_mask"]
            hidden = gone[:, None, None] & (torch.arange(mask.shape[2]) >= self.length)[:, None]
            return {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    oracle = Turns(LLAVA, twin, joined, whole, length=0)
    here = mask.bool() & ~oracle.gone_before(99)
    assert relative_error(torch.cat(logits, 1)[here], oracle().logits[here]) < 1e-4


def test_beams_and_prompt_lookup():
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, [[4, "0", 20]])
    with saint.pruned(model, saint.Plan(language=EVICT)), torch.no_grad():
        greedy = model.generate(**inputs, max_new_tokens=24, **GREEDY)
        assert torch.equal(model.generate(**inputs, max_new_tokens=24, prompt_lookup_num_tokens=4, **GREEDY), greedy)
        beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, **GREEDY)
        assert beams.shape == (1, inputs["input_ids"].shape[1] + 8)


def test_a_plan_that_keeps_everything_evicts_nothing():
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, BATCH)
    plan = saint.Plan(language=saint.Stage(saint.Saint(threshold=1.0, keep=1.0), layers=[1], evict=True))
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=8, **GREEDY)
        with saint.pruned(model, plan) as session:
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, **GREEDY), expected)
            assert session.kv_memory.kept == session.kv_memory.unpruned


def test_off_by_default_and_in_the_plans_dict():
    assert saint.Stage(saint.Saint()).evict is False
    plain, evicting = saint.Plan(language=LANGUAGE), saint.Plan(language=EVICT)
    assert [plan.to_dict()["language"][0]["evict"] for plan in (plain, evicting)] == [False, True]
    assert saint.Plan.from_dict(plain.to_dict()) == plain
    assert saint.Plan.from_dict(evicting.to_dict()) == evicting != plain


@pytest.mark.parametrize("stage", ["vision", "connector"])
def test_only_the_language_stage_evicts(stage):
    with pytest.raises(ValueError, match="language stage only"):
        saint.Plan(**{stage: saint.Stage(saint.SaintFullGraph(keep=0.5), evict=True)})
    with pytest.raises(ValueError, match="True or False"):
        saint.Stage(saint.Saint(), evict=1)
