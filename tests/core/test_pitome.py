"""PiToMe: the formula as a literal loop, the merged oracle, samples of a batch, refusals."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import saint
from saint import testing
from saint.methods import PiToMe
from saint.plans import Plan, Stage
from saint.tokens import Candidates, TokenMap
from support.models import build

CPU = torch.device("cpu")
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def shown(keys, lengths, step=0, steps=1):
    """Candidates of samples of ``lengths`` tokens, padded to the width of ``keys``."""
    count = keys.shape[-2]
    valid = None if min(lengths) == count else torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    return Candidates(keys, keys, TokenMap.full(len(lengths), count, CPU, valid), step, steps)


def literal(keys, k, margin):
    """Which token of one sample merges into which, and how clear the decisions were."""
    points = [[float(x) for x in key] for key in keys]
    norms = [math.sqrt(math.fsum(x * x for x in point)) or 1.0 for point in points]
    count = len(points)
    cosine = [
        [
            math.fsum(a * b for a, b in zip(points[i], points[j], strict=True)) / norms[i] / norms[j]
            for j in range(count)
        ]
        for i in range(count)
    ]
    energy = []
    for i in range(count):
        terms = []
        for j in range(count):
            excess = cosine[i][j] - margin
            if j != i:
                terms.append(excess if excess > 0 else math.exp(excess) - 1)
        energy.append(math.fsum(terms))
    order = sorted(range(count), key=lambda i: (-energy[i], i))
    clear = min([energy[a] - energy[b] for a, b in itertools.pairwise(order)], default=1.0)
    a_side, b_side = order[: 2 * k : 2], order[1 : 2 * k : 2]
    into = {}
    for a in a_side:
        best, *others = sorted(b_side, key=lambda b: (-cosine[a][b], order.index(b)))
        clear = min([clear] + [cosine[a][best] - cosine[a][b] for b in others])
        into[a] = best
    return into, clear


def merged(selection, current, sample):
    """Which slot merges into which, of one sample."""
    count = current.lengths[sample]
    if selection is None:
        return {}
    slots = selection.slots[sample, : selection.lengths[sample]].tolist()
    owners = [slots[o] for o in selection.owner[sample, :count].tolist()]
    assert len(slots) == selection.lengths[sample]
    return {slot: owner for slot, owner in enumerate(owners) if slot != owner}


@few
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    k=st.integers(1, 6),
    margin=st.sampled_from([0.0, 0.45, 0.9]),
    place=st.sampled_from([(0, 1), (1, 3), (3, 4)]),
    heads=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_merges_are_those_of_the_formula(lengths, k, margin, place, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(lengths), 2, max(lengths), 4, generator=generator) + 0.4
    keys = keys if heads else keys[:, 0]
    candidates = shown(keys, lengths, *place)
    got = PiToMe(r=k, margin=margin).select(candidates)
    for b, n in enumerate(lengths):
        mean = keys[b].double().mean(0) if heads else keys[b].double()
        want, clear = literal(mean[:n], min(k, n // 2), margin * (1 - place[0] / place[1]))
        assume(clear > 1e-4)
        assert merged(got, candidates.tokens, b) == want


@few
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=16), k=st.integers(1, 8))
def test_ties_are_broken_by_index(labels, k):
    keys = torch.eye(4)[labels][None]
    candidates = shown(keys, [len(labels)])
    want, _ = literal(keys[0], min(k, len(labels) // 2), 0.9)
    assert merged(PiToMe(r=k).select(candidates), candidates.tokens, 0) == want


def test_equal_tokens_merge_in_turns_into_the_first():
    candidates = shown(torch.ones(1, 200, 4), [200])
    assert merged(PiToMe(r=30).select(candidates), candidates.tokens, 0) == {a: 1 for a in range(0, 60, 2)}


def test_a_token_unlike_all_others_is_protected():
    keys = torch.randn(1, 21, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    keys[0, 7] = -keys[0, 7]
    candidates = shown(keys, [21])
    into = merged(PiToMe(r=10).select(candidates), candidates.tokens, 0)
    assert len(into) == 10
    assert 7 not in {*into, *into.values()}


def test_a_sample_of_few_tokens_merges_within_its_own_even_if_they_point_apart():
    angles = torch.deg2rad(torch.tensor([0.0, 110.0, 236.0] * 4))  # energies fall, every cosine is negative
    keys = torch.stack([torch.ones(12, 2), torch.stack([angles.cos(), angles.sin()], -1)])
    candidates = shown(keys, [12, 3])
    got = PiToMe(r=5).select(candidates)
    assert got.lengths == (7, 2)
    assert merged(got, candidates.tokens, 1) == {0: 1}


@few
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    seed=st.integers(0, 10**6),
    same=st.booleans(),
    budget=st.booleans(),
)
def test_samples_and_padding_do_not_meet(lengths, seed, same, budget):
    """Bit by bit the same choice alone and in a padded batch, also where tokens are almost or exactly alike."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(lengths), 3, max(lengths), 8, generator=generator) * 1e-4 + 1
    if same:  # each token is one of three
        keys = keys[:, :, torch.randint(3, (max(lengths),), generator=generator) % max(lengths)]
    method = PiToMe(keep=0.7) if budget else PiToMe(r=9)
    together = shown(keys, lengths)
    got = method.select(together)
    for b, n in enumerate(lengths):
        alone = shown(keys[b : b + 1, :, :n], [n])
        assert merged(got, together.tokens, b) == merged(method.select(alone), alone.tokens, 0)


def test_the_margin_falls_over_the_drop_points():
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 60, 4, generator=generator) + 0.5
    chosen = []
    for step in range(4):
        candidates = shown(keys, [60], step, 4)
        chosen.append(merged(PiToMe(r=15).select(candidates), candidates.tokens, 0))
        same = shown(keys, [60])
        assert merged(PiToMe(r=15, margin=0.9 * (1 - step / 4)).select(same), same.tokens, 0) == chosen[-1]
    assert chosen[0] != chosen[3]


# -- in models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/dinov3", "transformers/clip", "transformers/siglip2"])
def test_contracts(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=PiToMe(r=5))
    assert "merged oracle" in testing.check_oracle(model, plan, inputs)
    for contract in ("exact undo", "batch independence", "really on"):
        testing.CONTRACTS[contract](model, plan, inputs)
    for stage in ({"layers": [0, 2], "placement": "post"}, {"layers": [1], "output": "similar"}):
        testing.check_oracle(model, Plan(vision=Stage(PiToMe(keep=0.6, beta=0.5), **stage)), inputs)


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/siglip2"])
def test_budgets_are_kept_by_every_sample(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    for budget in (0.4, 7):
        with saint.pruned(model, Stage(PiToMe(keep=budget), layers=[0, 1, 2])) as session:
            testing.run(model, inputs)
            trace = session.trace
        total = trace[0].tokens_in.tolist()
        assert trace[-1].tokens_out.tolist() == [int(budget * n + 0.5) if budget < 1 else budget for n in total]
        for kept, into in zip(trace[-1].kept, trace[-1].into, strict=True):
            assert torch.equal(into.unique(), kept)


def test_compiles_without_a_break_and_agrees():
    model = build("timm/vit-augreg")
    images = testing.example_inputs(model)["x"]
    with saint.pruned(model, Stage(PiToMe(keep=0.5), layers=[0, 1])), torch.no_grad():
        eager = model(images)
        breaks = torch._dynamo.explain(model)(images).graph_break_count
        assert torch.allclose(torch.compile(model, backend="eager")(images), eager, atol=1e-5)
    assert breaks == 0


def test_in_half_precision_and_with_gradients():
    model = build("timm/vit-augreg")
    images = testing.example_inputs(model)["x"].requires_grad_()
    with saint.pruned(model, PiToMe(r=5)) as session:
        (grad,) = torch.autograd.grad(model(images).square().sum(), images)
        groups = session.trace[-1].into
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).isfinite().all()
    assert grad.isfinite().all()
    assert (grad.flatten(2).abs().sum(-1) > 0).all()
    assert [len(group.unique()) for group in groups] == [len(group) - 20 for group in groups]


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PiToMe(margin=1.5), r"margin must be a number in \[0, 1\], got 1\.5; the published value is 0\.9"),
        (lambda: PiToMe(margin=-0.1), "margin.*-0.1"),
        (lambda: PiToMe(margin=float("nan")), "margin.*nan"),
        (lambda: PiToMe(r=0), "r must be an integer >= 1.*0"),
        (lambda: PiToMe(r=4, keep=9), "give r .*r=4.*9"),
        (lambda: PiToMe(beta=-1), "beta.*-1"),
        (lambda: Plan(language=PiToMe()), "PiToMe is not defined for the language.*vision"),
        (lambda: PiToMe(keep=9).validate(37, 2), "merge at most half.*at least 10"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings():
    PiToMe(margin=0), PiToMe(margin=1)
    assert (PiToMe().margin, PiToMe().r, PiToMe().size_bias(), PiToMe.name) == (0.9, 8, 1.0, "pitome")
    assert PiToMe().layers("vision", 3) == [0, 1, 2]
    plan = Plan(vision=PiToMe(keep=0.5, margin=0.3, beta=0))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["vision"][0]["method"]["method"] == "pitome"


def test_nothing_merges_where_nothing_must():
    candidates = shown(torch.randn(2, 9, 4), [1, 1])
    assert PiToMe(r=3).select(candidates) is None
    assert PiToMe(keep=1.0).select(candidates) is None
