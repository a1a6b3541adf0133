"""Attention of prompt tokens that methods ask for, against whole matrices of eager attention."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import StaticCache

import saint
from saint.language.decoder import DecoderForward
from saint.methods import DivPrune, FastV, PriorTR, Random, SparseVLM
from saint.plans import Plan, Stage
from support.families import FAMILIES, IMAGE, cache_of, cached, prompts
from support.oracles import Oracle, oracle_model
from support.plans import GREEDY
from support.text import batch, tiny

# text between images, no text behind them, one token of it, padding; the shortest first
ASKED = [[3, "0"], [4, "0", 3, "1", 7], [6, "0", 1], [2, "1", 12]]
NEEDS = frozenset({"last_query", "question", "first_query", "raters"})


@dataclasses.dataclass(frozen=True)
class Spy(Random):
    """Drops at random, and keeps what it was shown."""

    seen: list = dataclasses.field(default_factory=list, compare=False)
    needs = NEEDS
    stages = frozenset({"language"})

    def select(self, candidates):
        self.seen.append(candidates)
        return super().select(candidates)


def literal_raters(embeddings, visual, text):
    """Tokens of the text that rate, one number at a time."""
    rows = embeddings.double().tolist()
    mean = dict.fromkeys(text, 0.0)
    for v in visual:
        logits = [math.fsum(a * b for a, b in zip(rows[v], rows[t], strict=True)) for t in text]
        most = max(logits)
        total = math.fsum(math.exp(x - most) for x in logits)
        for t, x in zip(text, logits, strict=True):
            mean[t] += math.exp(x - most) / total / len(visual)
    level = math.fsum(mean.values()) / len(text)
    return [t for t in text if mean[t] >= level - 1e-12]


def asked(ids, mask, embeddings, enter, left):
    """The tokens of one prompt that each name stands for.

    ids, mask [L], embeddings [L, C]; ``enter`` visual tokens enter, and the places ``left`` are left of them."""
    visual = (ids == IMAGE).nonzero().flatten()[enter].tolist()
    text = [p for p in mask.nonzero().flatten().tolist() if p > visual[-1] and ids[p] != IMAGE]
    last = text[-1:] or left[-1:].tolist()
    text = text or last
    return {
        "last_query": last,
        "question": text,
        "first_query": text[:1],
        "raters": literal_raters(embeddings, visual, text),
    }


def embeddings_of(twin, inputs):
    """What enters the language model of an unpruned model, [B, L, C]."""
    seen = []
    text = twin.get_decoder() if hasattr(twin, "get_decoder") else twin.model.language_model
    hook = text.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["inputs_embeds"].detach()), with_kwargs=True)
    with torch.no_grad():
        twin(**inputs)
    hook.remove()
    return seen[0]


def check(seen, attentions, inputs, embeddings, enter, layers):
    """Rows of each drop point against the matrices [B, H, L, L] of its layer."""
    assert len(seen) == len(layers)
    for given, layer in zip(seen, layers, strict=True):
        assert given.rows.keys() == NEEDS - {"last_query"}
        for sample, n in enumerate(given.tokens.lengths):
            mask, ids = inputs["attention_mask"][sample], inputs["input_ids"][sample]
            first = torch.tensor(enter[sample])
            places = (ids == IMAGE).nonzero().flatten()[given.tokens.index[sample, :n]]
            matrix = attentions[layer][sample].float().mean(0)
            for name, who in asked(ids, mask, embeddings[sample], first, places).items():
                row = given.attention if name == "last_query" else given.rows[name]
                want = matrix[who][:, places].mean(0)
                assert row.dtype == torch.float32
                assert (row[sample, :n] - want).abs().max() < 1e-5, (layer, sample, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_of_eager_attention(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, ASKED)
    spy = Spy(0.4, seed=1)
    with saint.pruned(model, Plan(language=Stage(spy, layers=[0, 2, 3]))) as session, torch.no_grad():
        model(**inputs)
        trace = session.trace
    twin = oracle_model(model)
    attentions = Oracle(family, twin, trace, inputs)(output_attentions=True).attentions
    every = [list(range(n)) for n in trace[0].tokens_in.tolist()]
    check(spy.seen, attentions, inputs, embeddings_of(twin, inputs), every, [0, 2, 3])


@pytest.fixture(scope="module")
def llava():
    model = FAMILIES["llava-llama"].build()
    return model, oracle_model(model)


def test_behind_a_connector_stage_the_text_is_behind_what_entered(llava):
    model, twin = llava
    family = FAMILIES["llava-llama"]
    inputs = prompts(family, model, ASKED)
    spy = Spy(0.5, seed=2)
    with saint.pruned(model, Plan(connector=DivPrune(0.3), language=Stage(spy, layers=[1, 2]))) as session:
        with torch.no_grad():
            model(**inputs)
        trace = session.trace
    attentions = Oracle(family, twin, trace, inputs)(output_attentions=True).attentions
    entered = [kept.tolist() for kept in trace[0].kept]
    check(spy.seen, attentions, inputs, embeddings_of(twin, inputs), entered, [1, 2])


def test_padding_on_the_right_asks_nothing(llava):
    model, twin = llava
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7], [3, "1", 2]])
    shift = int((inputs["attention_mask"][1] == 0).sum())
    assert shift
    for value in (inputs["input_ids"], inputs["attention_mask"]):
        value[1] = value[1].roll(-shift)
    spy = Spy(0.5)
    with saint.pruned(model, Plan(language=Stage(spy, layers=[1]))), torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        attentions = twin(**inputs, output_attentions=True, use_cache=False).attentions
    check(spy.seen, attentions, inputs, embeddings_of(twin, inputs), [list(range(36))] * 2, [1])


def test_causality_hides_later_tokens_where_no_mask_says_so(llava):
    model, twin = llava
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7]])
    assert bool(inputs["attention_mask"].all())
    spy = Spy(0.5)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with saint.pruned(model, Plan(language=Stage(spy, layers=[1]))), torch.no_grad():
        model(**bare)
        attentions = twin(**inputs, output_attentions=True, use_cache=False).attentions
    check(spy.seen, attentions, inputs, embeddings_of(twin, inputs), [list(range(36))], [1])


def test_a_question_of_a_second_turn(llava):
    """On the cache of a first turn the rows are cut to the new tokens."""
    model, twin = llava
    family = FAMILIES["llava-llama"]
    first, second = prompts(family, model, [[4, 5]]), prompts(family, model, [[3, "0", 6]], seed=1)
    spy = Spy(0.5)
    with saint.pruned(model, Plan(language=Stage(spy, layers=[1]))), torch.no_grad():
        cache = cache_of(model(**first))
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        model(**{**second, "attention_mask": mask}, **cached(model, cache))
    both = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "attention_mask": mask}
    both["pixel_values"] = second["pixel_values"]
    with torch.no_grad():
        attentions = twin(**both, output_attentions=True, use_cache=False).attentions
    check(spy.seen, attentions, both, embeddings_of(twin, both), [list(range(36))], [1])


@pytest.mark.parametrize("places", [60, 200])
@pytest.mark.parametrize("name", ["llava-llama", "llava-mistral", "gemma3", "qwen2.5-vl"])
def test_rows_over_a_static_cache_are_those_over_a_dynamic_one(name, places):
    """A static layer shows more entries than are filled, or fewer where a window moved on."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 12]])
    seen = []
    for cache in ({}, cached(model, StaticCache(config=model.config.get_text_config(), max_cache_len=places))):
        spy = Spy(0.5, seed=3)
        with saint.pruned(model, Plan(language=Stage(spy, layers=[0, 2]))), torch.no_grad():
            model(**inputs, **cache)
        seen.append(spy.seen)
    for dynamic, static in zip(*seen, strict=True):
        rows = {"last_query": dynamic.attention, **dynamic.rows}
        for who, row in {"last_query": static.attention, **static.rows}.items():
            assert (row - rows[who]).abs().max() < 1e-6, who


@pytest.mark.parametrize("method", [FastV(0.3), PriorTR(0.3), SparseVLM(0.3)], ids=lambda method: method.name)
def test_an_answer_over_a_static_cache_is_that_over_a_dynamic_one(llava, method):
    model, _ = llava
    inputs = prompts(FAMILIES["llava-llama"], model, ASKED[1:], seed=2)
    plan = Plan(language=Stage(method, layers=[0, 2]))
    with saint.pruned(model, plan) as session:
        want, kept = model.generate(**inputs, max_new_tokens=8, **GREEDY), session.trace
        got = model.generate(**inputs, max_new_tokens=8, cache_implementation="static", **GREEDY)
        for one, other in zip(session.trace, kept, strict=True):
            assert [row.tolist() for row in one.kept] == [row.tolist() for row in other.kept]
    assert torch.equal(got, want)


@pytest.mark.parametrize("needs", [NEEDS, {"first_query"}, {"question"}, {"raters"}], ids=len)
def test_in_a_language_model_without_images_the_last_token_is_all_text(needs, monkeypatch):
    """Its candidates are all tokens but the first and the last."""
    monkeypatch.setattr(Spy, "needs", frozenset(needs))
    model, inputs = tiny("llama"), batch([19, 9, 24])
    spy = Spy(0.5)
    with saint.pruned(model, Plan(language=Stage(spy, layers=[1]))), torch.no_grad():
        model(**inputs)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        matrix = twin(**inputs, output_attentions=True, use_cache=False).attentions[1].mean(1)
    for sample, real in enumerate(inputs["attention_mask"].bool()):
        own = matrix[sample, real][:, real]
        for row in spy.seen[0].rows.values():
            assert (row[sample, : len(own) - 2] - own[-1, 1:-1]).abs().max() < 1e-6


def test_what_is_left_of_a_forward_holds_no_embeddings():
    assert DecoderForward(embeddings=torch.zeros(1, 2, 3)).told().embeddings is None
