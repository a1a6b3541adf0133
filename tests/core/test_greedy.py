"""Methods of the field against loops over single numbers: each formula in float64, written from its publication."""

import dataclasses
import itertools
import math

import pytest
import torch

from saint import greedy
from saint.methods import DART, MMR, SCOPE, ApET, CDPruner, D2Pruner, OTPrune, PriorTR, PyramidDrop, SparseVLM
from saint.tokens import Candidates, Facts, TokenMap

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
    angles = torch.tensor([0.0, 2.0, 5.0, 43.0, 86.0, 88.0, 91.0]).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], -1)
    similarity = (points @ points.T)[None]
    covered = {pair: float(similarity[0, list(pair)].amax(0).sum()) for pair in itertools.combinations(range(7), 2)}
    first = int(similarity[0].sum(-1).argmax())
    best = max((pair for pair in covered if first in pair), key=covered.__getitem__)
    assert sorted(greedy.sequence(greedy.Coverage(similarity), (2,))[0].tolist()) == list(best)


# -- relevance to the prompt: CDPruner and MMR --------------------------------------------------------------------------


def literal_relevance(tokens, words):
    about = [sum(cosine(token, word) for word in words) / len(words) for token in tokens]
    low, high = min(about), max(about)
    return [(a - low) / (high - low) if high > low else 1.0 for a in about]


def literal_cdpruner(tokens, words, keep):
    weight = literal_relevance(tokens, words)
    kernel = [[weight[i] * cosine(a, b) * weight[j] for j, b in enumerate(tokens)] for i, a in enumerate(tokens)]
    return one_by_one(len(tokens), keep, volume(kernel))


def literal_mmr(tokens, words, keep, weight):
    worth = literal_relevance(tokens, words)

    def gain(i, taken):
        near = max(cosine(tokens[i], tokens[s]) for s in taken) if taken else 0.0
        return weight * worth[i] - (1 - weight) * near

    return one_by_one(len(tokens), keep, gain)


@pytest.mark.parametrize("keep", [1, 2, 6])
def test_cdpruner_is_the_formula(keep):
    features, text = noise(3, COUNT, 8, seed=keep), noise(3, 5, 8, seed=7) + 0.3
    want = [literal_cdpruner(*both, keep) for both in zip(numbers(features), numbers(text), strict=True)]
    assert chosen(CDPruner(keep), shown(features, facts=Facts(text=text))) == want


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 4, 12])
def test_mmr_is_the_formula(keep, weight):
    features, text = noise(3, COUNT, 8, seed=keep), noise(3, 5, 8, seed=7) + 0.3
    want = [literal_mmr(*both, keep, weight) for both in zip(numbers(features), numbers(text), strict=True)]
    assert chosen(MMR(keep, weight=weight), shown(features, facts=Facts(text=text))) == want


def test_relevance_of_ragged_samples_and_prompts():
    """Padding of tokens and of words counts for nothing; a prompt without words finds all alike."""
    features, lengths = noise(3, 40, 8, seed=5), [40, 9, 25]
    text = noise(3, 6, 8, seed=7)
    text[1, 2:] = 0
    text[2] = 0
    given = shown(features, lengths, facts=Facts(text=text))
    got = chosen(MMR(0.3), given)
    for sample, (n, words) in enumerate(zip(lengths, (6, 2, 0), strict=True)):
        tokens = numbers(features[sample, :n])
        said = numbers(text[sample, :words]) if words else [[1.0] + [0.0] * 7]
        keep = int(0.3 * n + 0.5)
        if words:
            assert got[sample] == literal_mmr(tokens, said, keep, 0.5)
        else:
            same = one_by_one(
                n, keep, lambda i, taken, tokens=tokens: -max([cosine(tokens[i], tokens[s]) for s in taken] or [0.0])
            )
            assert got[sample] == same
    with pytest.raises(ValueError, match="text of the prompts is not shown"):
        CDPruner(2).select(shown(features))


# -- SCOPE ------------------------------------------------------------------------------------------------------------


def literal_scope(tokens, saliency, keep, alpha):
    similar = [[cosine(a, b) for b in tokens] for a in tokens]

    def gain(i, taken):
        covered = [max([0.0, *(similar[s][j] for s in taken)]) for j in range(len(tokens))]
        return saliency[i] ** alpha * sum(max(0.0, s - c) for s, c in zip(similar[i], covered, strict=True))

    return one_by_one(len(tokens), keep, gain)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("keep", [1, 2, 4, 6])
def test_scope_is_the_formula(keep, alpha):
    features, saliency = noise(3, COUNT, 8, seed=keep), noise(3, COUNT, seed=9).softmax(-1)
    want = [literal_scope(*both, keep, alpha) for both in zip(numbers(features), numbers(saliency), strict=True)]
    assert chosen(SCOPE(keep, alpha=alpha), shown(features, attention=saliency)) == want


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])  # with 0, two tokens that cover each other tie
@pytest.mark.parametrize("keep", [2, 6, 12])
def test_bounds_of_coverage_change_no_choice(keep, alpha, monkeypatch):
    """What is done for many tokens, on few: the formula in float64, samples of which all but one are shorter among them."""
    monkeypatch.setattr(greedy, "_MANY", 0)
    features, saliency, lengths = noise(3, 40, 8, seed=keep), noise(3, 40, seed=9).softmax(-1), [40, 17, 25]
    given = shown(features, lengths, attention=saliency)
    slots = greedy.sequence(SCOPE(1, alpha=alpha).gain(given), (keep,) * 3, given.tokens.valid)
    for sample, n in enumerate(lengths):
        want = literal_scope(numbers(features[sample, :n]), numbers(saliency[sample, :n]), keep, alpha)
        assert sorted(slots[sample].tolist()) == want


def clusters(draw):
    return torch.randn(2, 8, 12, generator=draw)[:, torch.randint(0, 8, (90,), generator=draw)] * 3


KINDS = {
    "noise": lambda draw: torch.randn(2, 90, 12, generator=draw),
    "clusters": lambda draw: clusters(draw) + 0.3 * torch.randn(2, 90, 12, generator=draw),
    "copies": clusters,
    "alike": lambda draw: 9 + torch.randn(2, 90, 12, generator=draw),
    "ties": lambda draw: torch.randn(2, 90, 12, generator=draw).sign(),
    "not a number": lambda draw: torch.randn(2, 90, 12, generator=draw).log(),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_coverage_keep_ties_and_rounding(kind, weighted, monkeypatch):
    """Bit by bit the choice of all sums, down to the last token."""
    draw = torch.Generator().manual_seed(3)
    similarity = greedy.cosines(KINDS[kind](draw))
    weight = torch.randn(2, 90, generator=draw).softmax(-1) if weighted else None
    want = greedy.sequence(greedy.Coverage(similarity, weight), (90,))
    monkeypatch.setattr(greedy, "_MANY", 0)
    assert torch.equal(greedy.sequence(greedy.Coverage(similarity, weight), (90,)), want)


def test_bounds_of_coverage_leave_most_sums_out(monkeypatch):
    computed = []
    added = greedy._added
    monkeypatch.setattr(greedy, "_added", lambda s, c: computed.append(s[..., 0].numel()) or added(s, c))
    similarity = greedy.cosines(noise(1, 800, 32))
    greedy.sequence(greedy.Coverage(similarity), (200,))
    assert sum(computed) < 0.15 * 200 * 800


def test_scope_of_ragged_samples():
    features, saliency, lengths = noise(3, 40, 8, seed=5), noise(3, 40, seed=9).softmax(-1), [40, 1, 25]
    got = chosen(SCOPE(0.2), shown(features, lengths, attention=saliency))
    for sample, n in enumerate(lengths):
        keep = max(1, int(0.2 * n + 0.5))
        assert got[sample] == literal_scope(numbers(features[sample, :n]), numbers(saliency[sample, :n]), keep, 1.0)


# -- DART -------------------------------------------------------------------------------------------------------------


def literal_dart(keys, tokens, keep, pivots):
    size = [sum(abs(x) for x in key) for key in keys]
    order = sorted(range(len(keys)), key=lambda i: (-size[i], i))
    first = order[: min(pivots, keep)]
    taken, places = list(first), keep - len(first)
    for place, pivot in enumerate(first):
        left = [i for i in range(len(tokens)) if i not in taken]
        left.sort(key=lambda i: (cosine(tokens[i], tokens[pivot]), i))
        taken += left[: places // len(first) + (place < places % len(first))]
    return sorted(taken)


@pytest.mark.parametrize("pivots", [1, 3, 8])
@pytest.mark.parametrize("keep", KEEP)
def test_dart_is_the_recipe(keep, pivots):
    features, keys = noise(3, COUNT, 8, seed=keep), noise(3, COUNT, 4, seed=9)
    given = dataclasses.replace(shown(features), keys=keys)
    want = [literal_dart(*both, keep, pivots) for both in zip(numbers(keys), numbers(features), strict=True)]
    assert chosen(DART(keep, pivots=pivots), given) == want


def test_dart_of_ragged_samples():
    features, keys, lengths = noise(3, 40, 8, seed=5), noise(3, 40, 4, seed=9), [40, 2, 25]
    given = shown(features, lengths)
    keys = keys.masked_fill(~given.tokens.valid.unsqueeze(-1), 99.0)
    got = chosen(DART(0.5, pivots=4), dataclasses.replace(given, keys=keys))
    for sample, n in enumerate(lengths):
        keep = int(0.5 * n + 0.5)
        assert got[sample] == literal_dart(numbers(keys[sample, :n]), numbers(features[sample, :n]), keep, 4)


# -- ApET -------------------------------------------------------------------------------------------------------------


def solved(matrix, right):
    """The solution of a system, by elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(len(rows)):
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(len(rows)):
            if i != k:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    return [row[-1] for row in rows]


def literal_apet(tokens, keep, basis, ridge):
    channels = range(len(tokens[0]))
    mean = [sum(token[c] for token in tokens) / len(tokens) for c in channels]

    def far(i, taken):
        return min(math.dist(tokens[i], tokens[s]) for s in taken) if taken else math.dist(tokens[i], mean)

    base = one_by_one(len(tokens), min(basis, keep), far)
    gram = [[dot(tokens[a], tokens[b]) + ridge * (a == b) for b in base] for a in base]

    def error(i):
        weights = solved(gram, [dot(tokens[b], tokens[i]) for b in base])
        return math.dist(
            tokens[i], [sum(w * tokens[b][c] for w, b in zip(weights, base, strict=True)) for c in channels]
        )

    rest = sorted((i for i in range(len(tokens)) if i not in base), key=lambda i: (-error(i), i))
    return sorted(base + rest[: keep - len(base)])


@pytest.mark.parametrize("ridge", [1e-5, 3.0])
@pytest.mark.parametrize("basis", [1, 4, 10])
@pytest.mark.parametrize("keep", KEEP)
def test_apet_is_the_recipe(keep, basis, ridge):
    features = noise(3, COUNT, 16, seed=keep) + 0.5
    want = [literal_apet(sample, keep, basis, ridge) for sample in numbers(features)]
    assert chosen(ApET(keep, basis=basis, ridge=ridge), shown(features)) == want


def test_apet_of_ragged_samples():
    features, lengths = noise(3, 40, 16, seed=5) + 0.5, [40, 1, 12]
    got = chosen(ApET(0.4, basis=6), shown(features, lengths))
    for sample, n in enumerate(lengths):
        keep = max(1, int(0.4 * n + 0.5))
        assert got[sample] == literal_apet(numbers(features[sample, :n]), keep, 6, 1e-5)


# -- PyramidDrop --------------------------------------------------------------------------------------------------------


def test_pyramiddrop_halves_at_each_quarter():
    """1/2, 1/4 and 1/8 of 576 tokens are left behind layers 7, 15 and 23 of 32; each time the most attended."""
    method = PyramidDrop()
    assert method.layers("language", 32) == [7, 15, 23]
    assert [method.layers("language", depth) for depth in (1, 2, 3, 4)] == [[0], [0], [0, 1], [0, 1, 2]]
    left = list(range(576))
    tokens = TokenMap.full(1, 576, torch.device("cpu"))
    for step, count in enumerate((288, 144, 72)):
        attention = noise(1, len(left), seed=step).softmax(-1)
        nothing = torch.zeros(1, len(left), 2)
        selection = method.select(Candidates(nothing, nothing, tokens, step, 3, attention))
        tokens = tokens.select(selection)
        row = attention[0].tolist()
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        left = [left[i] for i in sorted(best)]
        assert tokens.index[0].tolist() == left


# -- what the text of a prompt looks at: SparseVLM, PriorTR, D2Pruner -----------------------------------------------------


def highest(scores, keep):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def test_sparsevlm_halves_where_published():
    """Most attended by the raters stay, in front of layers 2, 6 and 15 of 32."""
    method = SparseVLM(0.125)
    assert method.layers("language", 32) == [1, 5, 14]
    assert [method.layers("language", depth) for depth in (1, 4, 16)] == [[0], [0], [0, 2, 6]]
    features, row = noise(2, 32, 4), noise(2, 32).softmax(-1)
    for step, keep in enumerate((16, 8, 4)):
        given = dataclasses.replace(shown(features), step=step, steps=3, rows={"raters": row})
        assert chosen(method, given) == [highest(sample, keep) for sample in numbers(row)]


def literal_priortr(question, first, keep):
    p, q = ([x / math.fsum(row) for x in row] for row in (question, first))
    return highest([a * math.log(a / b) for a, b in zip(p, q, strict=True)], keep)


@pytest.mark.parametrize("keep", KEEP)
def test_priortr_is_the_formula(keep):
    question, first = (0.3 * noise(3, COUNT, seed=seed).softmax(-1) for seed in (1, 2))
    given = shown(noise(3, COUNT, 4), rows={"question": question, "first_query": first})
    want = [literal_priortr(*both, keep) for both in zip(numbers(question), numbers(first), strict=True)]
    assert chosen(PriorTR(keep), given) == want


def test_priortr_of_ragged_samples_and_of_one_token_that_asks():
    lengths = [40, 3, 25]
    question, first = (noise(3, 40, seed=seed).softmax(-1) for seed in (1, 2))
    first[2, :25] = question[2, :25]
    given = shown(noise(3, 40, 4), lengths, rows={"question": question, "first_query": first})
    got = chosen(PriorTR(0.4), given)
    for sample, n in enumerate(lengths):
        keep, own = int(0.4 * n + 0.5), numbers(question[sample, :n])
        want = highest(own, keep) if sample == 2 else literal_priortr(own, numbers(first[sample, :n]), keep)
        assert got[sample] == want


def test_priortr_takes_attention_that_half_precision_made_0():
    question, first = noise(1, COUNT).softmax(-1), noise(1, COUNT, seed=1).softmax(-1)
    question[0, 3] = first[0, 4] = question[0, 5] = first[0, 5] = 0
    given = shown(noise(1, COUNT, 4), rows={"question": question, "first_query": first})
    (got,) = chosen(PriorTR(4), given)
    assert 4 in got
    assert not {3, 5} & {*got}


def literal_d2pruner(keys, attention, places, keep, pivots, threshold):
    count = len(keys)
    x, y = (math.fsum(row) / count for row in (places, attention))
    spread = math.fsum((p - x) ** 2 for p in places)
    slope = math.fsum((p - x) * a for p, a in zip(places, attention, strict=True)) / spread if spread else 0.0
    value = [a - y - slope * (p - x) for p, a in zip(places, attention, strict=True)]
    order = sorted(range(count), key=lambda i: (-value[i], i))
    taken = order[: int(pivots * keep + 0.5)]

    def free(i):
        return all(cosine(keys[i], keys[s]) < threshold and abs(places[i] - places[s]) != 1 for s in taken)

    while len(taken) < keep:
        left = [i for i in order if i not in taken]
        taken.append(next((i for i in left if free(i)), left[0]))
    return sorted(taken)


@pytest.mark.parametrize(("pivots", "threshold"), [(0.5, 0.5), (0.0, 0.2), (0.2, 0.9), (1.0, 0.5)])
@pytest.mark.parametrize("keep", KEEP)
def test_d2pruner_is_the_recipe(keep, pivots, threshold):
    keys, attention = noise(3, COUNT, 4, seed=keep), noise(3, COUNT, seed=8).softmax(-1)
    attention += torch.linspace(0, 0.3, COUNT)  # by place
    given = dataclasses.replace(shown(noise(3, COUNT, 6), attention=attention), keys=keys)
    want = [
        literal_d2pruner(*both, range(COUNT), keep, pivots, threshold)
        for both in zip(numbers(keys), numbers(attention), strict=True)
    ]
    assert chosen(D2Pruner(keep, pivots=pivots, threshold=threshold), given) == want


def test_d2pruner_of_ragged_samples_some_of_whose_neighbours_have_left():
    lengths = [40, 3, 25]
    keys, attention = noise(3, 40, 4, seed=5), noise(3, 40, seed=9).softmax(-1)
    given = shown(keys, lengths, attention=attention)
    places = torch.stack(
        [torch.randperm(90, generator=torch.Generator().manual_seed(s))[:40].sort().values for s in range(3)]
    )
    tokens = dataclasses.replace(given.tokens, index=places, width=90)
    got = chosen(D2Pruner(0.4, threshold=0.5), dataclasses.replace(given, tokens=tokens))
    for sample, n in enumerate(lengths):
        own = numbers(keys[sample, :n]), numbers(attention[sample, :n]), places[sample, :n].tolist()
        assert got[sample] == literal_d2pruner(*own, int(0.4 * n + 0.5), 0.5, 0.5)


@pytest.mark.parametrize("wrong", [{"pivots": 1.5}, {"pivots": True}, {"threshold": -1.0}, {"keep": 0}])
def test_d2pruner_refuses_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        D2Pruner(**wrong)
