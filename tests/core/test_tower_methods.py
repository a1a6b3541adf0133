"""Methods that look at the vision tower, against loops over single numbers: each from its publication, in float64."""

import math
import statistics

import pytest
import torch

from saint import needs as what
from saint.gathers import added
from saint.methods import HiPrune, PruMerge, VisionZip, VisPruner
from saint.tokens import Candidates, Facts, Selection, TokenMap, Tower

ROWS, COLUMNS = 6, 7
COUNT = ROWS * COLUMNS
DEPTH, READ = 24, 22
KEEP = [1, 2, 7, 20, 41]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shown(lengths=(COUNT,) * 3, seed=0, place=None):
    """What methods see in front of a language model; padding attracts all attention and is all keys' neighbour."""
    batch, count = len(lengths), max(lengths)
    valid = None if min(lengths) == count else torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    keys, features = noise(batch, count, 5, seed=seed + 1), noise(batch, count, 6, seed=seed + 2)
    tower = {}
    for number, (name, layer) in enumerate(
        [
            (what.TOWER_CLASS, READ),
            (what.TOWER_RECEIVED, READ),
            (what.TOWER_RECEIVED, 9),
            (what.TOWER_JOINED, DEPTH - 1),
        ]
    ):
        tower[name, layer] = (2 * noise(batch, count, 1, seed=seed + 3 + number)).softmax(1)
    tower[what.TOWER_KEYS, READ], tower[what.TOWER_KEYS, DEPTH - 1] = keys, noise(batch, count, 5, seed=seed + 9)
    if valid is not None:
        tower = {key: value.masked_fill(~valid.unsqueeze(-1), 9.0) for key, value in tower.items()}
        features = features.masked_fill(~valid.unsqueeze(-1), 1e3)
    place = torch.arange(count).expand(batch, count) if place is None else torch.tensor(place).expand(batch, count)
    grid = torch.tensor([ROWS, COLUMNS]).expand(batch, count, 2)
    facts = Facts(tower=Tower(tower, DEPTH, READ, place, grid, 1))
    return Candidates(features, features, TokenMap.full(batch, count, torch.device("cpu"), valid), 0, 1, facts=facts)


def numbers(tensor):
    return tensor.double().tolist()


def seen(candidates, sample, name, layer):
    """Attention or keys of the real tokens of a sample."""
    value = candidates.facts.tower.shown[name, layer][sample, : candidates.tokens.lengths[sample]]
    return numbers(value.squeeze(-1) if value.shape[1] == 1 else value)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def best(score, count, among):
    return sorted(among, key=lambda i: -score[i])[:count]


def chosen(selection):
    return [row[:n].tolist() for row, n in zip(selection.slots, selection.lengths, strict=True)]


def weights(selection, sample, total):
    """What is added to each token that stays: {slot: {token: weight}} without zeros."""
    out = {}
    for row, slot in enumerate(chosen(selection)[sample]):
        own = selection.adds[sample, row]
        assert not own[total:].any(), "padding is added"
        out[slot] = {i: float(own[i]) for i in own.nonzero().flatten().tolist()}
    assert not selection.adds[sample, selection.lengths[sample] :].any()
    return out


def close(got, want):
    assert got.keys() == want.keys()
    for slot, own in want.items():
        assert got[slot] == pytest.approx(own, rel=1e-5, abs=1e-7), slot


RAGGED = (42, 5, 30)


def goal(keep, total):
    return keep if isinstance(keep, int) else int(keep * total + 0.5)


# -- VisionZip --------------------------------------------------------------------------------------------------------


def literal_visionzip(a, keys, keep, share):
    count, total = math.floor(share * keep + 0.5), len(a)
    dominant = best(a, keep - count, range(total))
    others = [i for i in range(total) if i not in dominant]
    step = len(others) // count if count else 1
    contextual = others[::step][:count]
    goes = {c: [] for c in contextual}
    for i in others:
        if contextual and i not in contextual:
            goes[max(contextual, key=lambda c: cosine(keys[i], keys[c]))].append(i)
    means = {c: {i: 1 / len(own) for i in own} for c, own in goes.items()}
    return sorted(dominant + contextual), {i: means.get(i, {}) for i in sorted(dominant + contextual)}


@pytest.mark.parametrize("share", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("keep", [*KEEP, 0.3])
@pytest.mark.parametrize("lengths", [(COUNT,) * 3, RAGGED], ids=["even", "ragged"])
def test_visionzip_is_the_formula(lengths, keep, share):
    if isinstance(keep, int) and keep >= min(lengths):
        return
    given = shown(lengths)
    got = VisionZip(keep, contextual=share).select(given)
    for sample, total in enumerate(lengths):
        a, keys = (seen(given, sample, name, READ) for name in (what.TOWER_CLASS, what.TOWER_KEYS))
        kept, adds = literal_visionzip(a, keys, goal(keep, total), share)
        assert chosen(got)[sample] == kept
        if got.adds is not None:
            close(weights(got, sample, total), adds)
    assert (got.adds is None) == (share == 0 or (keep == 1 and share < 0.5) or (keep == 2 and share < 0.25))


# -- VisPruner --------------------------------------------------------------------------------------------------------


def literal_vispruner(a, features, keep, share, step):
    important = best(a, math.floor(share * keep), range(len(a)))
    left = [i for i in range(len(a)) if i not in important]
    want = keep - len(important)
    while len(left) > want:
        even, odd = left[::2], left[1::2]
        if not odd:
            left = left[:want]
            continue
        nearest = {i: max(cosine(features[i], features[j]) for j in odd) for i in even}
        gone = best(nearest, min(step, len(left) - want), even)
        left = [i for i in left if i not in gone]
    return sorted(important + left)


@pytest.mark.parametrize(("share", "step"), [(0.5, 8), (0.0, 3), (1.0, 8), (0.3, 1)])
@pytest.mark.parametrize("keep", [*KEEP, 0.3])
@pytest.mark.parametrize("lengths", [(COUNT,) * 3, RAGGED], ids=["even", "ragged"])
def test_vispruner_is_the_formula(lengths, keep, share, step):
    if isinstance(keep, int) and keep >= min(lengths):
        return
    given = shown(lengths)
    got = VisPruner(keep, important=share, step=step).select(given)
    for sample, total in enumerate(lengths):
        a, features = seen(given, sample, what.TOWER_CLASS, READ), numbers(given.features[sample, :total])
        assert chosen(got)[sample] == literal_vispruner(a, features, goal(keep, total), share, step)


# -- HiPrune ----------------------------------------------------------------------------------------------------------


def literal_hiprune(middle, late, keep, alpha, place):
    """``place`` of each token in its picture of ROWS x COLUMNS; pictures follow each other."""
    picture, number = [], 0
    for i, own in enumerate(place):
        number += i > 0 and own <= place[i - 1]
        picture.append(number)
    anchors = best(middle, min(math.floor(alpha * keep / 5 + 0.5), keep // 5), range(len(place)))
    kept = set(anchors)
    for i in anchors:
        for away in (-1, 1, -COLUMNS, COLUMNS):
            at = min(max(place[i] + away, 0), ROWS * COLUMNS - 1)
            kept |= {j for j in range(len(place)) if place[j] == at and picture[j] == picture[i]}
    return sorted([*kept, *best(late, keep - len(kept), [i for i in range(len(place)) if i not in kept])])


SPARSE = [*range(0, COUNT, 2), *range(COUNT)]  # a picture of which half has left, and a whole one


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("keep", [*KEEP, 0.3])
@pytest.mark.parametrize(
    ("lengths", "place"),
    [((COUNT,) * 3, None), (RAGGED, None), ((len(SPARSE),) * 2, SPARSE)],
    ids=["even", "ragged", "two pictures"],
)
def test_hiprune_is_the_formula(lengths, place, keep, alpha):
    if isinstance(keep, int) and keep >= min(lengths):
        return
    given = shown(lengths, place=place)
    method = HiPrune(keep, alpha=alpha)
    assert method.tower_layers(DEPTH, READ, 1) == (9, READ)
    got = method.select(given)
    for sample, total in enumerate(lengths):
        middle, late = (seen(given, sample, what.TOWER_RECEIVED, layer) for layer in (9, READ))
        own = (place or list(range(COUNT)))[:total]
        assert chosen(got)[sample] == literal_hiprune(middle, late, goal(keep, total), alpha, own)


@pytest.mark.parametrize("row", [0, 3, ROWS - 1])
def test_the_neighbour_of_the_end_of_a_row_begins_the_next(row):
    """As published; in front of the first token and behind the last there is none but themselves."""
    given = shown((COUNT,))
    end = row * COLUMNS + COLUMNS - 1
    middle = torch.zeros(1, COUNT, 1)
    middle[0, end] = 1
    given.facts.tower.shown[what.TOWER_RECEIVED, 9][:] = middle
    given.facts.tower.shown[what.TOWER_RECEIVED, READ][:] = torch.linspace(0, 1e-6, COUNT).view(1, -1, 1)
    (kept,) = chosen(HiPrune(5, alpha=1.0).select(given))
    want = {min(max(at, 0), COUNT - 1) for at in (end, end - 1, end + 1, end - COLUMNS, end + COLUMNS)}
    assert want <= set(kept)


def test_published_middle_layers():
    assert HiPrune().tower_layers(24, 22, 1) == (9, 22)
    assert HiPrune().tower_layers(32, 31, 0) == (16, 31)
    assert HiPrune(middle=0.5).tower_layers(32, 31, 1) == (16, 31)
    assert HiPrune(middle=0.25).tower_layers(32, 31, 0) == (8, 31)
    assert HiPrune(middle=0.0).tower_layers(32, 31, 0) == (0, 31)
    assert HiPrune(middle=1.0).tower_layers(4, 3, 1) == (3, 3)


def test_a_grid_that_is_not_known_is_refused():
    given = shown((COUNT,))
    tower = given.facts.tower
    blind = Facts(tower=Tower(tower.shown, DEPTH, READ, tower.place, torch.zeros(1, COUNT, 2, dtype=torch.long), 1))
    with pytest.raises(ValueError, match="HiPrune needs the grid"):
        HiPrune(5).select(Candidates(given.keys, given.features, given.tokens, 0, 1, facts=blind))


# -- PruMerge ---------------------------------------------------------------------------------------------------------


def outstanding(a):
    low, _, high = statistics.quantiles(a, n=4, method="inclusive")
    return [i for i, value in enumerate(a) if value > high + 1.5 * (high - low)] or best(a, 1, range(len(a)))


def literal_prumerge(a, keys, keep, neighbors, plus):
    total = len(a)
    if keep is None:
        kept = set(outstanding(a))
        if plus:
            kept |= set(range(0, total, max(1, int(1 / (len(kept) / total) + 1e-9) // 3)))
    else:
        count = max(1, keep - 1)
        first = math.ceil(count / 4) if plus else count
        kept = set(best(a, first, range(total)))
        others = [i for i in range(total) if i not in kept]
        kept |= {others[i * len(others) // (count - first)] for i in range(count - first)}
    leave = [i for i in range(total) if i not in kept]
    adds = {}
    for i in kept:
        others = [j for j in range(total) if j != i]
        adds[i] = {j: a[j] for j in best([cosine(keys[i], key) for key in keys], neighbors, others)}
    if leave and (keep is None or keep > 1):
        extra = leave[-1]
        adds[extra] = {j: a[j] - (j == extra) for j in leave}
    return dict(sorted(adds.items()))


@pytest.mark.parametrize(("neighbors", "plus"), [(32, False), (3, False), (0, False), (4, True)])
@pytest.mark.parametrize("keep", [None, *KEEP, 0.3])
@pytest.mark.parametrize("lengths", [(COUNT,) * 3, RAGGED], ids=["even", "ragged"])
def test_prumerge_is_the_formula(lengths, keep, neighbors, plus):
    if isinstance(keep, int) and keep >= min(lengths):
        return
    given = shown(lengths)
    got = PruMerge(keep, neighbors=neighbors, plus=plus).select(given)
    for sample, total in enumerate(lengths):
        a, keys = (seen(given, sample, name, DEPTH - 1) for name in (what.TOWER_JOINED, what.TOWER_KEYS))
        want = literal_prumerge(a, keys, keep if keep is None else goal(keep, total), neighbors, plus)
        close(weights(got, sample, total), want)


def test_prumerge_lets_pictures_decide():
    given = shown()
    counts = PruMerge().select(given).lengths
    assert len(set(counts)) > 1
    assert PruMerge().votes
    assert not PruMerge(5).votes
    alone = [PruMerge().select(shown_of(given, sample)).lengths[0] for sample in range(3)]
    assert list(counts) == alone


def shown_of(given, sample):
    one = slice(sample, sample + 1)
    tokens = TokenMap.full(1, COUNT, torch.device("cpu"))
    return Candidates(given.keys[one], given.features[one], tokens, 0, 1, facts=given.facts.of_samples([sample]))


# -- what is added ----------------------------------------------------------------------------------------------------


def test_what_is_added_is_a_sum_and_nothing_else_changes():
    rows, adds = noise(2, 5, 3, seed=1), torch.zeros(2, 2, 5)
    adds[0, 1, 2], adds[0, 1, 4] = 0.5, -2.0
    got = added(rows, Selection(torch.tensor([[0, 3], [1, 2]]), (2, 2), adds=adds))
    assert torch.equal(got[0, 0], rows[0, 0])
    assert torch.equal(got[1], rows[1, 1:3])
    torch.testing.assert_close(got[0, 1], rows[0, 3] + 0.5 * rows[0, 2] - 2 * rows[0, 4])
    low = added(rows.bfloat16(), Selection(torch.tensor([[0, 3], [1, 2]]), (2, 2), adds=adds))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low[1], rows[1, 1:3].bfloat16())


@pytest.mark.parametrize("method", [VisionZip(3), VisPruner(3), HiPrune(3), PruMerge(3)], ids=lambda m: m.name)
def test_without_a_tower_it_is_refused(method):
    given = shown((COUNT,))
    with pytest.raises(ValueError, match="vision tower is not shown here"):
        method.select(Candidates(given.keys, given.features, given.tokens, 0, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VisionZip(contextual=1.5), r"contextual.*\[0, 1\].*1\.5"),
        (lambda: VisPruner(important=-1), "important.*-1"),
        (lambda: VisPruner(step=0), "step.*0"),
        (lambda: HiPrune(alpha=2), "alpha.*2"),
        (lambda: HiPrune(middle=True), "middle.*True"),
        (lambda: PruMerge(0.0), r"keep.*0\.0"),
        (lambda: PruMerge(neighbors=-1), "neighbors.*-1"),
        (lambda: PruMerge(plus=1), "plus.*True or False.*1"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()
