"""Settings of every method: the published defaults, and what a field may not hold, for all fields of all methods."""

import dataclasses
import math

import pytest
import torch

import saint
from saint import methods
from saint.methods.random import Random
from saint.tokens import Candidates, TokenMap

METHODS = {name: methods.get(name) for name in methods.names()}
# a field that has no default, and what it is given in these tests
NEEDED = {"keep": 0.5, "share": 0.5}


def make(method, **changes):
    needed = [f.name for f in dataclasses.fields(method) if f.init and f.default is dataclasses.MISSING]
    return method(**{**{name: NEEDED[name] for name in needed}, **changes})


FIELDS = [
    pytest.param(method, field.name, id=f"{name}-{field.name}")
    for name, method in METHODS.items()
    for field in dataclasses.fields(method)
    if field.init
]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_a_value_that_is_none_of_the_field(method, field):
    """Texts, lists, flags in place of numbers, numbers that are none and numbers that are too small or too large for anything."""
    flag = isinstance(getattr(make(method), field), bool)
    wrong = [[1], "one half", 1, 0] if flag else [[1], "one half", True, math.nan, math.inf, -math.inf, -1.5]
    for value in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            make(method, **{field: value})
        assert field in str(caught.value), (value, str(caught.value))


def test_published_settings():
    assert saint.Saint() == saint.Saint(
        threshold=0.75, neighbors=5, gamma=10.0, budget="sample", center=False, floor=0.1
    )
    assert saint.SaintFullGraph() == saint.SaintFullGraph(keep=375 / 576, step=16, center=False)


@pytest.mark.parametrize(
    ("method", "field", "inside", "outside"),
    [
        (saint.Saint, "floor", (0, 1, 0.5), (-0.01, 1.01)),
        (saint.Saint, "gamma", (0, 10, 64 / 0.25), (-0.1, 64 / 0.25 + 0.1)),
        (saint.Saint, "neighbors", (1, 500), (0, 1.5)),
        (saint.SaintFullGraph, "step", (1, 64), (0, 2.5)),
        (saint.SaintFullGraph, "keep", (1, 0.01, 1.0), (0, 0.0, 1.01)),
    ],
)
def test_the_ends_of_a_range(method, field, inside, outside):
    for value in inside:
        assert getattr(method(**{field: value}), field) == value
    for value in outside:
        with pytest.raises(ValueError, match=field):
            method(**{field: value})


def test_at_a_threshold_of_one_gamma_has_an_end_too():
    """exp(gamma * 0) is 1 whatever gamma is, but a rounded cosine may lie above the threshold."""
    saint.Saint(threshold=1.0, gamma=64_000)
    with pytest.raises(ValueError, match="gamma"):
        saint.Saint(threshold=1.0, gamma=64_001)


def scattered(x: int) -> int:
    """The mixing of ``Random`` on Python's integers."""
    for _ in range(2):
        x = ((x ^ x >> 16) * 73244475) % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("seed", [0, 3, 2**31, 2**40 + 5])
@pytest.mark.parametrize("step", [0, 2])
def test_random_keeps_those_whose_index_mixes_highest(seed, step):
    tokens, keep = TokenMap.full(1, 300, torch.device("cpu")), 100
    seen = Candidates(torch.zeros(1, 300, 4), torch.zeros(1, 300, 4), tokens, step, 3)
    got = Random(keep, seed=seed).choose(seen, (keep,))
    offset = scattered(scattered(seed % 2**32) + seed // 2**32 + step)
    best = sorted(range(300), key=lambda i: -scattered(i ^ offset))[:keep]
    assert got.slots[0].tolist() == sorted(best)
