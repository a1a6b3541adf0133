"""Greedy subsets against loops over single numbers: the formula of each method in float64, written from its publication."""

import itertools
import math

import pytest
import torch

from saint import greedy
from saint.methods import OTPrune
from saint.tokens import Candidates, TokenMap

COUNT = 17
KEEP = [1, 2, 6, 16]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shown(features, lengths=None, **more):
    """What a method sees in front of a language model; ``lengths`` makes the batch ragged, its padding large."""
    batch, count = features.shape[:2]
    valid = None if lengths is None else torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    if valid is not None:
        features = features.masked_fill(~valid.unsqueeze(-1), 1e3)
    tokens = TokenMap.full(batch, count, torch.device("cpu"), valid)
    return Candidates(features, features, tokens, 0, 1, **more)


def chosen(method, candidates):
    selection = method.select(candidates)
    return [row[:n].tolist() for row, n in zip(selection.slots, selection.lengths, strict=True)]


def one_by_one(count, keep, gain):
    """The tokens that gain most, one after another: ``gain(i, taken)`` is a number, of equal ones the first stays."""
    taken = []
    while len(taken) < keep:
        left = [i for i in range(count) if i not in taken]
        worth = [gain(i, taken) for i in left]
        taken.append(left[worth.index(max(worth))])
    return sorted(taken)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def determinant(matrix):
    """By elimination."""
    rows, value = [list(row) for row in matrix], 1.0
    for k in range(len(rows)):
        value *= rows[k][k]
        for i in range(k + 1, len(rows)):
            share = rows[i][k] / rows[k][k]
            rows[i] = [a - share * b for a, b in zip(rows[i], rows[k], strict=True)]
    return value


def numbers(tensor):
    return tensor.double().tolist()


def volume(kernel):
    """How much a token multiplies the determinant of those taken: one order of the tokens for all of them."""

    def factor(i, taken):
        own = [[kernel[a][b] for b in [*taken, i]] for a in [*taken, i]]
        return determinant(own) / (determinant([row[:-1] for row in own[:-1]]) if taken else 1.0)

    return factor


# -- OTPrune ----------------------------------------------------------------------------------------------------------


def literal_otprune(tokens, keep, gamma):
    channels = range(len(tokens[0]))
    norm = [math.sqrt(sum(token[c] ** 2 for token in tokens)) for c in channels]
    x = [[token[c] / norm[c] for c in channels] for token in tokens]
    kernel = [[(i == j) + gamma * dot(a, b) for j, b in enumerate(x)] for i, a in enumerate(x)]
    return one_by_one(len(tokens), keep, volume(kernel))


@pytest.mark.parametrize("gamma", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("keep", KEEP)
def test_otprune_is_the_formula(keep, gamma):
    features = noise(3, COUNT, 6, seed=keep) * torch.tensor([1.0, 5.0, 0.2, 1.0, 1.0, 30.0])
    want = [literal_otprune(sample, keep, gamma) for sample in numbers(features)]
    assert chosen(OTPrune(keep, gamma=gamma), shown(features)) == want


def test_otprune_of_ragged_samples():
    features, lengths = noise(3, 40, 6, seed=5) * torch.tensor([1.0, 5.0, 0.2, 1.0, 1.0, 30.0]), [40, 1, 25]
    got = chosen(OTPrune(0.3, gamma=10.0), shown(features, lengths))
    assert got[1] == [0]
    for sample in (0, 2):
        n = lengths[sample]
        assert got[sample] == literal_otprune(numbers(features[sample, :n]), int(0.3 * n + 0.5), 10.0)


# -- the kernel -------------------------------------------------------------------------------------------------------


def test_where_no_token_adds_volume_the_first_are_taken():
    """Three directions, four tokens of each: the fourth token onwards adds nothing."""
    points = torch.eye(3).repeat_interleave(4, 0)[None]
    gain = greedy.Volume(points @ points.mT)
    assert greedy.sequence(gain, (6,)).tolist() == [[0, 4, 8, 1, 2, 3]]


def test_a_volume_of_many_tokens_stays_finite():
    """Samples that take fewer go on behind what they have."""
    points = noise(2, 30, 4, seed=1)
    tokens = TokenMap.full(2, 30, torch.device("cpu"))
    selection = greedy.subset(greedy.Volume(points @ points.mT), (30, 3), tokens)
    assert selection.lengths == (30, 3)
    kernel = [[dot(a, b) for b in numbers(points[1])] for a in numbers(points[1])]
    assert selection.slots[1, :3].tolist() == one_by_one(30, 3, volume(kernel))


@pytest.mark.parametrize("make", [greedy.Volume, greedy.Coverage, lambda s: greedy.Apart(s, torch.zeros(1, 8))])
def test_equal_tokens_are_taken_in_order(make):
    similarity = torch.eye(8)[None] if make is greedy.Volume else torch.ones(1, 8, 8)
    assert greedy.sequence(make(similarity), (8,)).tolist() == [list(range(8))]


def test_coverage_is_the_best_of_all_pairs_where_greedy_is_exact():
    """Two clusters and what lies between them: one token of each cluster covers most."""
    angles = torch.tensor([0.0, 2.0, 4.0, 45.0, 86.0, 88.0, 90.0]).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], -1)
    similarity = (points @ points.T)[None]
    covered = {pair: float(similarity[0, list(pair)].amax(0).sum()) for pair in itertools.combinations(range(7), 2)}
    first = int(similarity[0].sum(-1).argmax())
    best = max((pair for pair in covered if first in pair), key=covered.__getitem__)
    assert sorted(greedy.sequence(greedy.Coverage(similarity), (2,))[0].tolist()) == list(best)
