"""The baselines: formulas against slow literal references, and the contracts of the frame over both kinds of model."""

import functools

import pytest
import torch

import saint
from saint import testing
from saint.methods import (
    DART,
    MMR,
    SCOPE,
    ApET,
    CDPruner,
    D2Pruner,
    DivPrune,
    FastV,
    Grid,
    HiPrune,
    OTPrune,
    PriorTR,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    VisionZip,
    VisPruner,
)
from saint.plans import Plan, Stage
from saint.tokens import Candidates, Selection, TokenMap
from support.families import FAMILIES, IMAGE, cache_of, cached, checkpoint, prompts
from support.models import build
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import PADDED

ENCODERS = ["timm/vit-augreg", "timm/dinov3", "timm/dinov2-reg", "transformers/siglip2", "open_clip/vit"]
DROPPING = {
    "random": Random(0.4, seed=3),
    "grid": Grid(0.4),
    "divprune": DivPrune(0.4),
    "otprune": OTPrune(0.4),
    "apet": ApET(0.4),
    "cdpruner": CDPruner(0.4),
    "mmr": MMR(0.4),
    "fastv": FastV(0.4),
    "pyramiddrop": PyramidDrop(0.4),
    "scope": SCOPE(0.4),
    "dart": DART(0.4, pivots=3),
    "sparsevlm": SparseVLM(0.4),
    "priortr": PriorTR(0.4),
    "d2pruner": D2Pruner(0.4),
    "visionzip": VisionZip(0.4),
    "vispruner": VisPruner(0.4),
    "hiprune": HiPrune(0.4, alpha=0.5),
    "prumerge": PruMerge(0.4),
}
MIXED = [[4, "0", 3, "1", 2], [9], [2, "1", 3]]  # several images, none, one


def candidates(features=None, *, lengths=None, keys=None, step=0, steps=1, attention=None, batch=1, count=36):
    """What a method sees at its first drop point; ``lengths`` makes the batch ragged."""
    if features is not None:
        batch, count = features.shape[:2]
    valid = None if lengths is None else torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    tokens = TokenMap.full(batch, count, torch.device("cpu"), valid)
    features = torch.zeros(batch, count, 1) if features is None else features
    return Candidates(features if keys is None else keys, features, tokens, step, steps)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(selection):
    """Slots that stay, one list per sample."""
    return [row[:n].tolist() for row, n in zip(selection.slots, selection.lengths, strict=True)]


# -- contracts, in encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in DROPPING.values() if "vision" in m.stages], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ENCODERS)
def test_contracts_in_encoders(name, method):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=Stage(method, layers=[0, 2]))
    for contract in ("exact undo", "masked oracle", "batch independence", "really on"):
        testing.CONTRACTS[contract](model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        for entry in session.trace:
            assert (entry.tokens_out < entry.tokens_in).all()
        total = session.trace[0].tokens_in
        assert session.trace[-1].tokens_out.tolist() == [int(0.4 * n + 0.5) for n in total.tolist()]


@pytest.mark.parametrize("method", [type(m) for m in DROPPING.values() if "vision" in m.stages])
def test_keeping_everything_in_an_encoder_changes_nothing(method):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    base = testing.run(model, inputs)
    with saint.pruned(model, Stage(method(1.0), layers=[0, 2])):
        same = testing.run(model, inputs)
    assert torch.allclose(same["output"], base["output"], atol=1e-6)


# -- contracts, in vision-language models -------------------------------------------------------------------------------


def stage_plan(method, stage):
    return Plan(**{stage: Stage(method, layers=[1, 2] if stage == "language" else None)})


@pytest.fixture(scope="module")
def llava():
    model = FAMILIES["llava-llama"].build()
    return model, oracle_model(model)


@pytest.mark.parametrize(
    ("method", "stage"),
    [(m, s) for m in DROPPING.values() for s in ("connector", "language") if s in m.stages],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
@pytest.mark.parametrize("samples", [PADDED, MIXED], ids=["padded", "mixed"])
def test_masked_oracle_in_language_models(llava, method, stage, samples):
    model, twin = llava
    family = FAMILIES["llava-llama"]
    inputs = prompts(family, model, samples)
    with saint.pruned(model, stage_plan(method, stage)) as session, torch.no_grad():
        actual, trace = model(**inputs).logits, session.trace
        alone = []
        for i in range(len(samples)):
            # left padding, and one image after another in pixel_values
            images = [sum(isinstance(p, str) for p in sample) for sample in samples]
            part = {name: value[i : i + 1] for name, value in inputs.items() if name != "pixel_values"}
            if images[i]:
                part["pixel_values"] = inputs["pixel_values"][sum(images[:i]) : sum(images[: i + 1])]
            model(**part)
            alone.append(session.trace)
    oracle = Oracle(family, twin, trace, inputs)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert relative_error(actual[here], oracle().logits[here]) < 1e-5
    for at, entry in enumerate(trace):
        for i, kept in enumerate(entry.kept):
            assert not len(kept) or torch.equal(kept, alone[i][at].kept[0])
    before, after = trace[0].tokens_in.tolist(), trace[-1].tokens_out.tolist()
    assert after == [int(method.keep * n + 0.5) for n in before]


@pytest.mark.parametrize(
    ("method", "stage"),
    [(type(m), s) for m in DROPPING.values() for s in ("connector", "language") if s in m.stages],
)
def test_keeping_everything_in_a_language_model_changes_nothing(llava, method, stage):
    model, _ = llava
    inputs = prompts(FAMILIES["llava-llama"], model, PADDED)
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(model, stage_plan(method(1.0), stage)):
            assert torch.equal(model(**inputs).logits, base)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Random(0), r"keep.*int >= 1.*0"),
        (lambda: Random(1.5), r"keep.*1\.5"),
        (lambda: Random(0.5, seed=-1), "seed.*-1"),
        (lambda: Random(0.5, seed=0.5), r"seed.*0\.5"),
        (lambda: Grid("half"), "keep.*half"),
        (lambda: DivPrune(True), "keep.*True"),
        (lambda: FastV(-3), "keep.*-3"),
        (lambda: Plan(vision=FastV()), "FastV is not defined for the vision.*language"),
        (lambda: Plan(language=DivPrune()), "DivPrune is not defined for the language.*connector, vision"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("method", [m for m in DROPPING.values() if "vision" in m.stages], ids=lambda m: m.name)
def test_too_large_a_budget_is_refused_before_anything_is_touched(method):
    model = build("timm/vit-augreg")
    before = testing.snapshot(model)
    with pytest.raises(ValueError, match=r"keep=500 .*36 candidates.*<= 36"):
        saint.apply(model, type(method)(500))
    assert testing.snapshot(model) == before


# -- highest scores -----------------------------------------------------------------------------------------------------


def test_highest_scores_stay_and_ties_go_to_the_earlier():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [9.0, 1.0, 1.0, 50.0, 60.0]])
    ragged = candidates(batch=2, count=5, lengths=[5, 3]).tokens
    assert chosen(Selection.from_scores(score, (2, 2), ragged)) == [[1, 2], [0, 1]]
    assert chosen(Selection.from_scores(score, (3, 1), ragged)) == [[1, 2, 4], [0]]
    whole = candidates(batch=2, count=5).tokens
    assert chosen(Selection.from_scores(score, (1, 2), whole)) == [[1], [3, 4]]


# -- Random -----------------------------------------------------------------------------------------------------------


def test_random_is_a_function_of_seed_drop_point_and_index():
    whole = Random(12).select(candidates())
    assert chosen(whole) == chosen(Random(12).select(candidates()))
    assert chosen(whole) != chosen(Random(12, seed=1).select(candidates()))
    # batch mates with more candidates widen the batch and change nothing
    assert chosen(Random(12).select(candidates(batch=2, count=50, lengths=[36, 50])))[0] == chosen(whole)[0]
    first = Random(12).select(candidates(step=0, steps=2))
    second = Random(first.lengths[0]).select(candidates(step=1, steps=2))
    assert chosen(first) != chosen(second)


def test_random_leaves_the_generators_of_torch_alone():
    state = torch.get_rng_state()
    Random(12).select(candidates())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_keeps_every_place_equally_often():
    rounds, count, keep = 1500, 36, 12
    hits = torch.zeros(count)
    together = 0
    for seed in range(rounds):
        row = Random(keep, seed=seed).select(candidates(count=count)).slots[0]
        hits[row] += 1
        together += bool((row == 4).any() & (row == 5).any())
    share = keep / count
    spread = (share * (1 - share) / rounds) ** 0.5
    assert (hits / rounds - share).abs().max() < 4.5 * spread
    pairs = share * (keep - 1) / (count - 1)  # neighbours are no more often together than others
    assert abs(together / rounds - pairs) < 4.5 * (pairs * (1 - pairs) / rounds) ** 0.5


# -- Grid -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 17, 35])
def test_grid_is_the_formula(keep):
    expected = [(2 * i + 1) * 36 // (2 * keep) for i in range(keep)]
    assert len(set(expected)) == keep
    assert chosen(Grid(keep).select(candidates())) == [expected]


def test_grid_of_ragged_samples():
    ragged = Grid(0.25).select(candidates(batch=3, count=20, lengths=[8, 20, 3]))
    assert chosen(ragged) == [[2, 6], [2, 6, 10, 14, 18], [1]]


# -- DivPrune ---------------------------------------------------------------------------------------------------------


def literal_divprune(features, keep):
    """The recipe, one pair at a time, in float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    count = len(unit)
    distance = [[1 - float(unit[i] @ unit[j]) for j in range(count)] for i in range(count)]
    nearest = [min(distance[i][j] for j in range(count) if j != i) for i in range(count)]
    chosen = [max(range(count), key=lambda i: (nearest[i], -i))]
    while len(chosen) < keep:
        left = [j for j in range(count) if j not in chosen]
        chosen.append(max(left, key=lambda j: (min(distance[j][s] for s in chosen), -j)))
    return sorted(chosen)


@pytest.mark.parametrize("keep", [1, 2, 7, 22])
def test_divprune_is_the_recipe(keep):
    features = noise(3, 23, 8)
    actual = chosen(DivPrune(keep).select(candidates(features)))
    assert actual == [literal_divprune(sample, keep) for sample in features]


def test_divprune_of_ragged_samples():
    features, lengths = noise(3, 40, 8), [40, 1, 25]
    actual = chosen(DivPrune(0.3).select(candidates(features, lengths=lengths)))
    assert actual == [
        literal_divprune(sample[:n], max(1, int(0.3 * n + 0.5))) if n > 1 else [0]
        for sample, n in zip(features, lengths, strict=True)
    ]


def test_divprune_prefers_the_earlier_of_equals():
    corners = torch.eye(4).repeat_interleave(3, 0)[None]  # four directions, three tokens each
    assert chosen(DivPrune(4).select(candidates(corners))) == [[0, 3, 6, 9]]


def test_divprune_decides_in_float32():
    features = noise(1, 60, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chosen(DivPrune(20).select(candidates(features)))
    assert actual == [literal_divprune(features[0], 20)]


def test_nan_features_are_refused_in_front_of_the_language_model(llava):
    model, _ = llava
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7]])
    inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
    with saint.pruned(model, Plan(connector=DivPrune())), pytest.raises(ValueError, match="image features are NaN"):
        model(**inputs)


# -- FastV ------------------------------------------------------------------------------------------------------------


class Spy(FastV):
    """FastV that shows what it was shown."""

    seen: list = []  # noqa: RUF012

    def select(self, candidates):
        self.seen.append(candidates)
        return super().select(candidates)


def rows(model, plan, inputs):
    """The attention rows at every drop point of one forward, and its trace."""
    Spy.seen.clear()
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**inputs)
        return list(Spy.seen), session.trace


def eager_rows(attentions, inputs, kept):
    """Head-mean attention of the last real token over the visual tokens in ``kept``, from full matrices."""
    out = []
    for sample, index in enumerate(kept):
        last = int(inputs["attention_mask"][sample].nonzero().max())
        places = (inputs["input_ids"][sample] == IMAGE).nonzero().flatten()
        out.append(attentions[sample].float().mean(0)[last, places[index]])
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_row_is_that_of_eager_attention(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, PADDED)
    seen, trace = rows(model, Plan(language=Stage(Spy(0.5), layers=[0, 1, 2, 3])), inputs)
    oracle = Oracle(family, oracle_model(model), trace, inputs)
    attentions = oracle(output_attentions=True).attentions
    before = [torch.arange(n) for n in trace[0].tokens_in]
    for entry, shown in zip(trace, seen, strict=True):
        for sample, expected in enumerate(eager_rows(attentions[entry.layer], inputs, before)):
            actual = shown.attention[sample, : len(expected)]
            assert (actual - expected).abs().max() < 1e-5
            top = expected.sort(descending=True, stable=True).indices[: len(entry.kept[sample])]
            assert torch.equal(before[sample][top.sort().values], entry.kept[sample])
        before = entry.kept


def test_the_last_token_is_not_the_padding_on_the_right(llava):
    model, twin = llava
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7], [3, "1", 2]])
    shift = int((inputs["attention_mask"][1] == 0).sum())
    assert shift
    for value in (inputs["input_ids"], inputs["attention_mask"]):
        value[1] = value[1].roll(-shift)
    seen, _ = rows(model, Plan(language=Spy(0.5)), inputs)
    with torch.no_grad():
        attentions = twin(**inputs, output_attentions=True, use_cache=False).attentions[1]
    for sample, expected in enumerate(eager_rows(attentions, inputs, [torch.arange(36)] * 2)):
        assert (seen[0].attention[sample] - expected).abs().max() < 1e-5


def test_the_row_over_an_earlier_turn(llava):
    """A second prompt with an image, on the cache of the first: the row is cut to the new tokens."""
    model, twin = llava
    family = FAMILIES["llava-llama"]
    first, second = prompts(family, model, [[4, 5]]), prompts(family, model, [[3, "0", 6]], seed=1)
    Spy.seen.clear()
    with saint.pruned(model, Plan(language=Spy(0.5))), torch.no_grad():
        cache = cache_of(model(**first))
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        model(**{**second, "attention_mask": mask}, **cached(model, cache))
    both = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "attention_mask": mask}
    with torch.no_grad():
        attentions = twin(
            **both, pixel_values=second["pixel_values"], output_attentions=True, use_cache=False
        ).attentions
    (expected,) = eager_rows(attentions[1], both, [torch.arange(36)])
    assert (Spy.seen[0].attention[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_row_in_train_mode_has_no_dropout(checkpointing):
    model = FAMILIES["llava-llama"].build()
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7]])
    (expected, *_), _ = rows(model, Plan(language=Spy(0.5)), inputs)
    model.train()
    text = model.model.language_model
    text.layers[1].self_attn.attention_dropout = 0.5
    if checkpointing:
        checkpoint(model)
    Spy.seen.clear()
    with saint.pruned(model, Plan(language=Spy(0.5))):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all((shown.attention - expected.attention).abs().max() < 1e-6 for shown in Spy.seen)
    assert text.layers[1].self_attn.training
    assert text.layers[1].self_attn.config is text.config
    assert text.layers[0].self_attn.q_proj.weight.grad is not None


def test_greedy_tokens_of_fastv(llava):
    model, twin = llava
    inputs = prompts(FAMILIES["llava-llama"], model, PADDED, seed=1)
    with saint.pruned(model, Plan(language=FastV(0.25))) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        trace = session.trace
    assert [e.layer for e in trace] == [1]
    assert trace[0].tokens_out.tolist() == [9, 9, 9]
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = Oracle(FAMILIES["llava-llama"], twin, trace, inputs).continued(new)
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


def test_fastv_is_undone(llava):
    model, _ = llava
    inputs = prompts(FAMILIES["llava-llama"], model, PADDED)
    testing.check_undo(model, Plan(language=FastV(0.25)), {**inputs, "use_cache": False})


def test_attention_that_shows_no_row_is_refused(monkeypatch):
    model = FAMILIES["llava-llama"].build()
    before = testing.snapshot(model)
    model.model.language_model.layers[1].self_attn.sliding_window = 8
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(saint.UnsupportedModelError, match=r"layer 1 .*sliding window.*sdpa"):
        saint.apply(model, Plan(language=FastV()))
    del model.model.language_model.layers[1].self_attn.sliding_window
    model.model.language_model.config._attn_implementation_internal = "sdpa"
    assert testing.snapshot(model) == before

    attention = type(model.model.language_model.layers[1].self_attn)
    real = attention.forward

    @functools.wraps(real)
    def without_weights(*args, **kwargs):
        return real(*args, **kwargs)[0], None

    monkeypatch.setattr(attention, "forward", without_weights)
    inputs = prompts(FAMILIES["llava-llama"], model, PADDED)
    with (
        saint.pruned(model, Plan(language=FastV())),
        pytest.raises(saint.UnsupportedModelError, match="no attention weights"),
    ):
        model(**inputs)


def test_a_stage_that_does_not_show_what_a_method_needs(monkeypatch):
    monkeypatch.setattr(FastV, "stages", frozenset({"vision", "language"}))
    with pytest.raises(ValueError, match="FastV needs last_query, which the vision stage does not show"):
        Plan(vision=FastV())
