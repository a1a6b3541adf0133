"""The quantities of `saint analyze`, each against a literal loop on a case made by hand, and what a streamed run may hold."""

import math

import numpy as np
import pytest
import torch

from saint.lab.analysis import attention, bootstrap, geometry, similarity
from saint.lab.analysis.stages import find_stages


def cosine(a, b) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(x) ** 2 for x in b))


def entropy(p) -> float:
    return -sum(float(x) * math.log(float(x)) for x in p if float(x) > 0)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    terms = [math.exp(v - top) for v in values]
    return [t / sum(terms) for t in terms]


# -- similarity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("count", [2, 9, 10])
def test_key_similarity_is_the_mean_of_the_bipartite_matrix(count, center):
    keys = torch.randn(count, 3) + torch.tensor([2.0, 0, 0])
    moved = keys - keys.mean(0) if center else keys
    pairs = [cosine(moved[i], moved[j]) for i in range(0, count, 2) for j in range(1, count, 2)]
    assert similarity.key_similarity(keys, center=center) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_one_candidate_has_no_similarity():
    assert math.isnan(similarity.key_similarity(torch.ones(1, 3)))
    assert math.isnan(similarity.cross_similarity(torch.ones(1, 3), torch.ones(0, 3)))


def test_cross_similarity_is_the_mean_over_all_pairs():
    visual, text = torch.randn(5, 4) + 1, torch.randn(3, 4) - 1
    pairs = [cosine(v, t) for v in visual for t in text]
    assert similarity.cross_similarity(visual, text) == pytest.approx(sum(pairs) / 15, abs=1e-6)


@pytest.mark.parametrize("block", [1, 2**20])
@pytest.mark.parametrize("center", [False, True])
def test_droppable_counts_the_sources_that_would_vote(center, block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    keys = torch.randn(21, 3)
    moved = keys - keys.mean(0) if center else keys
    thresholds, neighbors = [-0.5, 0.6, 0.9], 3
    want = []
    for threshold in thresholds:
        votes = 0
        for i in range(0, 21, 2):
            votes += sum(cosine(moved[i], moved[j]) >= threshold for j in range(1, 21, 2)) >= neighbors
        want.append(votes / 11)
    assert 0 < want[1] < 1
    assert similarity.droppable(keys, thresholds, neighbors, center=center) == pytest.approx(want)


def test_droppable_is_what_the_voting_graph_votes():
    from saint import graph

    keys = torch.randn(1, 30, 4)
    votes = int(graph.vote(keys, 0.4, 5).votes)
    assert votes > 0
    assert similarity.droppable(keys[0], [0.4])[0] == pytest.approx(votes / 15)


# -- attention ----------------------------------------------------------------------------------------------------------


def literal_rows(query, key, scale, allowed, bias) -> list[list[float]]:
    """Head-mean attention by loops. allowed(i, j) and bias(h, i, j)."""
    heads, count, _ = query.shape
    share = heads // len(key)
    out = []
    for i in range(count):
        mean = [0.0] * key.shape[1]
        for h in range(heads):
            logits = [
                scale * float(query[h, i] @ key[h // share, j]) + bias(h, i, j) if allowed(i, j) else -math.inf
                for j in range(key.shape[1])
            ]
            for j, p in enumerate(softmax(logits)):
                mean[j] += p / heads
        out.append(mean)
    return out


@pytest.mark.parametrize("block", [1, 40, 2**19])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "scaled", "grouped"])
def test_summary_of_attention(kind, block):
    query, key = torch.randn(4, 6, 8), torch.randn(2 if kind == "grouped" else 4, 6, 8)
    scale, allowed, bias, given = 1 / math.sqrt(8), lambda i, j: True, lambda h, i, j: 0.0, {}
    if kind == "causal":
        allowed, given = lambda i, j: j <= i, {"causal": True}
    if kind == "bool":
        mask = torch.rand(1, 6, 6) > 0.3
        mask[..., 0] = True
        allowed, given = lambda i, j: bool(mask[0, i, j]), {"mask": mask}
    if kind == "float":
        mask = torch.randn(4, 6, 6)
        bias, given = lambda h, i, j: float(mask[h, i, j]), {"mask": mask}
    if kind == "scaled":
        scale, given = 0.7, {"scale": 0.7}
    want = literal_rows(query, key, scale, allowed, bias)
    senders = torch.tensor([False, True, True, False, True, True])
    onto = torch.tensor([True, False, False, True, False, False])
    got = attention.summarize(query, key, senders, onto, block=block, **given)
    assert got.entropy.tolist() == pytest.approx([entropy(row) for row in want], abs=1e-5)
    assert got.share.tolist() == pytest.approx([row[0] + row[3] for row in want], abs=1e-5)
    assert got.received.tolist() == pytest.approx([sum(want[i][j] for i in (1, 2, 4, 5)) for j in range(6)], abs=1e-5)


def test_a_mask_of_one_row_is_for_all_queries():
    query, key = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([True, True, False, True, False]).view(1, 1, 5)
    everyone = torch.ones(5, dtype=torch.bool)
    got = attention.summarize(query, key, everyone, everyone, mask=mask, block=10)
    assert got.received[2] == got.received[4] == 0
    assert got.share.tolist() == pytest.approx([1.0] * 5)


def test_a_query_that_sees_nothing_has_a_row_of_zeros():
    mask = torch.zeros(1, 1, 3, dtype=torch.bool)
    everyone = torch.ones(3, dtype=torch.bool)
    got = attention.summarize(torch.randn(1, 3, 2), torch.randn(1, 3, 2), everyone, everyone, mask=mask)
    assert got.entropy.tolist() == got.received.tolist() == [0, 0, 0]


def test_received_attention_normalised_by_sum_and_by_maximum():
    u = torch.tensor([0.5, 2.0, 0.0, 1.5])
    assert attention.received_entropy(u) == pytest.approx(entropy([v / 4.0 for v in u]))
    assert attention.received_entropy_by_max(u) == pytest.approx(entropy([v / 2.0 for v in u]))


# -- geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_effective_rank(shape):
    x = torch.randn(shape).double()
    values = torch.linalg.svdvals(x - x.mean(0)).tolist()
    p = [v / sum(values) for v in values]
    assert geometry.effective_rank(x) == pytest.approx(math.exp(entropy(p)), rel=1e-6)


def test_effective_rank_of_known_cases():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])  # centred, four equal directions
    assert geometry.effective_rank(axes) == pytest.approx(4, rel=1e-6)
    line = torch.arange(6.0).unsqueeze(1) * torch.randn(1, 7)
    assert geometry.effective_rank(line) == pytest.approx(1, rel=1e-4)
    assert math.isnan(geometry.effective_rank(torch.ones(5, 3)))


def test_residual_update_and_outliers():
    x, y = torch.randn(7, 3), torch.randn(7, 3)
    want = [
        math.sqrt(sum((float(b) - float(a)) ** 2 for a, b in zip(r, s, strict=True)))
        / math.sqrt(sum(float(a) ** 2 for a in r))
        for r, s in zip(x, y, strict=True)
    ]
    assert geometry.residual_update(x, y) == pytest.approx(sum(want) / 7, rel=1e-5)
    norms = torch.tensor([1.0, 1.1, 0.9, 1.0, 3.1, 2.9, 1.0, 30.0])
    assert geometry.outliers(norms.unsqueeze(1)) == 2 / 8  # above 3 medians: 3.1 and 30


def literal_hsic(k, el) -> float:
    """Song et al. by loops over kernels with zero diagonals."""
    m = len(k)
    trace = sum(float(k[i, j]) * float(el[j, i]) for i in range(m) for j in range(m))
    sums = [sum(float(a[i, j]) for i in range(m) for j in range(m)) for a in (k, el)]
    middle = sum(float(k[i, j]) * float(el[j, n]) for i in range(m) for j in range(m) for n in range(m))
    return (trace + sums[0] * sums[1] / ((m - 1) * (m - 2)) - 2 / (m - 2) * middle) / (m * (m - 3))


def test_hsic_and_cka():
    points = [torch.randn(7, 3), torch.randn(7, 5), torch.randn(7, 2)]
    grams = torch.stack([geometry.gram(x) for x in points])
    x = points[0] - points[0].mean(0)
    x = x / x.square().sum().sqrt()
    for i in range(7):
        for j in range(7):
            assert float(grams[0, i, j]) == pytest.approx(0 if i == j else float(x[i] @ x[j]), abs=1e-6)
    got = geometry.hsic(grams)
    for a in range(3):
        for b in range(3):
            assert float(got[a, b]) == pytest.approx(literal_hsic(grams[a], grams[b]), abs=1e-9)
    alike = geometry.cka(got)
    want = float(got[0, 1]) / math.sqrt(float(got[0, 0]) * float(got[1, 1]))
    assert float(alike[0, 1]) == pytest.approx(want)
    assert alike.diagonal().tolist() == pytest.approx([1, 1, 1])


def test_cka_does_not_see_rotation_scale_and_shift():
    x = torch.randn(40, 6)
    turned = x @ torch.linalg.qr(torch.randn(6, 6)).Q * 17 + 3
    other = torch.randn(40, 6)
    alike = geometry.cka(geometry.hsic(torch.stack([geometry.gram(p) for p in (x, turned, other)])))
    assert float(alike[0, 1]) == pytest.approx(1, abs=1e-4)
    assert abs(float(alike[0, 2])) < 0.3


def test_unrelated_layers_have_a_cka_of_zero_in_the_mean():
    """The biased estimator would say 0.6 here: 12 tokens, 30 channels."""
    total = sum(geometry.hsic(torch.stack([geometry.gram(torch.randn(12, 30)) for _ in range(2)])) for _ in range(200))
    assert abs(float(geometry.cka(total / 200)[0, 1])) < 0.1


def test_tokens_are_spread():
    assert geometry.spread(5, 8) == [0, 1, 2, 3, 4]
    assert geometry.spread(10, 4) == [0, 2, 5, 7]


# -- intervals ----------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        values = rng.normal(3.0, 1.0, (40, 1))
        found = bootstrap.interval(values, bootstrap.weights(40, 400, seed))
        hits += bool(found.low[0] <= 3.0 <= found.high[0])
    assert 0.88 <= hits / 200 <= 0.98


def test_resamples_are_means_of_drawn_images():
    weight = bootstrap.weights(4, 50, 1)
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, np.nan], [4.0, 40.0]])
    got = bootstrap.resampled(values, weight)
    for row, drawn in zip(got, weight, strict=True):
        times = np.rint(drawn * 4).astype(int)
        assert times.sum() == 4
        picked = [value for value, n in zip(values, times, strict=True) for _ in range(n)]
        assert row[0] == pytest.approx(np.mean([p[0] for p in picked]))
        second = [p[1] for p in picked if not math.isnan(p[1])]
        assert row[1] == pytest.approx(np.mean(second)) if second else math.isnan(row[1])


def test_one_image_has_no_interval():
    found = bootstrap.interval(np.array([[1.0, 2.0]]), bootstrap.weights(1, 10))
    assert found.mean.tolist() == [1, 2]
    assert np.isnan(found.low).all()


def test_an_outlier_is_above_the_multiple_of_the_median():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [4.0, 0.0], [0.0, 4.5]])
    assert geometry.outliers(rows, factor=4.0) == pytest.approx(1 / 5)
    assert geometry.outliers(rows, factor=3.9) == pytest.approx(2 / 5)


def test_quantities_that_do_not_change_show_no_stages():
    flat = {"key_similarity": np.ones((30, 12)), "residual_update": np.full((30, 12), np.nan)}
    found = find_stages(flat, np.ones(12))
    assert (found.verdict, found.shown) == ("not shown", False)
    assert found.reasons == ["no quantity changes over the layers"]
