"""Are stages found where there are some, and none where there are none? On series made by hand."""

import itertools
import math

import numpy as np
import pytest

from saint.lab.analysis import bootstrap, stages

SEEDS = pytest.mark.parametrize("seeds", [10, pytest.param(100, marks=pytest.mark.nightly)])  # draws of each series
ENOUGH = 95  # of them
IMAGES = 24
NAMES = ("key_similarity", "token_entropy", "cls_entropy", "received_entropy", "effective_rank", "residual_update")


def autocorrelated(rng, layers, count, rho):
    out = rng.standard_normal((layers, count))
    for t in range(1, layers):
        out[t] = rho * out[t - 1] + np.sqrt(1 - rho**2) * out[t]
    return out


def images(rng, curves, noise, rho=0.0):
    """Quantities by name, [n, L]: curves [L, Q], noise of the layers that no further image removes, and noise of images."""
    layers, count = curves.shape
    shared = curves + noise * autocorrelated(rng, layers, count, rho)
    values = shared + 0.3 * rng.standard_normal((IMAGES, layers, count))
    return {name: values[:, :, q] for q, name in enumerate(NAMES[:count])}


def verdict(rng, curves, noise, rho, seed):
    weight = bootstrap.weights(IMAGES, 100, seed)
    return stages.find_stages(images(rng, curves, noise, rho), weight, simulations=199, seed=seed)


def planted(rng, layers, count, edges):
    """Levels that jump by 1 to 2 at each edge, each quantity up or down as it likes."""
    jumps = rng.uniform(1, 2, (len(edges), count)) * rng.choice([-1, 1], (len(edges), count))
    curves = np.zeros((layers, count))
    for edge, jump in zip(edges, jumps, strict=True):
        curves[edge:] += jump
    return curves


# -- the parts ----------------------------------------------------------------------------------------------------------


def literal_cost(z, ends):
    """Sum of squares around the means of the runs between ``ends``, by loops."""
    total = 0.0
    for first, end in itertools.pairwise(ends):
        for q in range(z.shape[1]):
            values = [float(v) for v in z[first:end, q]]
            mean = sum(values) / len(values)
            total += sum((v - mean) ** 2 for v in values)
    return total


@pytest.mark.parametrize("layers", [8, 11])
def test_the_dynamic_programme_finds_the_best_of_all_segmentations(layers):
    z = np.random.default_rng(layers).standard_normal((3, layers, 2))
    found = stages.staircases(z)
    assert sorted(found) == [1, 2, 3, 4]
    for k, (rss, edges) in found.items():
        for s in range(3):
            best = min(
                (literal_cost(z[s], (0, *inner, layers)), inner)
                for inner in itertools.combinations(range(1, layers), k - 1)
                if all(b - a >= 2 for a, b in itertools.pairwise((0, *inner, layers)))
            )
            assert rss[s] == pytest.approx(best[0])
            assert tuple(edges[s]) == best[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_dynamic_programme_agrees_with_ruptures(seed):
    ruptures = pytest.importorskip("ruptures", reason="needs ruptures (extra dev)")
    rng = np.random.default_rng(seed)
    z = planted(rng, 24, 5, (6, 15)) + rng.standard_normal((24, 5))
    search = ruptures.Dynp(model="l2", min_size=2, jump=1).fit(z)
    for k, (rss, edges) in stages.staircases(z[None]).items():
        ends = search.predict(n_bkps=k - 1) if k > 1 else [24]
        assert [*edges[0].tolist(), 24] == ends
        assert rss[0] == pytest.approx(search.cost.sum_of_costs(ends))


def test_too_few_layers_have_fewer_segments():
    assert sorted(stages.staircases(np.zeros((1, 5, 1)))) == [1, 2]


def test_criteria_are_what_they_say():
    z = np.random.default_rng(3).standard_normal((1, 12, 2))
    got = stages.staircase_bic(z)
    for k, (rss, _) in stages.staircases(z).items():
        assert got[k][0] == pytest.approx(24 * math.log(rss[0] / 24 + 1e-4) + (2 * k + 2 * (k - 1)) * math.log(24))
    x = np.arange(12)
    residual = sum(((z[0, :, q] - np.polyval(np.polyfit(x, z[0, :, q], 1), x)) ** 2).sum() for q in range(2))
    assert stages.line_rss(z)[0] == pytest.approx(residual)


def test_more_segments_must_be_much_better():
    scores = {1: np.array([30.0, 0.0, 50.0]), 2: np.array([0.0, -9.0, 20.0]), 3: np.array([-9.0, -9.5, 9.0])}
    assert stages.fewest(scores).tolist() == [2, 1, 3]


def test_smooth_curves_fit_what_they_name():
    x = np.linspace(-1, 1, 14)
    curves = np.stack([2 * x, x**2 - x, x**3, x**4, 1 / (1 + np.exp(-(np.arange(14) - 6.5) / 2.4))], 1)
    found = stages.smooth(curves[None], fitted=True)
    assert found.parameters[0].tolist() == [2, 3, 4, 5, 4]
    assert (found.rss[0] / curves.var(0) < 0.01).all()
    assert np.abs(found.fit[0] - curves).max() < 0.05
    assert (stages.smooth(np.repeat([0.0, 1.0], 7)[None, :, None]).rss / 14 > 0.01).all()  # a step is not smooth


def test_the_sieve_knows_how_autocorrelated_the_noise_is():
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.6):
        found = [stages.sieve_null(autocorrelated(rng, 24, 6, rho), 10, 0)[1] for _ in range(30)]
        assert abs(np.mean(found) - rho) < 0.15


# -- verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "count", "edges", "noise"),
    [
        (12, 6, (4, 9), 0.25),
        (12, 6, (5,), 0.25),
        (12, 4, (4, 8), 0.15),
        (24, 6, (7, 16), 0.3),
        (24, 5, (4, 12, 19), 0.3),
        (32, 6, (16,), 0.3),
    ],
)
@SEEDS
def test_planted_stages_are_found(layers, count, edges, noise, seeds):
    right = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        found = verdict(rng, planted(rng, layers, count, edges), noise, 0.0, seed)
        right += found.shown and [b["layer"] for b in found.boundaries] == list(edges)
    assert right >= ENOUGH * seeds // 100


def line(t, rng):
    return t


def quadratic(t, rng):
    return 4 * (t - rng.uniform(0.2, 0.8)) ** 2


def logistic(t, rng):
    return 1 / (1 + np.exp(-rng.uniform(5, 9) * (t - rng.uniform(0.35, 0.65))))


def exponential(t, rng):
    return np.exp(-rng.uniform(1, 4) * t)


def wave(t, rng):
    return 0.5 * np.sin(np.pi * (1.2 * t + rng.uniform(0, 1)))


@pytest.mark.parametrize(("layers", "noise", "rho"), [(12, 0.05, 0.0), (12, 0.2, 0.0), (12, 0.2, 0.6), (24, 0.2, 0.6)])
@pytest.mark.parametrize("shape", [line, quadratic, logistic, exponential, wave])
@SEEDS
def test_a_smooth_trend_is_not_a_stage(shape, layers, noise, rho, seeds):
    t = np.linspace(0, 1, layers)
    shown = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        curves = np.stack([shape(t, rng) * rng.uniform(1, 2) * rng.choice([-1, 1]) for _ in range(6)], 1)
        shown += verdict(rng, curves, noise, rho, seed).shown
    assert shown <= seeds - ENOUGH * seeds // 100


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("layers", "count"), [(12, 6), (24, 6), (12, 2)])
@SEEDS
def test_noise_has_no_stages(layers, count, rho, seeds):
    shown = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        shown += verdict(rng, np.zeros((layers, count)), 1.0, rho, seed).shown
    assert shown <= seeds - ENOUGH * seeds // 100


def test_a_verdict_says_what_it_found():
    rng = np.random.default_rng(0)
    curves = np.zeros((12, 2))
    curves[4:, 0], curves[9:, 0] = -1.5, -3.0
    curves[4:, 1] = 2.0
    found = verdict(rng, curves, 0.1, 0.0, 0)
    assert found.verdict == "three stages, boundaries in front of layers 4 and 9"
    assert [(s["first"], s["last"]) for s in found.segments] == [(0, 3), (4, 8), (9, 11)]
    assert found.segments[0]["what"] == "similarity high, attention concentrated"
    assert found.segments[1]["what"] == "similarity falling, attention spreading"
    assert found.segments[2]["what"] == "similarity falling"
    assert found.segments[1]["means"]["token_entropy"] == pytest.approx(2.0, abs=0.2)
    assert all(b["low"] <= b["layer"] <= b["high"] for b in found.boundaries)
    assert found.criteria["bic"]["3"] < min(found.criteria["bic"][k] for k in ("1", "2", "4", "line", "smooth"))
    assert max(found.criteria["p_permutation"], found.criteria["p_smooth"]) <= stages.ALPHA
    assert not found.reasons


def test_a_verdict_of_not_shown_says_why():
    found = verdict(np.random.default_rng(0), np.linspace(0, 3, 12)[:, None] * np.ones(4), 0.05, 0.0, 0)
    assert found.verdict == "not shown"
    assert any("smooth curves fit better" in reason for reason in found.reasons)
    assert found.segments == found.boundaries == []
    assert found.criteria["bic"]["line"] < found.criteria["bic"]["4"]


def test_boundaries_that_hang_on_a_few_images_are_not_shown():
    """Three images of 24 have a step each, and large ones: a resample without one of them has a boundary less."""
    rng = np.random.default_rng(0)
    values = {}
    for name, sign in zip(NAMES, (1, -1, 1, -1, 1, 1), strict=True):
        value = 0.1 * rng.standard_normal((IMAGES, 12))
        for image, edge in enumerate((3, 6, 9)):
            value[image, edge:] += sign * 50
        values[name] = value
    found = stages.find_stages(values, bootstrap.weights(IMAGES, 200, 0), simulations=199)
    assert not found.shown
    assert found.criteria["agreement"] < stages.STABLE
    assert "resamples of the images agree" in found.reasons[-1]


def test_few_images_and_constant_or_missing_quantities():
    rng = np.random.default_rng(0)
    few = {"key_similarity": rng.standard_normal((3, 12))}
    assert "3 sample(s)" in stages.find_stages(few, bootstrap.weights(3, 10)).reasons[0]
    dull = {"key_similarity": np.ones((20, 12)), "cls_entropy": np.full((20, 12), np.nan)}
    assert stages.find_stages(dull, bootstrap.weights(20, 10)).reasons == ["no quantity changes over the layers"]
    values = images(rng, planted(rng, 12, 3, (4, 8)), 0.1) | {"held": np.ones((IMAGES, 12))}
    assert stages.find_stages(values, bootstrap.weights(IMAGES, 100), simulations=199).used == list(NAMES[:3])


@pytest.mark.parametrize(
    ("null", "reason"), [("sieve_null", "smooth curves with noise"), ("order_null", "in any other order")]
)
def test_each_null_can_refuse(null, reason, monkeypatch):
    rng = np.random.default_rng(0)
    values = images(rng, planted(rng, 12, 6, (4, 9)), 0.1)
    weight = bootstrap.weights(IMAGES, 100, 0)
    assert stages.find_stages(values, weight, simulations=199).shown
    often = np.where(np.arange(199) < 4, np.inf, -np.inf)  # 5 of 200
    monkeypatch.setattr(stages, null, lambda *_: (often, 0.0) if null == "sieve_null" else often)
    found = stages.find_stages(values, weight, simulations=199)
    assert not found.shown
    assert reason in found.reasons[0]
    assert "p = 0.025" in found.reasons[0]


@pytest.mark.parametrize("seed", range(12))
def test_orders_that_fit_as_well_count_whatever_rounding_says(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    values = images(rng, planted(rng, 12, 6, (4, 9)), 0.2)
    monkeypatch.setattr(stages, "order_null", lambda z, count, _: stages.gain(np.stack([z[::-1]] * count)))
    found = stages.find_stages(values, bootstrap.weights(IMAGES, 100, seed), simulations=9)
    assert found.criteria["p_permutation"] == 1
