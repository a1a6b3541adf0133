"""The maths, against hand-checked vectors and a slow, literal reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saint import graph
from saint.lab.bench.cost import cost

A = [0, 1, 2, 4, 40, 6, 80, 8, 120, 41]
B = [0, 3, 5, 60, 61, 62, 63, 64, 66, 68]


def circle(degrees: list[float]) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angle.cos(), angle.sin()], -1)


def dropped(vote: graph.Vote, count: int, sample: int = 0) -> list[int]:
    return graph.drop_order(vote)[sample, :count].tolist()


@pytest.mark.parametrize(
    ("angles", "threshold", "neighbors", "votes", "degree", "score", "gone"),
    [
        (A, 0.95, 3, 2, [4, 4, 1, 0, 0], [6.3079, 6.4534, 1.6462, 0.3589, -0.3027], [2, 0]),
        (B, 0.95, 3, 3, [1, 1, 4, 4, 4], [1.6263, 1.6387, 6.4461, 6.5051, 6.4460], [6, 4, 8]),
        (A, 0.999, 2, 1, [1, 2, 1, 0, 0], [1.0085, 2.0124, 1.0085, 0.3589, -0.3027], [2]),
    ],
)
def test_published_vectors(angles, threshold, neighbors, votes, degree, score, gone):
    vote = graph.vote(circle(angles)[None], threshold, neighbors)
    assert vote.sources.tolist() == [0, 2, 4, 6, 8]
    assert vote.votes.tolist() == [votes]
    assert vote.degree[0].tolist() == degree
    assert vote.score[0].tolist() == pytest.approx(score, abs=1e-4)
    assert dropped(vote, votes) == gone


def test_batch_of_both_vectors():
    vote = graph.vote(torch.stack([circle(A), circle(B)]), 0.95, 3)
    assert vote.votes.tolist() == [2, 3]
    mean = int(vote.votes.float().mean().floor())
    assert (mean, dropped(vote, mean, 0), dropped(vote, mean, 1)) == (2, [2, 0], [6, 4])


def literal(keys: torch.Tensor, threshold: float, gamma: float) -> tuple[list[int], list[float]]:
    """Formulas of the paper with loops, float64. keys [H, N, D]."""
    mean = keys.double().mean(0)
    unit = [row / row.norm() for row in mean]
    degrees, scores = [], []
    for source in unit[0::2]:
        similarity = [float(source @ target) for target in unit[1::2]]
        edges = [s for s in similarity if s >= threshold]
        degrees.append(len(edges))
        if edges:
            scores.append(len(edges) * math.exp(gamma * (sum(edges) / len(edges) - threshold)))
        else:
            scores.append(sum(similarity) / max(1, len(similarity)))
    return degrees, scores


@pytest.mark.parametrize("count", [2, 3, 7, 196, 257, 5 * 123])
def test_parity_with_the_literal_formula(count):
    keys = torch.randn(2, 3, count, 16) + torch.randn(2, 3, 1, 16)
    vote = graph.vote(keys, 0.35, gamma=7.0)
    for sample in range(2):
        degrees, scores = literal(keys[sample], 0.35, 7.0)
        assert vote.degree[sample].tolist() == degrees
        assert vote.score[sample].tolist() == pytest.approx(scores, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_comes_in(dtype):
    keys = (torch.randn(1, 2, 40, 8) * 3).to(dtype)
    vote = graph.vote(keys, -0.9, gamma=10.0)  # exp(19) overflows fp16
    assert vote.score.dtype == torch.float32
    assert torch.isfinite(vote.score).all()
    assert torch.equal(vote.score, graph.vote(keys.float(), -0.9, gamma=10.0).score)


def test_autocast_and_grad_do_not_reach_the_decision():
    keys = torch.randn(1, 2, 40, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vote = graph.vote(keys, 0.3)
    assert torch.equal(vote.score, graph.vote(keys.detach(), 0.3).score)
    assert not vote.score.requires_grad


@pytest.mark.parametrize("threshold", [0.75, 0.7, 0.5, 0.1, -0.3, 1.0])
def test_equal_to_the_threshold_is_an_edge(threshold):
    exact = float(torch.tensor(threshold))  # what float32 makes of it
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(-2.0)))
    for cosine in (exact, below):
        source, target = torch.tensor([1.0, 0.0]), torch.tensor([cosine, (1 - cosine * cosine) ** 0.5])
        keys = torch.stack([source, target])[None]
        similarity = float((source * graph.metric(keys)[0, 1]).sum())
        assert graph.vote(keys, threshold, 1).degree.item() == int(similarity >= exact)


def test_zero_keys_are_not_nan_and_have_no_neighbours():
    keys = torch.randn(1, 10, 4)
    keys[:, [2, 5]] = 0
    vote = graph.vote(keys, 0.01)
    assert torch.isfinite(vote.score).all()
    assert vote.degree[0, 1] == 0


@pytest.mark.parametrize("valid", [None, torch.tensor([[True]])])
def test_one_token_has_no_target_and_scores_nothing(valid):
    vote = graph.vote(torch.ones(1, 1, 4), 0.5, valid=valid)
    assert (vote.score.tolist(), vote.degree.tolist(), vote.votes.tolist()) == ([[0.0]], [[0]], [0])


def test_ties_go_to_the_lower_index():
    vote = graph.vote(torch.ones(1, 12, 4), 0.5, 1)
    assert graph.drop_order(vote)[0].tolist() == [0, 2, 4, 6, 8, 10]


def test_a_node_with_an_edge_outranks_one_without():
    vote = graph.vote(torch.randn(4, 2, 60, 6), 0.6)
    connected = vote.degree > 0
    assert connected.any()
    assert (~connected).any()
    assert vote.score[connected].min() >= 1 >= vote.score[~connected].max()


def test_permuting_samples_permutes_votes():
    keys = torch.randn(3, 2, 30, 8)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(graph.vote(keys, 0.4).score[order], graph.vote(keys[order], 0.4).score)


@pytest.mark.parametrize("center", [False, True])
def test_padding_changes_nothing(center):
    keys = torch.randn(1, 2, 21, 8) + 1
    padded = torch.cat([keys, torch.randn(1, 2, 9, 8)], 2)
    valid = torch.arange(30)[None] < 21
    alone, together = graph.vote(keys, 0.5, 2, center=center), graph.vote(padded, 0.5, 2, center=center, valid=valid)
    assert torch.equal(together.votes, alone.votes)
    assert torch.equal(together.degree[:, :11], alone.degree)
    assert torch.allclose(together.score[:, :11], alone.score, atol=1e-5)
    assert torch.isneginf(together.score[:, 11:]).all()
    assert torch.equal(graph.drop_order(together)[:, :11], graph.drop_order(alone))


# -- memory: blocks of rows of the matrix of cosines ---------------------------------------------------------------------


def memory(count: int) -> float:
    """MiB that the vote over so many tokens needs at once, besides its keys."""
    keys = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(0)) + 0.4
    return cost(lambda: graph.vote(keys, 0.3), torch.device("cpu")).memory


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    few, many = memory(4096), memory(16384)
    assert few < 10
    assert many <= 4 * few


@pytest.mark.parametrize("counts", [(2049,), (2500, 2400), (4096,), (5001, 5001)])
@pytest.mark.parametrize("center", [False, True])
def test_blocks_give_what_the_whole_matrix_gives(counts, center, monkeypatch):
    longest = max(counts)
    keys = torch.randn(len(counts), longest, 32, generator=torch.Generator().manual_seed(0)) + 0.4
    valid = None if min(counts) == longest else torch.arange(longest) < torch.tensor(counts).unsqueeze(1)
    made = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: made.append(real(*given)) or made[-1])
    blocks = graph.vote(keys, 0.5, 3, center=center, valid=valid)
    assert len(made) > 1
    made.clear()
    monkeypatch.setattr(graph, "_HELD", 2**40)
    whole = graph.vote(keys, 0.5, 3, center=center, valid=valid)
    assert len(made) == 1
    assert all(torch.equal(one, other) for one, other in zip(blocks, whole, strict=True))


def test_up_to_2048_tokens_are_one_product(monkeypatch):
    made = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: made.append(1) or real(*given))
    graph.vote(torch.randn(2, 2048, 8), 0.5)
    assert len(made) == 1


def test_centering_removes_a_common_component():
    keys = torch.randn(1, 40, 8)
    shifted = keys + 50
    assert graph.vote(shifted, 0.9).degree.float().mean() > 15  # everything looks alike
    assert torch.allclose(
        graph.vote(shifted, 0.5, center=True).score, graph.vote(keys, 0.5, center=True).score, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("threshold", 1.01), ("threshold", -1.0), ("threshold", "a"), ("neighbors", 0), ("neighbors", 2.5)],
)
def test_bad_arguments_name_themselves(keyword, value):
    settings = {"threshold": 0.5, "neighbors": 5, keyword: value}
    with pytest.raises(ValueError, match=f"{keyword}.*{value}"):
        graph.vote(torch.randn(1, 4, 2), **settings)
    with pytest.raises(ValueError, match="shape"):
        graph.vote(torch.randn(4, 2), 0.5)


def literal_elimination(points: torch.Tensor, keep: int, step: int) -> set[int]:
    unit = torch.nn.functional.normalize(points.double(), dim=-1)
    alive = list(range(len(points)))
    while len(alive) > keep:
        score = {i: sum(float(unit[i] @ unit[j]) for j in alive) for i in alive}
        out = min(len(alive) - keep, max(1, len(alive) // step))
        for i in sorted(alive, key=lambda i: (-score[i], i))[:out]:
            alive.remove(i)
    return set(alive)


def test_elimination_equals_the_literal_loop():
    keys = torch.randn(2, 48, 6)
    alive = graph.eliminate(keys, 20, step=8)
    for sample in range(2):
        assert set(alive[sample].nonzero().flatten().tolist()) == literal_elimination(keys[sample], 20, 8)


def test_elimination_schedule_of_the_paper(monkeypatch):
    sizes, real = [], torch.Tensor.scatter
    monkeypatch.setattr(
        torch.Tensor, "scatter", lambda self, *a: (out := real(self, *a), sizes.append(int(out.sum())))[0]
    )
    graph.eliminate(torch.randn(1, 576, 8), 375, step=16)
    assert sizes == [540, 507, 476, 447, 420, 394, 375]


def test_elimination_with_padding_and_different_goals():
    keys = torch.randn(2, 40, 6)
    valid = torch.arange(40)[None] < torch.tensor([[40], [25]])
    alive = graph.eliminate(keys, [20, 11], step=4, valid=valid)
    assert alive.sum(1).tolist() == [20, 11]
    assert not (alive & ~valid).any()
    assert torch.equal(alive[1, :25], graph.eliminate(keys[1:, :25], 11, step=4)[0])
    assert torch.equal(alive[0], graph.eliminate(keys[:1], 20, step=4)[0])


def test_elimination_keeps_everything_when_asked_to():
    assert graph.eliminate(torch.randn(1, 9, 2), 9).all()
    with pytest.raises(ValueError, match="step.*0"):
        graph.eliminate(torch.randn(1, 9, 2), 3, step=0)


# -- what a sample loses does not depend on its batch mates ------------------------------------------------------------


@st.composite
def ragged(draw):
    """Samples of one to 40 tokens with ties of every kind, how many each keeps, and settings."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.integers(1, 70))
    samples = []
    for _ in range(draw(st.integers(1, 5))):
        keys = torch.randn(draw(st.integers(1, 40)), width, generator=generator)
        match draw(st.sampled_from(["random", "doubled", "same", "zeros", "small whole numbers", "common part"])):
            case "doubled":
                keys[1::2] = keys[: len(keys[1::2])]
            case "same":
                keys[:] = keys[0].clone()
            case "zeros":
                keys[::3] = 0
            case "small whole numbers":
                keys = keys.round()
            case "common part":
                keys += 30
        samples.append(keys)
    keep = [draw(st.integers(1, len(keys))) for keys in samples]
    return samples, keep, draw(st.integers(1, 20)), draw(st.booleans()), draw(st.integers(0, 3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ragged())
def test_elimination_is_the_same_in_every_batch_and_padding(case):
    samples, keep, step, center, more = case
    alone = [graph.eliminate(k[None], n, step, center=center)[0] for k, n in zip(samples, keep, strict=True)]
    longest = max(map(len, samples)) + more
    padded = torch.full((len(samples), longest, samples[0].shape[1]), 7.0)
    valid = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, keys in enumerate(samples):
        padded[row, : len(keys)] = keys
        valid[row, : len(keys)] = True
    together = graph.eliminate(padded, keep, step, center=center, valid=valid)
    for row, keys in enumerate(samples):
        assert torch.equal(together[row, : len(keys)], alone[row]), row
        assert not together[row, len(keys) :].any()
        assert int(alone[row].sum()) == keep[row]
        copies = graph.eliminate(keys.expand(3, -1, -1), keep[row], step, center=center)
        assert all(torch.equal(copy, alone[row]) for copy in copies)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 130), st.integers(1, 9))
def test_of_two_tokens_the_first_goes_whatever_the_batch(seed, width, batch):
    keys = torch.randn(batch, 2, width, generator=torch.Generator().manual_seed(seed))
    for center in (False, True):
        assert graph.eliminate(keys, 1, center=center).tolist() == [[False, True]] * batch  # an exact tie: by index


def test_equal_tokens_go_by_index():
    keys = torch.randn(7, 1, 33).expand(-1, 50, -1)
    alive = graph.eliminate(keys, 20, step=7)
    assert alive.tolist() == [[False] * 30 + [True] * 20] * 7


def test_elimination_of_many_long_samples_equals_that_of_each():
    keys = torch.randn(6, 197, 64) + torch.randn(6, 1, 64)
    together = graph.eliminate(keys, 60)
    assert all(torch.equal(together[i], graph.eliminate(keys[i : i + 1], 60)[0]) for i in range(6))
