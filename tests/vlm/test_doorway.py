"""What leaves in front of a language model: both oracles, caches of any class, ways to prompt, merges by others."""

import copy
import threading

import pytest
import torch
import transformers as hf
from transformers import masking_utils

import saint
from saint import testing
from saint.upstream.tiny import make, text_config
from saint.vlm.prompts import answered
from support.answers import generated
from support.families import FAMILIES, IMAGE, cache_of, cached, layers_of, one_at_a_time, prompts
from support.oracles import relative_error
from support.plans import CONNECTOR, GREEDY, VISION

BATCH = [[4, "0", 7], [3, "1", 2], [6, "0", 12]]  # left padding, images of two sizes
LLAVA = FAMILIES["llava-llama"]
CONNECT = saint.Plan(connector=CONNECTOR)
PLANS = {
    "connector": CONNECT,
    "vision": saint.Plan(vision=VISION),
    "both": saint.Plan(vision=VISION, connector=CONNECTOR),
}
CASES = [(name, plan) for name, family in FAMILIES.items() for plan in PLANS if family.tower or plan == "connector"]


@pytest.fixture(scope="module")
def models():
    return one_at_a_time(lambda name: FAMILIES[name].build())


@pytest.fixture
def llava():
    return LLAVA.build()


# -- both oracles, every family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_prompt_and_answer_equal_both_oracles(models, name, plan):
    family, model, plan = FAMILIES[name], models(name), PLANS[plan]
    inputs = prompts(family, model, BATCH, seed=3)
    length = inputs["input_ids"].shape[1]

    new, logits, trace, *_ = generated(model, plan, inputs, 6)
    with saint.pruned(model, plan), torch.no_grad():
        prompt = model(**inputs).logits

    assert all(bool((entry.tokens_out < entry.tokens_in).any()) for entry in trace)
    removed, _ = testing.removal_oracle(model, plan, answered(model, inputs, new))
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert relative_error(prompt[words], removed["logits"][:, :length][words]) < 1e-4
    assert relative_error(logits, removed["logits"][:, length - 1 : -1]) < 1e-4
    assert relative_error(logits, testing.holes_oracle(model, plan, inputs, new)) < 1e-4
    with torch.no_grad():
        assert relative_error(prompt[words], model(**inputs).logits[words]) > 1e-3


def test_the_oracles_refuse_a_language_stage(llava):
    plan = saint.Plan(language=saint.Stage(saint.Saint(), layers=[1]))
    inputs = prompts(LLAVA, llava, BATCH)
    with pytest.raises(ValueError, match="masked_oracle"):
        testing.removal_oracle(llava, plan, inputs)
    with pytest.raises(ValueError, match="masked_oracle"):
        testing.holes_oracle(llava, plan, inputs, inputs["input_ids"][:, :2])


# -- caches of any class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(models, name, plan):
    family, model, plan = FAMILIES[name], models(name), PLANS[plan]
    inputs = prompts(family, model, BATCH[:2], seed=1)

    dynamic, logits, _, memory, _ = generated(model, plan, inputs, 64)
    static, same, *_ = generated(model, plan, inputs, 64, cache_implementation="static")
    again, _, _, fixed, _ = generated(model, plan, inputs, 64, cache_implementation="static")  # the cache is used again

    assert torch.equal(static, dynamic)
    assert torch.equal(again, dynamic)
    assert relative_error(same, logits) < 1e-4
    assert memory.kept < memory.unpruned
    assert fixed.kept / fixed.unpruned == pytest.approx(memory.kept / memory.unpruned, rel=0.05)


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static", "dynamic"])
def test_other_caches(llava, implementation):
    if implementation.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator: torch streams")
    inputs = prompts(LLAVA, llava, BATCH)
    want = generated(llava, CONNECT, inputs, 8)[0]
    assert torch.equal(generated(llava, CONNECT, inputs, 8, cache_implementation=implementation)[0], want)


def test_the_cache_is_the_models_own_and_says_the_logical_length(llava):
    inputs = prompts(LLAVA, llava, BATCH[:1])
    length = inputs["input_ids"].shape[1]
    with saint.pruned(llava, CONNECT) as session, torch.no_grad():
        out = llava(**inputs)
        cache = cache_of(out)
        left = int(session.trace[-1].tokens_out)
        assert isinstance(cache, hf.DynamicCache)
        assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
        assert cache.get_seq_length() == length
        assert cache.get_mask_sizes(1, 0) == (length + 1, 0)
        assert {layer.keys.shape[2] for layer in cache.layers} == {length - 36 + left}
        memory = session.kv_memory
    assert out.logits.shape[1] == length
    per_place = len(cache.layers) * 2 * 2 * 12 * 4  # keys and values, 2 KV heads of 12 float32
    assert (memory.kept, memory.unpruned) == ((length - 36 + left) * per_place, length * per_place)
    cache.reset()
    assert type(cache) is hf.DynamicCache


def test_a_padded_sample_has_padding_in_front(llava):
    inputs = prompts(LLAVA, llava, BATCH[::2])
    seen = []
    with saint.pruned(llava, CONNECT) as session, torch.no_grad():
        hook = layers_of(llava)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        llava(**inputs)
        hook.remove()
        left = session.trace[-1].tokens_out
    (rows,) = seen
    real = inputs["attention_mask"].sum(1) - 36 + left
    assert rows.shape[1] == int(real.max()), "the padding of the caller leaves too"
    assert [int((row.abs().sum(-1) == 0).sum()) for row in rows] == (real.max() - real).tolist()
    assert bool((rows[0, : int(real.max() - real[0])] == 0).all())


def test_a_quantised_cache_runs(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    fp8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    try:
        generated(llava, saint.Plan(), inputs, 2, **fp8)
    except (ValueError, ImportError) as error:
        pytest.skip(f"upstream: {error}")
    want, logits, *_ = generated(llava, CONNECT, inputs, 8)
    new, near, _, memory, _ = generated(llava, CONNECT, inputs, 8, **fp8)
    assert relative_error(near[:, 0], logits[:, 0]) < 1e-4  # the prompt attends to what it computed
    assert new.shape == want.shape
    assert memory is None


def test_threads_share_a_model(llava):
    batches = [prompts(LLAVA, llava, [[4 + i, "0", 7], [3, "0", 2 + i]], seed=i) for i in range(3)]
    made = {}

    def answer(index):
        with torch.no_grad():
            for _ in range(2):
                made[index] = llava.generate(**batches[index], max_new_tokens=8, **GREEDY)

    with saint.pruned(llava, PLANS["both"]), torch.no_grad():
        want = [llava.generate(**inputs, max_new_tokens=8, **GREEDY) for inputs in batches]
        threads = [threading.Thread(target=answer, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(made[index], tokens) for index, tokens in enumerate(want))


def test_quantised_caches_know_no_bytes():
    from saint.language.cache import memory

    cache = hf.DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    assert memory(cache, 4).unpruned == 2 * memory(cache, 4).kept
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]  # the others are kept in another form
    cache.layers[0].get_seq_length = lambda: 4
    assert memory(cache, 4) is None
    assert memory(None, 0) is None


@pytest.mark.parametrize(
    "reach", [{}, {"sliding_window": 5}, {"attention_chunk_size": 4}], ids=["full", "window", "chunk"]
)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_made_from_positions_are_those_of_transformers(reach, additive):
    from saint.language.entries import CachePositions
    from saint.language.shortening import Span, reaches

    config = hf.LlamaConfig(**text_config(**reach))
    config._attn_implementation = "eager" if additive else "sdpa"
    x = torch.zeros(2, 11, 48)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0  # the caller's padding
    want = masking_utils.create_masks_for_generate(config, x, mask, None)
    places = torch.arange(11).expand(2, 11)
    held = CachePositions(places, mask.bool(), 11)
    span = Span(places, mask.bool(), held, 0, 11, mask, x.dtype, additive)
    got = span.made(reaches(config), 0, 11)
    real = mask.bool()[:, None, :, None].expand_as(got)  # rows of padding see themselves here
    assert got.dtype == want.dtype
    assert torch.equal(got[real], want.expand_as(got)[real])
    assert span.sees_all(reaches(config)) == (not reach)


# -- ways to prompt -----------------------------------------------------------------------------------------------------


def upstream_feeds_pieces(model, inputs):
    """Releases before 5.24 lose the images of a prompt in pieces."""
    whole, pieces = (generated(model, saint.Plan(), inputs, 6, **more)[0] for more in ({}, {"prefill_chunk_size": 16}))
    if not torch.equal(whole, pieces):
        pytest.skip("upstream gives other tokens in pieces, unpruned")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [1, 7, 16])
def test_a_prompt_in_pieces(llava, plan, size):
    inputs = prompts(LLAVA, llava, [[4, "0", 7, "0", 2], [3, "0", 5]])
    upstream_feeds_pieces(llava, inputs)
    new, logits, trace, memory, _ = generated(llava, PLANS[plan], inputs, 8)
    pieces, same, told, kept, _ = generated(llava, PLANS[plan], inputs, 8, prefill_chunk_size=size)
    assert torch.equal(pieces, new)
    assert relative_error(same, logits) < 1e-4
    for a, b in zip(told, trace, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.kept, b.kept, strict=True))
    assert kept.unpruned == memory.unpruned
    # the samples of a piece keep different numbers, so each piece is padded
    assert memory.kept <= kept.kept <= kept.unpruned
    assert size == 1 or kept.kept < kept.unpruned


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "llava-next"])
def test_pieces_of_other_families(models, name):
    family, model = FAMILIES[name], models(name)
    inputs = prompts(family, model, [[4, "0", 7, "1", 2]])
    try:
        upstream_feeds_pieces(model, inputs)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"upstream: {error}")
    want = generated(model, PLANS["both"], inputs, 6)[0]
    assert torch.equal(generated(model, PLANS["both"], inputs, 6, prefill_chunk_size=16)[0], want)


@pytest.mark.parametrize("method", [saint.SaintFullGraph(keep=10), saint.methods.FastV(keep=0.5)])
def test_under_a_language_stage_a_prompt_runs_in_one_piece(llava, method):
    plan = saint.Plan(language=saint.Stage(method, layers=[1]))
    inputs = prompts(LLAVA, llava, BATCH[:1])
    want = generated(llava, plan, inputs, 4)[0]
    with pytest.warns(UserWarning, match="in one piece and not in pieces of prefill_chunk_size=16"):
        assert torch.equal(generated(llava, plan, inputs, 4, prefill_chunk_size=16)[0], want)


LANGUAGE = saint.Stage(saint.Saint(threshold=0.9, keep=0.6), layers=[1, 2])


@pytest.mark.parametrize("plan", [*PLANS, "language", "hybrid"])
def test_drafts_that_are_rejected_in_the_first_forward(llava, plan):
    plan = {
        **PLANS,
        "language": saint.Plan(language=LANGUAGE),
        "hybrid": saint.Plan(connector=CONNECTOR, language=LANGUAGE),
    }[plan]
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    ids = inputs["input_ids"]
    ids[0, -6:] = torch.tensor([5, 6, 7, 8, 5, 6])  # the end has stood there before: a draft in the first forward
    drafted = []
    with saint.pruned(llava, plan), torch.no_grad():
        greedy = llava.generate(**inputs, max_new_tokens=12, **GREEDY)
        hook = llava.model.register_forward_pre_hook(
            lambda _, args, given: drafted.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        assert torch.equal(llava.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=4, **GREEDY), greedy)
        hook.remove()
    assert drafted[0] > ids.shape[1], "no draft in the first forward"


def test_drafts_are_no_candidates_in_a_text_model():
    model = make(hf.LlamaForCausalLM, hf.LlamaConfig(**text_config()))
    ids = torch.tensor([[9, 5, 6, 7, 8, 3, 5, 6]])
    with saint.pruned(model, saint.Plan(language=saint.Stage(saint.SaintFullGraph(keep=3), layers=[1]))) as session:
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert session.trace[0].tokens_in.tolist() == [6]
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), greedy)
        assert session.trace[0].tokens_in.tolist() == [6]


ASKS = {  # methods that look at the text
    **{
        name: saint.Plan(language=saint.Stage(saint.methods.get(name)(keep=0.5), layers=[1]))
        for name in ("fastv", "priortr", "sparsevlm")
    },
    **{name: saint.Plan(connector=saint.methods.get(name)(keep=0.5)) for name in ("cdpruner", "mmr")},
    "behind": saint.Plan(connector=CONNECTOR, language=saint.Stage(saint.methods.FastV(keep=0.5), layers=[1])),
}


@pytest.mark.parametrize("plan", ASKS)
def test_drafts_are_none_of_the_text_that_methods_look_at(llava, plan):
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    ids = inputs["input_ids"]
    ids[0, -6:] = torch.tensor([5, 6, 7, 8, 5, 6])  # a draft in the first forward
    with saint.pruned(llava, ASKS[plan]) as session, torch.no_grad():
        greedy = llava.generate(**inputs, max_new_tokens=12, **GREEDY)
        kept = [entry.kept[0].tolist() for entry in session.trace]
        assert torch.equal(llava.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=4, **GREEDY), greedy)
        assert [entry.kept[0].tolist() for entry in session.trace] == kept


@pytest.mark.parametrize("plan", ASKS)
def test_an_answer_behind_a_prompt_is_none_of_the_text_that_methods_look_at(llava, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    length = inputs["input_ids"].shape[1]
    with saint.pruned(llava, ASKS[plan]) as session, torch.no_grad():
        out = llava.generate(**inputs, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **GREEDY)
        kept = [[row.tolist() for row in entry.kept] for entry in session.trace]
        grown = answered(llava, inputs, out.sequences[:, length:])
        with session.prompt(length):
            logits = llava(**grown).logits[:, length - 1 : -1]
        assert [[row.tolist() for row in entry.kept] for entry in session.trace] == kept
        assert relative_error(logits, torch.stack(out.logits, 1)) < 1e-4
        llava(**grown)
        assert [[row.tolist() for row in entry.kept] for entry in session.trace] != kept
        with session.prompt(length), pytest.raises(ValueError, match="at least 1"), session.prompt(0):
            pass


def test_an_answer_behind_a_prompt_brings_no_candidates_to_a_text_model():
    model = make(hf.LlamaForCausalLM, hf.LlamaConfig(**text_config()))
    ids = torch.tensor([[9, 5, 6, 7, 8, 3, 5, 6]])
    with saint.pruned(model, saint.Plan(language=saint.Stage(saint.SaintFullGraph(keep=3), layers=[1]))) as session:
        with session.prompt(6):
            model(ids)
        assert session.trace[0].tokens_in.tolist() == [4]
        model(ids)
        assert session.trace[0].tokens_in.tolist() == [6]


def test_an_encoder_has_no_prompt():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**size, image_size=56, patch_size=14))
    with (
        saint.pruned(model, saint.Saint(keep=0.5)) as session,
        pytest.raises(ValueError, match="no prompts"),
        session.prompt(3),
    ):
        pass


def test_continuous_batching_is_refused(llava):
    with saint.pruned(llava, CONNECT):
        with pytest.raises(ValueError, match="engine of its own"):
            llava.generate_batch(inputs=[[5, 6, 7]])
        with pytest.raises(ValueError, match="engine of its own"):
            llava.init_continuous_batching()


# -- packed rows --------------------------------------------------------------------------------------------------------


def packed(family, model, samples):
    """Documents alone, and packed into one row; (documents, row, ends)."""
    alone = [prompts(family, model, [sample], seed=seed) for seed, sample in enumerate(samples)]
    lengths = [one["input_ids"].shape[1] for one in alone]
    text = torch.cat([torch.arange(n) for n in lengths])[None]
    row = {name: torch.cat([one[name] for one in alone if name in one], 1 if value.shape[:1] == (1,) and value.ndim == 2 else 0)
           for name, value in alone[-1].items() if name != "attention_mask"}  # fmt: skip
    row["position_ids"], row["use_cache"] = text, False
    if "image_grid_thw" in row:
        row["image_grid_thw"] = torch.cat([one["image_grid_thw"] for one in alone if "image_grid_thw" in one])
        three = [
            model.model.get_rope_index(
                one["input_ids"], image_grid_thw=one.get("image_grid_thw"), attention_mask=one["attention_mask"],
                mm_token_type_ids=one["mm_token_type_ids"],
            )[0]
            for one in alone
        ]  # fmt: skip
        row["position_ids"] = torch.cat([text[None], torch.cat(three, 2)])
    return alone, row, lengths


@pytest.mark.parametrize("name", ["llava-llama", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("plan", ["connector", "vision", "both", "language", "hybrid"])
def test_documents_of_a_packed_row_are_samples_of_their_own(models, name, plan):
    family, model = FAMILIES[name], models(name)
    plan = {
        **PLANS,
        "language": saint.Plan(language=LANGUAGE),
        "hybrid": saint.Plan(connector=CONNECTOR, language=LANGUAGE),
    }[plan]
    alone, row, lengths = packed(family, model, [(3, "0", 5), (4,), (6, "1", 4)])
    with torch.no_grad(), saint.pruned(model, plan) as session:
        together = model(**row).logits[0].split(lengths)
        trace = session.trace
        for index, (inputs, got) in enumerate(zip(alone, together, strict=True)):
            want = model(**inputs, use_cache=False).logits[0]
            words = inputs["input_ids"][0] != IMAGE
            assert relative_error(got[words], want[words]) < 1e-4
            for entry, single in zip(trace, session.trace, strict=False):
                if entry.stage != "vision" and session.trace:
                    assert torch.equal(entry.kept[index], single.kept[0])


@pytest.mark.parametrize("method", [saint.methods.FastV, saint.methods.PriorTR, saint.methods.SparseVLM])
def test_packed_rows_that_are_not_apart_are_refused(llava, method):
    _, row, _ = packed(LLAVA, llava, [(3, "0", 5), (6, "0", 4)])
    two = {name: value if isinstance(value, bool) else torch.cat([value, value]) for name, value in row.items()}
    asks = saint.Plan(language=saint.Stage(method(keep=0.5), layers=[1]))
    with torch.no_grad():
        with saint.pruned(llava, CONNECT), pytest.raises(ValueError, match="packed into each of 2 rows"):
            llava(**two)
        with saint.pruned(llava, asks), pytest.raises(ValueError, match="packed into one row"):
            llava(**row)


# -- merged by others ---------------------------------------------------------------------------------------------------


def merged(model, inputs, encode):
    """The inputs of a caller who computes features and merges them himself."""
    given = {name: value for name, value in inputs.items() if not name.startswith(("pixel", "image_", "input_ids"))}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat([one.flatten(0, -2) for one in encode()])
    given["inputs_embeds"] = embeds.masked_scatter((inputs["input_ids"] == IMAGE).unsqueeze(-1), features)
    return given


def features_of(model, inputs):
    pixels = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image_"))}
    found = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    return list(found) if isinstance(found, (list, tuple)) else [found]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("plan", ["connector", "vision", "language", "hybrid"])
def test_features_merged_by_the_caller(models, name, plan):
    family, model = FAMILIES[name], models(name)
    if plan in ("vision", "hybrid") and family.tower is None:
        pytest.skip("no vision stage")
    if name in ("idefics3", "smolvlm"):
        pytest.skip("its features are those of images without padding: the family's own merge counts them")
    inputs = prompts(family, model, [[4, "0", 7]])
    plan = {
        "connector": CONNECT, "vision": PLANS["vision"], "language": saint.Plan(language=LANGUAGE),
        "hybrid": saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE),
    }[plan]  # fmt: skip
    with torch.no_grad():
        base = model(**inputs).logits
        if name.startswith("qwen"):  # the positions of images come from their grid: given by the caller
            position = model.model.get_rope_index(
                inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
            )[0]  # fmt: skip
        more = {"position_ids": position} if name.startswith("qwen") else {}
        same = model(**merged(model, inputs, lambda: features_of(model, inputs)), **more).logits
        with saint.pruned(model, plan) as session:
            want = model(**inputs).logits
            expected = session.trace
            model(**prompts(family, model, [[5]]))  # another prompt between
            given = merged(model, inputs, lambda: features_of(model, inputs))
            got = model(**given, **more).logits
            trace = session.trace
    words = inputs["input_ids"] != IMAGE
    if name != "qwen3-vl":  # whose deepest features go another way
        assert relative_error(same[words], base[words]) < 1e-4
        assert relative_error(got[words], want[words]) < 1e-4
    assert [entry.stage for entry in trace] == [entry.stage for entry in expected]
    for a, b in zip(trace, expected, strict=True):
        assert a.tokens_out.tolist() == b.tolist() if False else torch.equal(a.tokens_out, b.tokens_out)


def test_features_that_are_not_found_again_are_an_error(llava):
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    for plan in (CONNECT, saint.Plan(language=LANGUAGE), PLANS["both"]):
        with torch.no_grad(), saint.pruned(llava, plan):
            given = merged(llava, inputs, lambda: [2 * one for one in features_of(llava, inputs)])
            with pytest.raises(saint.HookNeverFiredError, match="none of them is found"):
                llava(**given)
            llava(inputs_embeds=llava.get_input_embeddings()(torch.tensor([[5, 6, 7]])))  # text is none


def test_token_ids_beside_embeddings_tell_which_are_visual(models):
    """Also of features that the caller has changed, which are not found by what they hold."""
    model = models("qwen2.5-vl")
    inputs = prompts(FAMILIES["qwen2.5-vl"], model, [[4, "0", 7]])
    with torch.no_grad(), saint.pruned(model, CONNECT) as session:
        given = merged(model, inputs, lambda: [2 * one for one in features_of(model, inputs)])
        with pytest.raises(saint.HookNeverFiredError, match="give input_ids beside the embeddings"):
            model(**given)
        model(**given, input_ids=inputs["input_ids"])
        trace = session.trace
    assert trace[0].tokens_in.tolist() == (inputs["input_ids"] == IMAGE).sum(1).tolist()


def test_marked_rows_never_enter_the_language_model(llava):
    """Features of a vision stage that were computed earlier, and forgotten."""
    inputs, seen = prompts(LLAVA, llava, [[4, "0", 7]]), []
    with torch.no_grad(), saint.pruned(llava, PLANS["vision"]) as session:
        want = llava(**inputs).logits
        given = merged(llava, inputs, lambda: features_of(llava, inputs))
        session._glue.known._numbers.clear()
        hook = layers_of(llava)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        got = llava(**given).logits
        hook.remove()
    assert seen[0].shape[1] < given["inputs_embeds"].shape[1]
    words = inputs["input_ids"] != IMAGE
    assert relative_error(got[words], want[words]) < 1e-4


# -- steps --------------------------------------------------------------------------------------------------------------


def test_a_step_of_an_unpadded_prompt_passes_no_mask(llava):
    inputs = prompts(LLAVA, llava, BATCH[:1])
    masks = []
    with saint.pruned(llava, CONNECT), torch.no_grad():
        hook = layers_of(llava)[0].register_forward_pre_hook(
            lambda _, args, given: masks.append(given.get("attention_mask")), with_kwargs=True
        )
        llava.generate(**inputs, max_new_tokens=4, **GREEDY)
        hook.remove()
    assert masks[1:] == [None] * 3


def test_layers_are_not_patched(llava):
    with saint.pruned(llava, PLANS["both"]):
        assert all("forward" not in vars(layer) for layer in layers_of(llava))


def test_a_copied_cache_and_a_pickled_one(llava, tmp_path):
    inputs = prompts(LLAVA, llava, BATCH)
    step = {"input_ids": torch.tensor([[7], [8], [9]]),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}  # fmt: skip
    with saint.pruned(llava, CONNECT), torch.no_grad():
        cache = cache_of(llava(**inputs))
        twice = copy.deepcopy(cache)
        a = llava(**step, **cached(llava, cache)).logits
        b = llava(**step, **cached(llava, twice)).logits
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="has been removed"), torch.no_grad():
        llava(**step, **cached(llava, twice))
    with saint.pruned(llava, PLANS["vision"]), torch.no_grad(), pytest.raises(ValueError, match="another plan"):
        llava(**step, **cached(llava, twice))


def test_gradients_pass_the_door(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    labels = torch.where((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100, inputs["input_ids"])
    with saint.pruned(llava, CONNECT):
        llava(**inputs, labels=labels, use_cache=False).loss.backward()
    projector = llava.model.multi_modal_projector.linear_1.weight.grad
    assert float(projector.abs().sum()) > 0
    assert bool(torch.isfinite(projector).all())


def test_a_language_stage_that_keeps_everything_takes_any_cache(llava):
    plan = saint.Plan(
        connector=saint.methods.Grid(keep=1.0), language=saint.Stage(saint.methods.Grid(keep=1.0), layers=[1])
    )
    inputs = prompts(LLAVA, llava, BATCH)
    static = {"cache_implementation": "static"}
    assert torch.equal(
        generated(llava, plan, inputs, 6, **static)[0], generated(llava, saint.Plan(), inputs, 6, **static)[0]
    )
    text = make(hf.LlamaForCausalLM, hf.LlamaConfig(**text_config()))
    ids = torch.randint(2, 99, (2, 9))
    want = text.generate(ids, max_new_tokens=6, do_sample=False, **static)
    with saint.pruned(text, saint.Plan(language=saint.methods.Grid(keep=1.0))):
        assert torch.equal(text.generate(ids, max_new_tokens=6, do_sample=False, **static), want)


@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl"])
def test_a_compiled_step_is_one_graph_without_a_break(models, name):
    """`generate` compiles the steps of a static cache; a backend that runs the graph as it is."""
    family, model = FAMILIES[name], copy.deepcopy(models(name))
    inputs = prompts(family, model, BATCH[:2])
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def steps(plan):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs.clear()
        config = hf.CompileConfig(backend=backend, mode=None)
        config._compile_all_devices = True
        new = generated(model, plan, inputs, 12, cache_implementation="static", compile_config=config)[0]
        return new, len(graphs), dict(torch._dynamo.utils.counters["graph_break"])

    want = generated(model, CONNECT, inputs, 12)[0]
    _, upstream, _ = steps(saint.Plan())
    new, count, breaks = steps(CONNECT)
    assert torch.equal(new, want)
    assert (count, breaks) == (upstream, {})
    assert upstream == 1
