"""Statistics and scores against counts by hand and literal loops; whose results a report is made of."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saint import LayerTrace
from saint.lab import answers as texts
from saint.lab.eval import Journal, compare, scores
from saint.lab.eval.compare import detectable_binary, tango_interval
from saint.lab.eval.journal import JournalError
from saint.lab.eval.loop import Loop, Processes
from saint.lab.eval.report import Report, Summary, between, by_sample, digest, fingerprint, kept, summaries
from saint.lab.sources.items import Item
from saint.lab.variants import check_plans
from saint.plans import Plan

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
Z, Z80 = stats.norm.ppf(0.975), stats.norm.ppf(0.8)


# -- paired comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "pruned", "method"),
    [
        ([0, 1, 1, 0], [1, 1, 0, 0], "tango"),
        ([0.5, 1.0], [0.5, 0.0], "tango"),  # every difference is -1, 0 or 1, and scores lie in [0, 1]
        ([5, 6, 5, 6], [6, 5, 5, 6], "bootstrap_bca"),  # counts, not right or wrong
        ([0, 1, 2], [1, 1, 2], "bootstrap_bca"),
        ([-1, 0, 0], [0, 0, 0], "bootstrap_bca"),
        ([0, 1, 1], [0, 1, 2], "bootstrap_bca"),
        ([0, -1, 1], [0, 0, 1], "bootstrap_bca"),
        ([0.0, 1.0, 1.0], [0.5, 1.0, 1.0], "bootstrap_bca"),
        ([0.5] * 1001, [0.5, *[0.6] * 1000], "bootstrap_percentile"),
        ([0.5] * 1000, [0.5, *[0.6] * 999], "bootstrap_bca"),
    ],
)
def test_what_counts_as_right_or_wrong(base, pruned, method):
    result = compare(base, pruned)
    assert result.method == method
    assert (result.p_value is None) == (method != "tango")
    assert result.difference == pytest.approx(np.mean(pruned) - np.mean(base))
    assert (result.n, result.base, result.pruned) == (
        len(base),
        pytest.approx(np.mean(base)),
        pytest.approx(np.mean(pruned)),
    )
    assert result.better == sum(b > a for a, b in zip(base, pruned, strict=True))
    assert result.worse == sum(b < a for a, b in zip(base, pruned, strict=True))
    assert result.low <= result.difference <= result.high


@few
@given(st.integers(2, 40), st.data())
def test_right_or_wrong_by_hand(n, data):
    worse = data.draw(st.integers(0, n))
    better = data.draw(st.integers(0, n - worse))
    base = [1.0] * worse + [0.0] * (n - worse)
    pruned = [0.0] * worse + [1.0] * better + [0.0] * (n - worse - better)
    result = compare(base, pruned, confidence=0.9, power=0.7)
    discordant = worse + better
    tail = sum(math.comb(discordant, k) for k in range(min(worse, better) + 1)) / 2**discordant
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    z, z_power = stats.norm.ppf(0.95), stats.norm.ppf(0.7)
    assert (result.low, result.high) == pytest.approx(tango_interval(better, worse, n, z))
    want = detectable_binary(discordant / n, n, z, z_power)
    assert result.detectable == (None if want is None else pytest.approx(want))
    if want is not None:
        psi = max(discordant / n, want)
        assert want * math.sqrt(n) == pytest.approx(
            z * math.sqrt(psi) + z_power * math.sqrt(max(0, psi - want**2)), abs=1e-6
        )
        assert detectable_binary(discordant / n, 4 * n, z, z_power) < want
    mirrored = compare(pruned, base, confidence=0.9, power=0.7)
    assert mirrored.difference == pytest.approx(-result.difference)
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low), abs=1e-6)
    wider = compare(base, pruned, confidence=0.99)
    assert wider.low <= result.low + 1e-9
    assert wider.high >= result.high - 1e-9
    assert (result.confidence, result.power) == (0.9, 0.7)


def test_graded_scores_without_spread_have_no_interval():
    result = compare([0.25, 0.5, 0.125], [0.375, 0.625, 0.25])
    assert (result.low, result.high, result.detectable) == (None, None, None)
    one = compare([0.3], [0.4])
    assert (one.low, one.detectable, one.p_value) == (None, None, None)


def test_the_detectable_difference_of_graded_scores():
    rng = np.random.default_rng(0)
    base, pruned = rng.uniform(size=(2, 50))
    result = compare(base, pruned, confidence=0.9, power=0.6)
    deviation = math.sqrt(sum((d - (pruned - base).mean()) ** 2 for d in pruned - base) / 49)
    want = (stats.norm.ppf(0.95) + stats.norm.ppf(0.6)) * deviation / math.sqrt(50)
    assert result.detectable == pytest.approx(want)
    assert compare(base, pruned, seed=1).low != compare(base, pruned, seed=2).low


@pytest.mark.parametrize("bad", [{"confidence": 0}, {"confidence": 1}, {"power": 0}, {"power": 1.0}])
def test_shares_lie_between_nought_and_one(bad):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        compare([1, 0], [0, 0], **bad)


# -- text scores --------------------------------------------------------------------------------------------------------


def edits(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that turn ``a`` into ``b``: the table of Wagner and Fischer."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


# few letters: many near misses; all of Unicode: surrogates, combining marks, lower case of another length
said = st.one_of(st.text("ab", max_size=4), st.text("ab ", max_size=12), st.text(max_size=70))


@settings(few, max_examples=300)
@given(said, st.lists(said, max_size=3), st.sampled_from([0.2, 0.5, 1.0]))
def test_anls_is_the_formula(prediction, answers, threshold):
    def clean(text: str) -> str:
        return " ".join(text.lower().split())

    shares = [edits(clean(prediction), clean(a)) / max(len(clean(prediction)), len(clean(a)), 1) for a in answers]
    want = max((1 - share for share in shares if share < threshold), default=0.0)
    assert texts.anls(prediction, answers, threshold) == want


def test_anls_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r'rapidfuzz is not installed: pip install "\.\[eval\]"'):
        texts.anls("a", ["b"])


def test_anls_takes_the_closest_answer_and_has_a_threshold():
    assert texts.anls("abcd", ["abxx", "abcx", "zzzz"]) == 0.75
    assert texts.anls("abcd", ["abxx"]) == 0  # half is not close enough
    assert texts.anls("abcd", ["abxx"], threshold=0.51) == 0.5
    assert texts.anls("  A  B ", ["a b"]) == 1
    assert texts.anls("", [""]) == 1
    assert texts.anls("abc", ["abcdefgh"]) == 0  # over the longer of the two
    assert texts.anls("abcdefgh", ["abcde"]) == 1 - 3 / 8


def test_exact_takes_any_answer():
    assert texts.exact("A Red bus!", ["green", "red bus"]) == 1
    assert texts.exact("red", ["green", "red bus"]) == 0
    assert texts.normalise("It's 1,000.5 or a .5, the end.") == "it's 1,000.5 or 5 end"


def test_choices():
    colours = ["red", "light red", "blue"]
    assert texts.chosen("light red", colours) == 1
    assert texts.chosen("(c)", colours) == 2
    assert texts.chosen("The answer is: B", colours) == 1
    assert texts.chosen("option c", colours) == 2
    assert texts.chosen("I think blue", colours) == 2
    assert texts.chosen("red or blue", colours) is None
    assert texts.chosen("D", colours) is None
    assert texts.right_choices(["B", " (a) ", "blue"], colours) == {0, 1, 2}
    with pytest.raises(ValueError, match="none of the choices"):
        texts.right_choices(["D"], colours)
    assert texts.choice("B", ["light red"], colours) == 1
    assert texts.choice("A", ["light red"], colours) == 0
    assert texts.choice("?", ["light red"], colours) == 0


# -- distributions and features -----------------------------------------------------------------------------------------


def test_divergence_is_the_sum():
    base, pruned = torch.randn(3, 5), torch.randn(3, 5)
    base[0, 1] = -torch.inf
    want = []
    for p, q in zip(base.double().softmax(-1).tolist(), pruned.double().softmax(-1).tolist(), strict=True):
        want.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))
    assert scores.kl_divergence(base, pruned).tolist() == pytest.approx(want)
    assert scores.kl_divergence(pruned, base)[0] == math.inf
    assert scores.kl_divergence(pruned[1:], base[1:]).tolist() != pytest.approx(want[1:])  # not symmetric


@few
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 99))
def test_the_highest_k(classes, k, seed):
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(5, classes, generator=g), torch.randint(0, classes, (5,), generator=g)
    want = [sum(float(x) > float(row[label]) for x in row) < k for row, label in zip(logits, labels, strict=True)]
    assert scores.in_top(logits, labels, k).tolist() == want


@few
@given(st.integers(3, 12), st.integers(1, 5), st.integers(0, 99))
def test_nearest_neighbours_are_the_loop(count, k, seed):
    g = torch.Generator().manual_seed(seed)
    features, labels = torch.randn(count, 3, generator=g), torch.randint(0, 3, (count,), generator=g)
    got = scores.knn(features, labels, k)
    for i in range(count):
        similar = [float(torch.cosine_similarity(features[i], features[j], dim=0)) for j in range(count)]
        near = sorted((j for j in range(count) if j != i), key=lambda j: -similar[j])[:k]
        votes = {}
        for rank, j in enumerate(near):
            votes[int(labels[j])] = votes.get(int(labels[j]), 0) + 1 + 0.005 * 0.5**rank
        assert bool(got[i]) == (max(votes, key=votes.get) == int(labels[i]))
    with pytest.raises(ValueError, match="at least two"):
        scores.knn(features[:1], labels[:1])


def test_every_second_of_each_class_is_held_out():
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 2])
    assert scores.split(labels).tolist() == [False, False, True, True, False, False, True]
    assert scores.split(torch.tensor([4, 4, 1, 1])).tolist() == [
        False,
        True,
        False,
        True,
    ]  # two samples each are enough
    for bad in ([1, 1, 1], [0, 0, 1]):
        with pytest.raises(ValueError, match="two classes with two samples"):
            scores.split(torch.tensor(bad))


# -- reports ------------------------------------------------------------------------------------------------------------

ENTRIES = [
    {"id": "a", "base": {"top1": 1, "kl": 0.5}, "p": {"top1": 0, "kl": 4.0}, "q": {"top1": 1}},
    {"id": "b", "base": {"top1": 1}, "p": {"top1": 1, "kl": None}, "q": {}},
    {"id": "c", "base": {"top1": 0}, "p": {"top1": 1, "kl": 1.0}, "q": {"top1": 1}},
    {"id": "d", "base": {"top1": 0}, "p": {"top1": 0, "kl": 1.5}, "q": {"top1": 0}},
]


def test_scores_by_sample_and_between_plans():
    found = by_sample(ENTRIES, ["base", "p", "q"], ["top1", "top5"])
    assert found["p"] == {"top1": {"a": 0, "b": 1, "c": 1, "d": 0}}
    assert found["q"] == {"top1": {"a": 1, "c": 1, "d": 0}}
    paired = between(found, "base", "p")["top1"]
    assert (paired.n, paired.base, paired.pruned, paired.better, paired.worse) == (4, 0.5, 0.5, 1, 1)
    common = between(found, "p", "q")["top1"]  # only samples that both have
    assert (common.n, common.base, common.pruned) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    some = between(found, "base", "p", {"a", "b", "z"})["top1"]
    assert (some.n, some.base, some.pruned) == (2, 1, 0.5)
    assert between(found, "base", "p", {"z"}) == {}


def test_summaries_leave_out_what_is_not_finite():
    (found,) = summaries(ENTRIES, "p", ["kl", "cosine"]).values()
    assert (found.n, found.median, found.mean) == (3, 1.5, pytest.approx(6.5 / 3))
    assert (found.p20, found.p80) == (pytest.approx(1.2), pytest.approx(3.0))
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0, 2.0, 1)


def test_a_report_compares_plans_with_the_first():
    samples = by_sample(ENTRIES, ["base", "p", "q"], ["top1"])
    plans = {"p": Plan(), "q": Plan()}
    report = Report(4, 4, [], plans, {}, {}, {}, {"n": 1}, samples)
    assert list(report.against_first()) == ["q"]
    assert report.against_first()["q"] == report.between("p", "q")
    assert report.between("q", "p")["top1"].difference == pytest.approx(-1 / 3)
    data = report.to_dict()
    assert "samples" not in data
    assert data["against_first"]["q"]["top1"]["difference"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no plan 'x'"):
        report.between("x", "p")
    for bad in ({}, {"base": Plan()}):
        with pytest.raises(ValueError, match="at least one plan"):
            check_plans(bad)


def test_the_share_that_is_kept():
    class Done:
        trace = None

    def entry(before, after):
        return LayerTrace("vision", 0, torch.tensor(before), torch.tensor(after), [])

    Done.trace = [entry([10, 8], [9, 6]), entry([9, 6], [5, 2])]
    assert kept(Done, 2) == [0.5, 0.25]
    assert kept(Done, 1) is None  # counted per tile, say
    Done.trace = [entry([10, 8], [9, 6]), entry([9], [5])]
    assert kept(Done, 2) is None
    Done.trace = [entry([9], [5]), entry([10, 8], [9, 6])]
    assert kept(Done, 2) is None
    Done.trace = [entry([10, 8], [5, 2])]
    assert kept(Done, 2) == [0.5, 0.25]
    Done.trace = []
    assert kept(Done, 2) is None


def test_fingerprints_tell_weights_apart():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    first = fingerprint(model)
    assert first == fingerprint(model)
    with torch.no_grad():
        model[0].weight[-1, -1] += 1
    assert fingerprint(model) != first
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


# -- whose results ------------------------------------------------------------------------------------------------------


def evaluate(names, path, **changes):
    scored = []

    def score(items, values):
        scored.extend(item.id for item in items)
        return [{"value": value} for value in values]

    loop = Loop(score, journal=path, key={"k": 1}, batch=2, processes=Processes(), tick=lambda n: None)
    return loop.run([Item(name, "here", partial(len, name)) for name in names]), scored


def test_results_of_other_items_stay_out(tmp_path):
    path = tmp_path / "run.jsonl"
    first, scored = evaluate(["one", "three", "fifth"], path)
    assert scored == ["one", "three", "fifth"]
    assert first.resumed == 0
    second, scored = evaluate(["new", "three"], path)
    assert scored == ["new"]
    assert list(second.entries) == ["new", "three"]
    assert [entry["value"] for entry in second.entries.values()] == [3, 5]
    assert second.resumed == 1
    assert second.failures == []
    third, scored = evaluate(["fifth", "one", "three", "new"], path)
    assert (scored, third.resumed, list(third.entries)) == ([], 4, ["fifth", "one", "three", "new"])


def test_a_second_result_for_a_sample_does_not_replace_the_first(tmp_path):
    path = tmp_path / "run.jsonl"
    evaluate(["one", "three"], path)
    again = Journal(path, {"k": 1, "batch": 2})
    with pytest.raises(JournalError, match="already has a result for one"):
        again.append([{"id": "new", "value": 1}, {"id": "one", "value": 99}])
    again.close()
    outcome, scored = evaluate(["one", "three"], path)
    assert (scored, outcome.entries["one"]["value"]) == ([], 3)


def test_a_fingerprint_sees_both_ends_of_every_tensor():
    model = torch.nn.Linear(10, 10)
    first = fingerprint(model)
    for place in (0, 7, 15, 84, 92, 99):
        with torch.no_grad():
            model.weight.view(-1)[place] += 1
            assert fingerprint(model) != first, place
            model.weight.view(-1)[place] -= 1
    assert fingerprint(torch.nn.Linear(10, 10, dtype=torch.float64)) != first


def test_many_samples_are_resampled_by_percentiles():
    draw = np.random.default_rng(0)
    base, pruned = draw.exponential(size=1001), draw.exponential(size=1001) ** 2
    found = compare(base, pruned, seed=3)
    want = stats.bootstrap(
        (pruned - base,),
        np.mean,
        n_resamples=9999,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-12)
