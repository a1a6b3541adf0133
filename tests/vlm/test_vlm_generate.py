"""Generation that stays right: caches, beams, losses, ragged batches. One family unless it matters."""

import copy

import pytest
import torch
import transformers as hf

import saint
from support.families import FAMILIES, IMAGE, LAYERS, cache_of, cached, foreign_cache, prompts
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import BATCH, GREEDY, PLANS, SPECIAL, threshold_at

LLAVA = FAMILIES["llava-llama"]


@pytest.fixture(scope="module")
def llava():
    return LLAVA.build()


@pytest.fixture(scope="module")
def twin(llava):
    return oracle_model(llava)


@pytest.fixture(autouse=True)
def _clean(llava):
    yield
    if saint.status(llava) is not None:
        saint.remove(llava)


# -- ragged batches -----------------------------------------------------------------------------------------------------


def test_every_sample_keeps_its_own_number(llava, twin):
    inputs = prompts(LLAVA, llava, [[4, "0", 7], [9], [3, "0", 2, "0", 3], [6, "0", 12]])
    threshold = threshold_at(llava, inputs, 1, 0.7)
    plan = saint.Plan(language=saint.Stage(saint.Saint(threshold=threshold), layers=[1, 2, 3]))

    with saint.pruned(llava, plan) as session, torch.no_grad():
        logits = llava(**inputs).logits
        trace = session.trace
        out = llava.generate(**inputs, max_new_tokens=32, output_logits=True, return_dict_in_generate=True, **GREEDY)

    counts = trace[-1].tokens_out.tolist()
    assert trace[0].tokens_in.tolist() == [36, 0, 72, 36]
    assert len(set(counts)) == 4
    oracle = Oracle(LLAVA, twin, trace, inputs)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert relative_error(logits[here], oracle().logits[here]) < 1e-4
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = oracle.continued(new)
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


def test_choice_is_the_vote_on_the_cached_keys(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    threshold = threshold_at(llava, inputs, 1, 0.7)
    with torch.no_grad():
        keys = cache_of(llava(**inputs)).layers[1].keys
    places = inputs["input_ids"] == IMAGE
    keys = torch.stack([keys[row, :, where] for row, where in enumerate(places)])
    ballot = saint.graph.vote(keys, threshold)
    order = saint.graph.drop_order(ballot)

    plan = saint.Plan(language=saint.Stage(saint.Saint(threshold=threshold), layers=[1]))
    with saint.pruned(llava, plan) as session, torch.no_grad():
        llava(**inputs)
        choice = session.trace[0].kept

    for row, kept in enumerate(choice):
        dropped = set(order[row, : int(ballot.votes[row])].tolist())
        assert dropped
        assert kept.tolist() == [i for i in range(36) if i not in dropped]


def test_result_does_not_depend_on_batch_mates(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    threshold = threshold_at(llava, inputs, 1, 0.7)
    plan = saint.Plan(language=saint.Stage(saint.Saint(threshold=threshold), layers=[1, 2, 3]))
    with saint.pruned(llava, plan) as session, torch.no_grad():
        together = llava(**inputs).logits
        kept = session.trace[-1].kept
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = llava(
                input_ids=inputs["input_ids"][row][real][None], pixel_values=inputs["pixel_values"][row : row + 1]
            ).logits
            assert torch.equal(session.trace[-1].kept[0], kept[row])
            # rotary positions of a left-padded prompt are shifted: equal up to rounding
            assert relative_error(together[row][real], alone[0]) < 1e-4


# -- caches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_second_turn_on_the_same_cache(llava, twin, plan):
    first = prompts(LLAVA, llava, [[4, "0", 7], [8, "0", 3]])
    more = prompts(LLAVA, llava, [[5, "0", 4], [5, "0", 4]], seed=5)
    text = prompts(LLAVA, llava, [[6], [6]], seed=6)
    cache = hf.DynamicCache(config=llava.config.get_text_config())
    traces, logits = [], []
    with saint.pruned(llava, plan) as session, torch.no_grad():
        mask = first["attention_mask"][:, :0]
        for turn in (first, text, more):
            mask = torch.cat([mask, turn["attention_mask"]], 1)
            logits.append(llava(**{**turn, "attention_mask": mask}, **cached(llava, cache)).logits)
            traces.append(session.trace)
    assert cache.get_seq_length() == mask.shape[1]

    whole = {
        name: torch.cat([turn[name] for turn in (first, text, more)], 1) for name in ("input_ids", "attention_mask")
    }
    # images in the order of the placeholders: sample by sample
    pixels = [first["pixel_values"], more["pixel_values"]]
    whole["pixel_values"] = torch.stack([pixels[turn][row] for row in range(2) for turn in range(2)])
    joined = []
    for a, b in zip(traces[0], traces[2], strict=True):
        if a.stage == "vision":
            kept = [turn.kept[row] for row in range(2) for turn in (a, b)]
        else:
            kept = [torch.cat([x, y + 36]) for x, y in zip(a.kept, b.kept, strict=True)]
        before, after = a.tokens_in.repeat(len(kept) // 2), a.tokens_out.repeat(len(kept) // 2)
        joined.append(saint.LayerTrace(a.stage, a.layer, before, after, kept))
    for a, b in zip(traces[0], traces[1], strict=True):  # a turn without images drops nothing
        assert all(torch.equal(x, y) for x, y in zip(a.kept, b.kept, strict=True))
    oracle = Oracle(LLAVA, twin, joined, whole)
    here = whole["attention_mask"].bool() & ~oracle.gone_before(99)
    assert relative_error(torch.cat(logits, 1)[here], oracle().logits[here]) < 1e-4


def test_cache_is_ragged_and_reported(llava):
    inputs = prompts(LLAVA, llava, BATCH[:1])
    with saint.pruned(llava, PLANS["language"]) as session, torch.no_grad():
        cache = cache_of(llava(**inputs))
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        text, out = 11, [int(e.tokens_out) for e in session.trace]
        memory = session.kv_memory
    assert lengths == [text + 36] * 2 + [text + out[0]] + [text + out[1]] * (LAYERS - 3)
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [text + 36] * LAYERS
    per_token = 2 * 2 * 12 * 4  # keys and values, 2 KV heads of 12 float32
    assert memory.kept == sum(lengths) * per_token
    assert memory.unpruned == LAYERS * (text + 36) * per_token


def next_step(inputs):
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return {"input_ids": torch.tensor([[7], [8], [9]]), "attention_mask": mask}


def test_copied_cache_continues(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    step = next_step(inputs)
    with saint.pruned(llava, PLANS["hybrid"]), torch.no_grad():
        cache = cache_of(llava(**inputs))
        twice = copy.deepcopy(cache)
        a = llava(**step, **cached(llava, cache)).logits
        b = llava(**step, **cached(llava, twice)).logits
    assert torch.equal(a, b)


def test_foreign_caches_are_refused(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    step = next_step(inputs)
    with torch.no_grad():
        base = llava(**inputs).logits
        with saint.pruned(llava, PLANS["language"]):
            cache = cache_of(llava(**inputs))
        with saint.pruned(llava, PLANS["hybrid"]):
            with pytest.raises(ValueError, match="another plan"):
                llava(**step, **cached(llava, cache))
            quantised = foreign_cache(llava.config.get_text_config())
            with pytest.raises(ValueError, match="DynamicCache or a StaticCache"):
                llava(**inputs, **cached(llava, quantised))
        with pytest.raises(ValueError, match="has been removed"):
            llava(**step, **cached(llava, cache))
        assert torch.equal(llava(**inputs).logits, base)


@pytest.mark.parametrize("window", [16, 40])
def test_sliding_window(window):
    family = FAMILIES["llava-mistral"]
    build = FAMILIES["llava-mistral"].build
    model = build()
    model.config.text_config.sliding_window = window
    twin = oracle_model(model)
    inputs = prompts(family, model, BATCH)
    for plan in (PLANS["language"], PLANS["hybrid"]):
        with saint.pruned(model, plan) as session, torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=40, output_logits=True, return_dict_in_generate=True, **GREEDY
            )
            trace = session.trace
        cache = cache_of(out)
        assert all(layer.keys.shape[-2] <= window + 36 for layer in cache.layers)
        expected = Oracle(family, twin, trace, inputs).continued(out.sequences[:, inputs["input_ids"].shape[1] :])
        assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


# -- ways to generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_beam_search(llava, twin, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, plan) as session, torch.no_grad():
        out = llava.generate(
            **inputs, max_new_tokens=12, num_beams=3, output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
            **GREEDY,
        )  # fmt: skip
        trace = session.trace
    per_sample = [
        saint.LayerTrace(e.stage, e.layer, *(x[:: len(e.kept) // 3] for x in (e.tokens_in, e.tokens_out, e.kept)))
        for e in trace
    ]
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = Oracle(LLAVA, twin, per_sample, inputs).continued(new)
    # suppressed tokens count in the normalisation: generate takes the log-softmax first
    scores = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).sum((1, 2))
    assert torch.allclose(out.sequences_scores, scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_without_cache(llava, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, plan) as session, torch.no_grad():
        cached = llava.generate(**inputs, max_new_tokens=6, **GREEDY)
        assert session.kv_memory is not None
        assert torch.equal(llava.generate(**inputs, max_new_tokens=6, use_cache=False, **GREEDY), cached)
        assert session.kv_memory is None


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_assisted_by_prompt_lookup(llava, plan):
    inputs = prompts(LLAVA, llava, [[4, "0", 20]])
    with saint.pruned(llava, plan), torch.no_grad():
        greedy = llava.generate(**inputs, max_new_tokens=24, **GREEDY)
        assert torch.equal(llava.generate(**inputs, max_new_tokens=24, prompt_lookup_num_tokens=4, **GREEDY), greedy)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", ["the model itself", "a language model"])
def test_assisted_by_a_model(llava, twin, plan, kind):
    inputs = prompts(LLAVA, llava, [[4, "0", 20]])
    assistant = copy.deepcopy(twin)
    if kind == "a language model":
        assistant = hf.AutoModelForCausalLM.from_config(copy.deepcopy(twin.config.text_config)).eval()
        assistant.generation_config = copy.deepcopy(twin.generation_config)
    with saint.pruned(llava, plan), torch.no_grad():
        greedy = llava.generate(**inputs, max_new_tokens=24, **GREEDY)
        assisted = llava.generate(**inputs, max_new_tokens=24, assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted, greedy)


def test_sampling(llava, twin):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, PLANS["hybrid"]) as session, torch.no_grad():
        torch.manual_seed(3)
        out = llava.generate(
            **inputs, max_new_tokens=8, do_sample=True, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        trace = session.trace
    expected = Oracle(LLAVA, twin, trace, inputs).continued(out.sequences[:, inputs["input_ids"].shape[1] :])
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_inputs_embeds(llava, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    embeds = {**inputs, "inputs_embeds": llava.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    with saint.pruned(llava, plan), torch.no_grad():
        assert torch.equal(llava(**inputs).logits, llava(**embeds).logits)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_losses_and_slices_of_logits(llava, twin, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    ids = inputs["input_ids"]
    # not the first token of a prompt either: in front of it is only padding
    first = torch.nn.functional.pad(inputs["attention_mask"], (1, 0))[:, :-1] == 0
    labels = torch.where((ids == IMAGE) | first, -100, ids)
    with saint.pruned(llava, plan) as session, torch.no_grad():
        out = llava(**inputs, labels=labels)
        last = llava(**inputs, logits_to_keep=3).logits
        trace = session.trace
    assert torch.equal(last, out.logits[:, -3:])
    oracle = Oracle(LLAVA, twin, trace, inputs)
    gone, logits = oracle.gone_before(99), oracle().logits
    losses = []
    for row in range(3):
        for position in (labels[row] != -100).nonzero().flatten().tolist():
            before = position - 1
            while before >= 0 and gone[row, before]:
                before -= 1
            if before >= 0:
                losses.append(-logits[row, before].log_softmax(-1)[ids[row, position]])
    assert len(losses) == sum(map(int, (labels[:, 1:] != -100).sum(1)))
    assert abs(out.loss - torch.stack(losses).mean()) < 1e-4 * abs(out.loss)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_hidden_states(llava, twin, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, plan) as session, torch.no_grad():
        plain = llava(**inputs).logits
        out = llava(**inputs, output_hidden_states=True)
        trace = session.trace
    assert torch.equal(out.logits, plain)
    oracle = Oracle(LLAVA, twin, trace, inputs)
    expected = oracle(output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == LAYERS + 1
    for layer, (actual, wanted) in enumerate(zip(out.hidden_states, expected, strict=True)):
        here = inputs["attention_mask"].bool() & ~oracle.gone_before(layer)
        assert actual.shape == wanted.shape
        assert bool(torch.isfinite(actual).all())
        assert relative_error(actual[here], wanted[here]) < 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_eager_attention(llava, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    eager = copy.deepcopy(llava)
    eager.set_attn_implementation("eager")
    with saint.pruned(llava, plan), saint.pruned(eager, plan), torch.no_grad():
        real = inputs["attention_mask"].bool()  # queries that see no key at all differ between kernels, pruned or not
        assert relative_error(eager(**inputs).logits[real], llava(**inputs).logits[real]) < 1e-5
        assert torch.equal(
            eager.generate(**inputs, max_new_tokens=8, **GREEDY), llava.generate(**inputs, max_new_tokens=8, **GREEDY)
        )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_text_only_prompt_is_untouched(llava, plan):
    text = prompts(LLAVA, llava, [[9], [5]])
    with torch.no_grad():
        base = llava(**text).logits
        new = llava.generate(**text, max_new_tokens=6, **GREEDY)
        with saint.pruned(llava, plan) as session:
            llava(**prompts(LLAVA, llava, BATCH))
            assert session.trace
            assert torch.equal(llava(**text).logits, base)
            assert session.trace == []
            assert torch.equal(llava.generate(**text, max_new_tokens=6, **GREEDY), new)
