"""Matching of the similarity graph."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import saint
from saint import graph, testing
from saint.methods import Match
from saint.tokens import Candidates, TokenMap

CPU = torch.device("cpu")


def greedy(similarity, pairs):
    """Edges of a bipartite graph in descending order, each token in one pair at most: the definition, one at a time."""
    edges = sorted(
        ((float(similarity[i, j]), i, j) for i in range(similarity.shape[0]) for j in range(similarity.shape[1])),
        key=lambda edge: -edge[0],
    )
    sources, targets, found = set(), set(), {}
    for value, i, j in edges:
        if i not in sources and j not in targets and len(found) < pairs:
            sources.add(i)
            targets.add(j)
            found[i] = (j, value)
    return found


@given(seed=st.integers(0, 10**6), count=st.integers(2, 17), columns=st.sampled_from([None, 3, 4]))
def test_pairs_are_those_of_greedy_matching(seed, count, columns):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, count, 4, generator=generator)
    index = torch.arange(2 * count)[torch.randperm(2 * count, generator=generator)[:count].sort().values]
    pairs = graph.pair(keys, index[None], columns, rounds=count)

    points = torch.nn.functional.normalize(keys[0], dim=-1)
    place = index.tolist() if columns is None else [walk(n, columns) for n in index.tolist()]
    order = sorted(range(count), key=lambda n: place[n])
    source, target = order[0::2], order[1::2]
    expected = greedy(points[source] @ points[target].T, count)
    crowd = (points @ points.T).sum(1)
    for i, slot in enumerate(source):
        if i not in expected:  # an odd one out: behind all pairs
            assert pairs.similarity[0, i] < -2
            continue
        j, value = expected[i]
        other = target[j]
        assert float(pairs.similarity[0, i]) == pytest.approx(value, abs=1e-5)
        assert {int(pairs.leaves[0, i]), int(pairs.stays[0, i])} == {slot, other}
        if abs(crowd[slot] - crowd[other]) > 1e-4:
            assert int(pairs.leaves[0, i]) == (slot if crowd[slot] > crowd[other] else other)


def walk(place, columns):
    row, column = divmod(place, columns)
    return row * columns + (columns - 1 - column if row % 2 else column)


@pytest.mark.parametrize("columns", [5, 14])
def test_the_snake_makes_a_chessboard(columns):
    places = torch.arange(6 * columns)
    rank = graph.snake(places, columns)
    assert sorted(rank.tolist()) == places.tolist()
    assert rank.tolist() == [walk(n, columns) for n in places.tolist()]
    assert torch.equal(rank % 2, (places // columns + places % columns) % 2)


def shown(keys, lengths, columns=None):
    count = keys.shape[1]
    valid = torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    tokens = TokenMap(
        torch.arange(count).expand(len(lengths), count),
        tuple(lengths),
        (count,) * len(lengths),
        count,
        None if min(lengths) == count else valid,
    )
    return Candidates(keys, keys, tokens, 0, 1, columns=columns)


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(3, 16), min_size=1, max_size=4))
def test_samples_and_padding_do_not_meet(seed, lengths):
    keys = torch.randn(len(lengths), max(lengths), 3, generator=torch.Generator().manual_seed(seed))
    method = Match(threshold=0.5, floor=0.0)
    together = method.select(shown(keys, lengths, 4))
    for b, n in enumerate(lengths):
        alone = method.select(shown(keys[b : b + 1, :n], [n], 4))
        mine = list(range(n)) if together is None else together.slots[b, : together.lengths[b]].tolist()
        assert mine == (list(range(n)) if alone is None else alone.slots[0].tolist())


def test_a_token_leaves_only_beside_a_partner_that_stays():
    keys = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    method = Match(threshold=0.9, floor=0.0)
    chosen = method.select(shown(keys, [60, 60], 10))
    pairs = graph.pair(keys, torch.arange(60).expand(2, 60), 10)
    for b in range(2):
        near = pairs.similarity[b] >= 0.9
        assert 5 < int(near.sum()) == 60 - chosen.lengths[b]
        kept = set(chosen.slots[b, : chosen.lengths[b]].tolist())
        assert not kept & set(pairs.leaves[b][near].tolist())
        assert set(pairs.stays[b][near].tolist()) <= kept


def test_equal_tokens_leave_in_order():
    chosen = Match(budget=0.5).select(shown(torch.ones(1, 12, 4), [12]))
    assert chosen.slots[0].tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Match(threshold=2), "threshold must be a cosine"),
        (lambda: Match(budget="batch"), "budget must be"),
        (lambda: Match(center=1), "center must be True or False"),
        (lambda: Match(floor=-1), "floor must be a number"),
        (lambda: Match(budget=0.4).validate(100, 1), "can drop at most half"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=4).eval()


@pytest.mark.parametrize("budget", ["sample", 0.4])
def test_a_pruned_encoder_equals_its_oracle(vit, budget):
    plan = saint.Plan(vision=saint.Stage(Match(threshold=0.5, budget=budget), layers=[0, 2]))
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, trace = testing.masked_oracle(vit, plan, {"x": x})
        with saint.apply(vit, plan):
            pruned = vit(x)
    assert int(trace[-1].tokens_out.max()) < 190
    assert torch.allclose(pruned, next(iter(expected.values())), atol=1e-5)


def test_the_encoder_says_how_wide_its_grid_is(vit):
    seen = []

    class Look:
        def candidates(self, stage, layer, candidates):
            seen.append(candidates.columns)

    with torch.no_grad(), saint.apply(vit, Match(), observers=[Look()]):
        vit(torch.randn(1, 3, 224, 224))
    assert seen == [14, 14]
