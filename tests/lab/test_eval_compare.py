"""Paired comparison: against hand-computed values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from saint.lab.eval import compare
from saint.lab.eval.compare import detectable_binary, tango_interval

Z, Z80 = stats.norm.ppf(0.975), stats.norm.ppf(0.8)


def pairs(both, worse, better, neither):
    """0/1 scores with these numbers of samples."""
    base = [1] * both + [1] * worse + [0] * better + [0] * neither
    pruned = [1] * both + [0] * worse + [1] * better + [0] * neither
    return base, pruned


def test_right_or_wrong():
    result = compare(*pairs(60, 9, 2, 29))
    assert (result.n, result.better, result.worse) == (100, 2, 9)
    assert result.base == pytest.approx(0.69)
    assert result.pruned == pytest.approx(0.62)
    assert result.difference == pytest.approx(-0.07)
    # two tails of Binomial(11, 1/2) at 2: 2 * (1 + 11 + 55) / 2^11
    assert result.p_value == pytest.approx(2 * 67 / 2048)
    assert result.low < -0.07 < result.high
    assert result.method == "tango"


def test_the_score_interval_solves_its_equation():
    """The nuisance probability by a search over the likelihood instead of the closed form."""
    n, worse, better = 80, 11, 4

    def statistic(delta):
        q = np.linspace(max(0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)
        likelihood = better * np.log(q + delta) + worse * np.log(q) + (n - worse - better) * np.log(1 - 2 * q - delta)
        best = q[likelihood.argmax()]
        return ((better - worse) / n - delta) / math.sqrt((2 * best + delta * (1 - delta)) / n)

    low, high = tango_interval(better, worse, n, Z)
    assert statistic(low) == pytest.approx(Z, abs=1e-3)
    assert statistic(high) == pytest.approx(-Z, abs=1e-3)
    assert tango_interval(worse, better, n, Z) == pytest.approx((-high, -low))


def test_the_score_interval_at_the_edges():
    n = 50
    bound = Z**2 / (n + Z**2)
    assert tango_interval(0, 0, n, Z) == pytest.approx((-bound, bound))
    low, high = tango_interval(n, 0, n, Z)
    assert high == 1
    assert low == pytest.approx((n - Z**2) / (n + Z**2))
    assert tango_interval(0, 3, n, Z)[1] < 0.05


def test_the_score_interval_covers():
    rng = np.random.default_rng(0)
    n, worse, better = 60, 0.12, 0.05
    counts = rng.multinomial(n, [worse, better, 1 - worse - better], size=1500)
    inside = [low <= better - worse <= high for low, high in (tango_interval(c[1], c[0], n, Z) for c in counts)]
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize("psi", [0.05, 0.2])
def test_the_detectable_difference_is_detected_as_often_as_promised(psi):
    n = 4000  # enough that the counts are nearly continuous
    delta = detectable_binary(psi, n, Z, Z80)
    assert 0 < delta < psi
    assert delta * math.sqrt(n) == pytest.approx(Z * math.sqrt(psi) + Z80 * math.sqrt(psi - delta**2))
    rng = np.random.default_rng(1)
    worse, better = (psi + delta) / 2, (psi - delta) / 2
    counts = rng.multinomial(n, [worse, better, 1 - psi], size=20_000)
    b, c = counts[:, 0], counts[:, 1]
    shown = np.abs(b - c) > Z * np.sqrt(np.maximum(b + c, 1))  # McNemar's test without correction
    assert shown.mean() == pytest.approx(0.8, abs=0.02)


def test_no_discordance_is_no_proof_of_equality():
    result = compare([1] * 90 + [0] * 10, [1] * 90 + [0] * 10)
    assert (result.difference, result.p_value) == (0, 1)
    assert result.high == pytest.approx(Z**2 / (100 + Z**2))
    delta = result.detectable  # all discordance to one side: psi = delta
    assert delta * 10 == pytest.approx(Z * math.sqrt(delta) + Z80 * math.sqrt(delta - delta**2))
    assert compare([1, 1], [1, 1]).detectable is None  # two samples show nothing


def test_graded_scores_use_the_bootstrap():
    rng = np.random.default_rng(2)
    base = rng.uniform(0, 1, 200)
    pruned = base - 0.02 + rng.normal(0, 0.05, 200)
    result = compare(base, pruned)
    delta = pruned - base
    error = delta.std(ddof=1) / math.sqrt(200)
    assert result.method == "bootstrap_bca"
    assert result.p_value is None
    assert result.difference == pytest.approx(delta.mean())
    assert result.low == pytest.approx(delta.mean() - Z * error, abs=0.15 * error)
    assert result.high == pytest.approx(delta.mean() + Z * error, abs=0.15 * error)
    assert result.detectable == pytest.approx((Z + Z80) * error)
    assert compare(base, pruned) == result  # the same resamples each time
    assert compare(np.tile(base, 6), np.tile(pruned, 6)).method == "bootstrap_percentile"


def test_pairing_matters():
    """The same two lists, one of them shuffled: the difference stays, the interval grows."""
    rng = np.random.default_rng(3)
    base = (rng.uniform(size=300) < 0.6).astype(float)
    pruned = base.copy()
    pruned[:5] = 1 - pruned[:5]
    together, apart = compare(base, pruned), compare(base, rng.permutation(pruned))
    assert together.difference == pytest.approx(apart.difference)
    assert (apart.high - apart.low) > 4 * (together.high - together.low)


def test_one_sample_has_no_interval():
    result = compare([1], [0])
    assert (result.difference, result.low, result.high, result.detectable) == (-1, None, None, None)


@pytest.mark.parametrize(
    ("base", "pruned", "words"),
    [
        ([], [], "at least one"),
        ([1], [1, 0], "equally long"),
        ([float("nan")], [1], "finite"),
        ([0, 1], [1, float("nan")], "finite"),
        ([[1]], [[1]], "lists"),
    ],
)
def test_bad_scores(base, pruned, words):
    with pytest.raises(ValueError, match=words):
        compare(base, pruned)


def test_bad_confidence():
    with pytest.raises(ValueError, match="confidence"):
        compare([1], [1], confidence=95)
