"""Language models without images: tokens of a prompt leave, and everything else is as with visual tokens."""

import copy
import re
from contextlib import ExitStack

import pytest
import torch
import transformers as hf

import saint
from saint import testing
from saint.errors import UnsupportedModelError
from saint.language.locate import find
from saint.language.prompt import candidates, candidates_seen
from saint.testing.contracts import snapshot
from saint.upstream.decoders import TEXT, anatomies
from saint.upstream.tiny import LAYERS
from support.families import cache_of, cached, foreign_cache
from support.oracles import hide, missing
from support.text import MODELS, batch, tiny

SAINT = saint.Stage(saint.Saint(threshold=0.9, keep=0.4), layers=[1, 2])
PLANS = {
    "post": saint.Plan(language=SAINT),
    "mid": saint.Plan(language=saint.Stage(saint.Saint(threshold=0.9, keep=0.5), layers=[0, 3], placement="mid")),
    "attention": saint.Plan(language=saint.Stage(saint.methods.FastV(keep=0.3), layers=[1])),
    "evict": saint.Plan(language=saint.Stage(saint.methods.Random(keep=0.5), layers=[2], evict=True)),
}


@pytest.fixture
def llama():
    return tiny("llama")


def inner(mask):
    """Literally: all real tokens but the first and the last."""
    out = torch.zeros_like(mask, dtype=torch.bool)
    for b in range(len(mask)):
        real = [place for place in range(mask.shape[1]) if mask[b, place]]
        for place in real[1:-1]:
            out[b, place] = True
    return out


def off(got, want):
    return float((got - want).abs().max() / want.abs().max())


def hidden(model, trace, inputs, grown=None):
    """Logits of the full forward, eager attention and no cache, with dropped tokens hidden as keys."""
    twin, places = copy.deepcopy(model), inner(inputs["attention_mask"])
    twin.set_attn_implementation("eager")

    def gone_before(layer):
        gone = torch.zeros_like(places)
        for entry in trace:
            if entry.layer < layer:
                gone |= missing(entry.kept, places)
        return gone if bool(gone.any()) else None

    with ExitStack() as stack, torch.no_grad():
        hide(stack, twin.model.layers, gone_before)
        return twin(**(grown or inputs), use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_masked_oracles(name, mode, side):
    model, plan, inputs = tiny(name), PLANS[mode], batch([19, 9, 2, 24], side)
    with torch.no_grad(), saint.pruned(model, plan) as session:
        got, trace = model(**inputs).logits, session.trace
    assert trace[0].tokens_in.tolist() == [17, 7, 0, 22]
    assert bool((trace[-1].tokens_out[[0, 1, 3]] < trace[0].tokens_in[[0, 1, 3]]).all())
    want, _ = testing.masked_oracle(model, plan, inputs)
    real = inputs["attention_mask"].bool()
    stays = real & ~missing(
        trace[-1].kept, inner(inputs["attention_mask"])
    )  # of tokens that went, only a stand-in shows
    assert off(got[stays], want["logits"][stays]) < 1e-5
    if mode != "mid":  # hooks in front of layers cannot hide from the attention of the same layer only
        assert off(got[stays], hidden(model, trace, inputs)[stays]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["post", "attention"])
def test_greedy_tokens_are_those_of_the_oracle(name, mode):
    model, inputs, steps = tiny(name), batch([19, 9]), 8
    with torch.no_grad(), saint.pruned(model, PLANS[mode]) as session:
        made = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        trace, memory = session.trace, session.kv_memory
    assert trace[0].tokens_in.tolist() == [17, 7]  # of the prompt: steps drop nothing
    if not getattr(model.config, "sliding_window", None):  # shorter windows than prompts hold less already
        assert memory.kept < memory.unpruned
    new = made.sequences[:, 19:]
    grown = {
        "input_ids": made.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
    }
    want = hidden(model, trace, inputs, grown)[:, 18:-1]
    assert off(torch.stack(made.logits, 1), want) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_keeps_everything_changes_nothing(name):
    model, inputs = tiny(name), batch([19, 9, 24])
    real = inputs["attention_mask"].bool()
    keep = saint.Plan(language=saint.Stage(saint.Saint(threshold=1.0, keep=1.0), layers=[0, 2]))
    before = snapshot(model)
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(model, keep):
            assert torch.equal(model(**inputs).logits[real], base[real])
        assert torch.equal(model(**inputs).logits, base)
    assert snapshot(model) == before
    assert saint.status(model) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_does_not_depend_on_its_batch(llama, side):
    lengths = [19, 9, 24]
    together = batch(lengths, side)
    with torch.no_grad(), saint.pruned(llama, PLANS["post"]) as session:
        logits, trace = llama(**together).logits, session.trace
        for b, n in enumerate(lengths):
            real = together["attention_mask"][b].bool()
            alone = llama(input_ids=together["input_ids"][b : b + 1, real]).logits[0]  # and without a mask
            assert off(logits[b, real], alone) < 1e-5
            for entry, single in zip(trace, session.trace, strict=True):
                assert torch.equal(entry.kept[b], single.kept[0])
            assert session.trace[0].tokens_in.tolist() == [n - 2]


def test_the_decoder_alone_and_embeddings(llama):
    inputs = batch([19, 9])
    with torch.no_grad():
        with saint.pruned(llama, PLANS["post"]):
            want = llama.model(**inputs).last_hidden_state
            embeds = llama.model.embed_tokens(inputs["input_ids"])
            given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
            assert torch.equal(llama.model(**given).last_hidden_state, want)
        with saint.pruned(llama.model, PLANS["post"]):
            assert torch.equal(llama.model(**inputs).last_hidden_state, want)


def test_only_the_prompt_that_starts_a_cache_is_pruned(llama):
    inputs, more = batch([19]), torch.randint(2, 99, (1, 12))
    with torch.no_grad(), saint.pruned(llama, PLANS["post"]) as session:
        out = llama(**inputs, use_cache=True)
        trace = session.trace
        turned = llama(input_ids=more, **cached(llama, cache_of(out)), use_cache=True).logits
        assert [entry.kept[0].tolist() for entry in session.trace] == [entry.kept[0].tolist() for entry in trace]
    both = {
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.ones(1, 31, dtype=torch.long),
    }
    assert off(turned, hidden(llama, trace, inputs, both)[:, 19:]) < 1e-4


@pytest.mark.parametrize("length", [1, 2])
def test_prompts_without_candidates_run_unpruned(llama, length):
    inputs = batch([length])
    with torch.no_grad():
        base = llama(**inputs).logits
        with saint.pruned(llama, PLANS["post"]):
            assert torch.equal(llama(**inputs).logits, base)


def test_candidates_are_all_but_the_first_and_last():
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    )
    assert torch.equal(candidates(mask), inner(mask))


@pytest.mark.parametrize("shape", [(1, 1, 9, 12), (1, 1, 12, 12), (2, 1, 9, 9), (1, 9, 9), (1, 12), (2, 9)])
def test_a_mask_of_another_shape_is_refused(llama, shape):
    told = re.escape(str(shape))
    with (
        saint.pruned(llama, PLANS["post"]),
        pytest.raises(ValueError, match=rf"must be \[B, L\] = \(1, 9\) or \[B, 1, L, L\].*{told}"),
    ):
        llama(input_ids=torch.randint(2, 99, (1, 9)), attention_mask=torch.ones(shape))


def square(mask, kind):
    """The causal mask over real tokens, [B, 1, L, L]."""
    seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_square_mask_shows_the_first_and_last_token_too(name, kind, side):
    model, inputs = tiny(name), batch([19, 9, 24], side)
    flat, real = inputs["attention_mask"], inputs["attention_mask"].bool()
    positions = (flat.cumsum(1) - 1).clamp_min(0)
    given = {**inputs, "position_ids": positions}
    squared = {**given, "attention_mask": square(flat, kind)}
    with torch.no_grad():
        base = model(**squared).logits
        with saint.pruned(model, saint.Plan(language=saint.methods.Grid(keep=1.0))):
            assert torch.equal(model(**squared).logits, base)
        with saint.pruned(model, PLANS["post"]) as session:
            want, trace = model(**given).logits, session.trace
            got = model(**squared).logits
        for one, other in zip(session.trace, trace, strict=True):
            assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in other.kept]
    stays = real & ~missing(trace[-1].kept, inner(flat))
    assert off(got[stays], want[stays]) < 1e-5


def test_texts_packed_by_a_square_mask_keep_their_own_first_and_last():
    own = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # the text of each token
    seen = (own[:, None] == own) & torch.ones(10, 10, dtype=torch.bool).tril()
    assert candidates_seen(seen[None, None])[0].nonzero().flatten().tolist() == [1, 2, 5]
    two = torch.stack([seen, torch.zeros_like(seen)])[None]  # what one head sees
    assert candidates_seen(two)[0].nonzero().flatten().tolist() == [1, 2, 5]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_documents_packed_into_a_row_are_prompts_of_their_own(name):
    model = tiny(name)
    ids, lengths = batch([17])["input_ids"], [6, 3, 8]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    plan = saint.Plan(language=saint.Stage(saint.methods.Random(keep=0.5), layers=[1]))
    with saint.pruned(model, plan) as session, torch.no_grad():
        row = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        together = session.trace[0]
        alone = []
        for part in ids.split(lengths, 1):
            alone.append((model(input_ids=part, use_cache=False).logits, session.trace[0]))
    assert together.tokens_in.tolist() == [n - 2 for n in lengths]
    assert [kept.tolist() for kept in together.kept] == [entry.kept[0].tolist() for _, entry in alone]
    assert off(row, torch.cat([logits for logits, _ in alone], 1)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_cannot_lose_entries_is_refused_by_its_name(name):
    model, inputs = tiny(name), batch([19, 9])
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(model, PLANS["post"]):
            for drops_nothing_yet in (inputs, {key: value[:, :1] for key, value in inputs.items()}):
                with pytest.raises(ValueError, match=r"cache of Quantized.*use a DynamicCache or a StaticCache"):
                    model(**drops_nothing_yet, **cached(model, foreign_cache(model.config)))
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize(
    ("plan", "word"),
    [(saint.Saint(), "vision"), (saint.Plan(connector=saint.SaintFullGraph(keep=0.5), language=SAINT), "connector")],
)
def test_other_stages_are_refused(llama, plan, word):
    before = snapshot(llama)
    with pytest.raises(UnsupportedModelError, match=rf"without images and has no {word} stage.*language="):
        saint.apply(llama, plan)
    assert snapshot(llama) == before


def test_what_only_holds_or_derives_from_a_language_model_is_none(llama):
    class Images(hf.LlamaForCausalLM):
        """Merges images into the embeddings, for all that is known."""

    class MyVisionForCausalLM(hf.LlamaForCausalLM):
        """Likewise, under a name like those of heads."""

    class MyVisionForSequenceClassification(hf.LlamaForSequenceClassification):
        """Likewise."""

    class Seeing(hf.LlamaModel):
        """Likewise."""

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.vision = llama.model, torch.nn.Linear(2, 2)

    derived = (Images, MyVisionForCausalLM, MyVisionForSequenceClassification, Seeing, hf.LlamaForTokenClassification)
    for model in (*(cls(llama.config) for cls in derived), Holder()):
        assert find(model) is None
        with pytest.raises(UnsupportedModelError, match="without images, whose prompt tokens"):
            saint.apply(model, PLANS["post"])
    assert find(llama) == ("model", llama.model)
    assert find(llama.model) == ("", llama.model)


def test_every_row_of_the_table_is_tested_and_has_known_layers():
    tested = set()
    for name in MODELS:
        path, decoder = find(tiny(name))
        assert path == "model"
        assert anatomies(decoder.layers[0])
        assert len(decoder.layers) == LAYERS
        tested.add(f"{type(decoder).__module__}.{type(decoder).__qualname__}")
    assert tested == set(TEXT)
