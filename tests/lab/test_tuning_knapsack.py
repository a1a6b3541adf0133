"""The knapsack against all ways through."""

import itertools

import numpy as np
import pytest

from saint.lab.tuning import knapsack
from saint.lab.tuning.knapsack import Place, cheapest, front


def random_places(seed, count, size):
    rng = np.random.default_rng(seed)
    allowed = np.triu(np.ones((size, size), bool)) & (rng.random((count, size, size)) < 0.8)
    allowed |= np.eye(size, dtype=bool)
    loss = np.where(allowed, rng.random((count, size, size)), np.inf)
    for one in loss:
        np.fill_diagonal(one, 0)
    return [Place(one, np.array(work)) for one, work in zip(loss, rng.random((count, size, size)), strict=True)]


def every_way(places):
    size = len(places[0].loss)
    for states in itertools.product(range(size), repeat=len(places)):
        came = (0, *states[:-1])
        loss = sum(p.loss[i, j] for p, i, j in zip(places, came, states, strict=True))
        if np.isfinite(loss):
            yield loss, sum(p.work[i, j] for p, i, j in zip(places, came, states, strict=True)), states


@pytest.mark.parametrize("seed", range(8))
def test_the_least_loss_within_every_budget_is_that_of_all_ways(seed):
    places = random_places(seed, count=4, size=4)
    ways, found = list(every_way(places)), front(places)
    for budget in np.linspace(min(w for _, w, _ in ways), max(w for _, w, _ in ways), 23):
        best = min(loss for loss, work, _ in ways if work <= budget + 1e-12)
        got = cheapest(found, budget)
        assert got.loss == pytest.approx(best, abs=1e-12)
        loss, work, _ = next(way for way in ways if way[2] == got.states)  # the way gives what it says
        assert (got.loss, got.work) == (pytest.approx(loss), pytest.approx(work))


def test_a_thinned_front_stays_within_its_slices(monkeypatch):
    places = random_places(0, count=5, size=6)
    exact = front(places)
    monkeypatch.setattr(knapsack, "_MOST", 8)
    thin = front(places)
    assert len(thin) < len(exact)
    budget = exact[len(exact) // 2].work
    assert cheapest(thin, budget).work <= budget
    assert cheapest(thin, budget).loss <= cheapest(exact, budget).loss + 0.5


def test_an_impossible_budget_says_what_is_possible():
    places = random_places(0, count=2, size=3)
    least = min(work for _, work, _ in every_way(places))
    with pytest.raises(ValueError, match=f"cannot be met.*{least:.3f}"):
        cheapest(front(places), least * 0.9)


def test_places_that_make_no_sense():
    with pytest.raises(ValueError, match="no place"):
        front([])
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        front([Place(np.zeros((2, 2)), np.zeros((2, 2))), Place(np.zeros((3, 3)), np.zeros((3, 3)))])
    with pytest.raises(ValueError, match="no way through"):
        front([Place(np.full((2, 2), np.inf), np.zeros((2, 2)))])
