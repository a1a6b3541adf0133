"""Do layers fall into stages? Piecewise-constant curves against smooth ones.

A *stage* is a run of layers on which all quantities stay about the same, and at whose ends they jump together. Curves over
layers are short (12 to 32 points), correlated from layer to layer, and mostly drift: a staircase with a few steps follows any
drift, so a good staircase is no evidence. Evidence is that it beats, by BIC, everything smooth: straight line, polynomials and
slow logistic curves, chosen for each quantity on its own; that it does so by more than smooth curves with autocorrelated
noise of the same kind would by chance (a sieve bootstrap), and by more than the same layers in any other order would; and that
its boundaries stay when the images are drawn again. All of them, or the verdict is "not shown".

Letters: S series, L layers, Q quantities, K segments, n images, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from .bootstrap import resampled

MOST = 4  # segments
SHORTEST = 2  # layers of a segment: one layer that differs is an outlier, not a stage
IMAGES = 8  # fewer say nothing about how stable a boundary is
ALPHA = 0.01  # of both tests; two of them, and a verdict that is to be wrong less than once in twenty times
MARGIN = 10.0  # of BIC, by which more segments must be better: "very strong" evidence (Kass and Raftery, 1995)
STABLE = 0.8  # share of the resamples that must agree
_FLOOR = 1e-4  # variance below which a fit of z-scored curves counts as exact


# -- fits ---------------------------------------------------------------------------------------------------------------


def segment_costs(z: np.ndarray) -> np.ndarray:
    """Sum of squares around the mean of each run of layers, all quantities together.

    Args:
        z: [S, L, Q].

    Returns:
        [S, L + 1, L + 1]; entry i, j is of layers i..j-1, infinite where that is shorter than a segment may be.
    """
    count, layers, _ = z.shape
    sums = np.concatenate([np.zeros((count, 1, z.shape[2])), z.cumsum(1)], 1)
    squares = np.concatenate([np.zeros((count, 1)), (z**2).sum(2).cumsum(1)], 1)
    inner = sums @ sums.transpose(0, 2, 1)
    own = np.einsum("sii->si", inner)
    length, short = _lengths(layers)
    total = own[:, None, :] + own[:, :, None] - 2 * inner  # |sum over i..j-1|^2
    cost = np.maximum(squares[:, None, :] - squares[:, :, None] - total / length, 0.0)
    cost[:, short] = np.inf
    return cost


@lru_cache(maxsize=64)
def _lengths(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Layers from i to j, at least 1 [L + 1, L + 1], and whether they are too few for a segment."""
    length = np.arange(layers + 1) - np.arange(layers + 1)[:, None]
    return np.maximum(length, 1).astype(float), length < SHORTEST


def staircases(z: np.ndarray, most: int = MOST) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The best segmentations into 1..``most`` segments: exact dynamic programming, L2 cost (Bai and Perron, 2003).

    Args:
        z: [S, L, Q].
        most: segments.

    Returns:
        By K: the residual sum of squares [S], and the boundaries [S, K - 1], a boundary being the first layer of a segment.
        Numbers of segments for which there are too few layers are left out.
    """
    cost = segment_costs(z)
    count, layers = z.shape[:2]
    best, back = cost[:, 0], []
    found = {1: (best[:, -1], np.zeros((count, 0), dtype=int))}
    for k in range(2, most + 1):
        if k * SHORTEST > layers:
            break
        total = best[:, :, None] + cost  # [S, i, j]
        back.append(total.argmin(1))
        best = np.take_along_axis(total, back[-1][:, None], 1)[:, 0]
        ends, bounds = np.full(count, layers), []
        for step in reversed(back):
            ends = step[np.arange(count), ends]
            bounds.append(ends)
        found[k] = best[:, -1], np.stack(bounds[::-1], 1)
    return found


@lru_cache(maxsize=64)
def _polynomials(layers: int) -> np.ndarray:
    """Orthonormal polynomials up to the fourth degree, by degree, [L, columns]; two layers more than parameters at least."""
    degrees = [degree for degree in range(5) if degree < 2 or degree + 2 < layers]
    return np.linalg.qr(np.vander(np.linspace(-1, 1, layers), len(degrees), increasing=True))[0]


@lru_cache(maxsize=64)
def _logistics(layers: int) -> np.ndarray:
    """Slow logistic curves of unit length and without their mean, [L, members].

    The change takes at least a quarter of the layers from a tenth to nine tenths: anything faster is a step.
    """
    slowest = layers / 4 / (2 * np.log(9))
    middles = np.arange(0, layers - 0.5, 0.5)[:, None]
    widths = slowest * np.array([1.0, 1.5, 2.25, 3.5])
    away = (np.arange(layers)[:, None, None] - middles) / widths
    curves = 1 / (1 + np.exp(-away.reshape(layers, -1)))
    curves -= curves.mean(0)
    return curves / np.linalg.norm(curves, axis=0)


@dataclass(frozen=True)
class Smooth:
    """The best smooth curve of each quantity: residual sum of squares and parameters, [S, Q]; fitted curves [S, L, Q]."""

    rss: np.ndarray
    parameters: np.ndarray
    fit: np.ndarray | None = None


def smooth(z: np.ndarray, *, fitted: bool = False) -> Smooth:
    """Per series and quantity, the family with the least ``L ln(RSS / L) + p ln L``; z [S, L, Q]."""
    count, layers, quantities = z.shape
    flat = z.transpose(0, 2, 1).reshape(-1, layers)  # [S Q, L]
    squares = (flat**2).sum(1)
    basis, logistics = _polynomials(layers), _logistics(layers)
    along = flat @ basis
    explained = (along**2).cumsum(1)  # by degree
    curve = np.abs(flat @ logistics)
    member = curve.argmax(1)
    steep = curve[np.arange(len(flat)), member]
    rss = np.column_stack([squares[:, None] - explained[:, 1:], squares - explained[:, 0] - steep**2]).clip(0.0)
    parameters = np.array([*range(2, basis.shape[1] + 1), 4])  # of the logistic curve: two levels, middle and width
    choice = (layers * np.log(rss / layers + _FLOOR) + parameters * np.log(layers)).argmin(1)
    shape = (count, quantities)
    best = rss[np.arange(len(flat)), choice].reshape(shape), parameters[choice].reshape(shape)
    if not fitted:
        return Smooth(*best)
    polynomial = (along * (np.arange(basis.shape[1]) <= choice[:, None] + 1)) @ basis.T
    slope = (flat * logistics.T[member]).sum(1)
    logistic = along[:, :1] * basis[:, 0] + slope[:, None] * logistics.T[member]
    fit = np.where((choice == len(parameters) - 1)[:, None], logistic, polynomial)
    return Smooth(*best, fit.reshape(count, quantities, layers).transpose(0, 2, 1))


def bic(rss: np.ndarray, parameters: np.ndarray | int, size: int) -> np.ndarray:
    """``n ln(RSS / n) + p ln n`` of n = L Q numbers with one variance."""
    return size * np.log(np.asarray(rss) / size + _FLOOR) + np.asarray(parameters) * np.log(size)


def line_rss(z: np.ndarray) -> np.ndarray:
    """Residual sum of squares of straight lines, [S]."""
    basis = _polynomials(z.shape[1])[:, :2]
    return (z**2).sum((1, 2)) - ((basis.T @ z) ** 2).sum((1, 2))


def staircase_bic(
    z: np.ndarray, found: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None
) -> dict[int, np.ndarray]:
    """BIC of the best staircase by K, [S]; z [S, L, Q]; ``found``: its :func:`staircases`, where they are known.

    A boundary counts as two parameters: the search for its place fits more than one number does (Zhang and Siegmund, 2007).
    """
    size, quantities = z.shape[1] * z.shape[2], z.shape[2]
    return {k: bic(rss, k * quantities + 2 * (k - 1), size) for k, (rss, _) in (found or staircases(z)).items()}


def fewest(scores: Mapping[int, np.ndarray]) -> np.ndarray:
    """The least K whose BIC no other undercuts by more than ``MARGIN``: [S] by K -> [S]."""
    stacked = np.stack(list(scores.values()))
    return np.array(list(scores))[(stacked <= stacked.min(0) + MARGIN).argmax(0)]


def smooth_bic(z: np.ndarray) -> np.ndarray:
    """BIC of the best smooth curves, [S]; z [S, L, Q]."""
    curves = smooth(z)
    return bic(curves.rss.sum(1), curves.parameters.sum(1), z.shape[1] * z.shape[2])


def advantage(z: np.ndarray) -> np.ndarray:
    """By how much BIC prefers the best staircase of two segments or more to the best smooth curves, [S]; z [S, L, Q]."""
    return smooth_bic(z) - np.stack([value for k, value in staircase_bic(z).items() if k > 1]).min(0)


def gain(z: np.ndarray) -> np.ndarray:
    """By how much BIC prefers the best staircase of two segments or more to no step at all, [S]; z [S, L, Q]."""
    found = staircase_bic(z)
    return found[1] - np.stack([value for k, value in found.items() if k > 1]).min(0)


# -- nulls --------------------------------------------------------------------------------------------------------------


def _autocorrelation(residual: np.ndarray) -> np.ndarray:
    """Lag-one autocorrelation of residuals, all quantities together: [S, L, Q] -> [S]."""
    return (residual[:, 1:] * residual[:, :-1]).sum((1, 2)) / np.maximum((residual**2).sum((1, 2)), 1e-12)


def _noise(shape: tuple[int, int, int], rho: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary AR(1) series of unit variance, [S, L, Q]."""
    e = rng.standard_normal(shape)
    out = np.empty(shape)
    out[:, 0] = e[:, 0]
    for t in range(1, shape[1]):
        out[:, t] = rho * out[:, t - 1] + np.sqrt(1 - rho**2) * e[:, t]
    return out


_RHO = np.array([0.0, 0.2, 0.4, 0.6, 0.75, 0.9])


@lru_cache(maxsize=64)
def _bias(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what smooth fits leave of autocorrelations ``_RHO`` and of the noise's variance: they absorb much of slow noise."""
    rng = np.random.default_rng(0)
    seen, left = [], []
    for rho in _RHO:
        x = _noise((300, layers, 1), float(rho), rng)
        residual = x - smooth(x, fitted=True).fit
        seen.append((residual[:, 1:] * residual[:, :-1]).sum() / (residual**2).sum())
        left.append((residual**2).mean())
    return np.maximum.accumulate(seen), np.array(left)


def sieve_null(z: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, float]:
    """:func:`advantage` of series that have no stages: the smooth fit of ``z`` [L, Q], and AR(1) noise like its residual.

    The autocorrelation is corrected for what smooth fits absorb; the noise keeps the correlation between quantities.

    Returns:
        [count], and the autocorrelation.
    """
    layers, quantities = z.shape
    curves = smooth(z[None], fitted=True)
    assert curves.fit is not None
    residual = z - curves.fit[0]
    seen, left = _bias(layers)
    found = float(_autocorrelation(residual[None])[0])
    rho = float(np.interp(found, seen, _RHO))
    scale = np.sqrt(1 / np.interp(rho, _RHO, left))
    covariance = residual.T @ residual / layers
    values, vectors = np.linalg.eigh(covariance)
    mix = vectors * np.sqrt(np.maximum(values, 0)) * scale
    rng = np.random.default_rng(seed)
    return advantage(curves.fit + _noise((count, layers, quantities), rho, rng) @ mix.T), rho


def order_null(z: np.ndarray, count: int, seed: int) -> np.ndarray:
    """:func:`gain` with the layers of ``z`` [L, Q] in random orders, [count]."""
    rng = np.random.default_rng(seed)
    return gain(z[np.stack([rng.permutation(len(z)) for _ in range(count)])])


# -- the verdict --------------------------------------------------------------------------------------------------------

# how a change of a quantity from one segment to the next is said: of what, up, down, and its levels in a first segment
WORDS = {
    "key_similarity": ("similarity", "rising", "falling", "high", "low"),
    "token_entropy": ("attention", "spreading", "concentrating", "spread", "concentrated"),
    "cls_entropy": ("attention of CLS", "spreading", "concentrating", "spread", "concentrated"),
    "last_entropy": ("attention of the last token", "spreading", "concentrating", "spread", "concentrated"),
    "received_entropy": ("received attention", "spreading", "concentrating", "spread", "concentrated"),
    "effective_rank": ("rank", "rising", "falling", "high", "low"),
    "residual_update": ("updates", "growing", "shrinking", "large", "small"),
}
_SEEN = 0.5  # standard deviations over layers that a mean must move to be said
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Stages:
    """The verdict on a stack of layers.

    Attributes:
        verdict: "K stages, boundaries in front of layers ..." or "not shown".
        shown: whether there are stages.
        reasons: why not; empty where they are shown.
        used: names of the quantities.
        segments: ``first`` and ``last`` layer, ``what`` it is like, ``means`` of the quantities; of shown stages only.
        boundaries: ``layer`` that begins a segment, and ``low`` and ``high`` of its 95 % interval; of shown stages only.
        criteria: the figures that decide.
    """

    verdict: str
    shown: bool
    reasons: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    boundaries: list[dict[str, int]] = field(default_factory=list)
    criteria: dict[str, Any] = field(default_factory=dict)


def find_stages(
    values: Mapping[str, np.ndarray], weight: np.ndarray, *, simulations: int = 499, seed: int = 0
) -> Stages:
    """Tell whether quantities over layers fall into stages.

    Args:
        values: by name, a number per image and layer, [n, L]. A quantity that is constant or missing somewhere is left out.
        weight: resamples of the images, [R, n], of :func:`saint.lab.analysis.bootstrap.weights`.
        simulations: of smooth curves; twice as many orders of the layers, of which some are ties (within a segment, reversed).
        seed: of them.

    Returns:
        The :class:`Stages`.
    """
    curves = {name: v.mean(0) for name, v in values.items() if np.isfinite(v).all()}
    used = [name for name, curve in curves.items() if curve.std() > 1e-9 * max(1e-9, np.abs(curve).max())]
    if not used:
        return Stages("not shown", False, ["no quantity changes over the layers"])
    count, layers = values[used[0]].shape
    if count < IMAGES or layers < 3 * SHORTEST:
        why = f"{count} sample(s) and {layers} layers are too few: at least {IMAGES} and {3 * SHORTEST} are needed"
        return Stages("not shown", False, [why], used)
    everything = np.stack([values[name] for name in used], 2)  # [n, L, Q]
    z = _scored(everything.mean(0))[None]
    found = staircases(z)
    steps, smoothly = staircase_bic(z, found), float(smooth_bic(z)[0])
    best = int(fewest(steps)[0])
    line = float(bic(line_rss(z), 2 * len(used), layers * len(used))[0])
    null, rho = sieve_null(z[0], simulations, seed)
    p_smooth = _p(null, float(advantage(z)[0]))
    p_order = _p(order_null(z[0], 2 * simulations + 1, seed + 1), float(gain(z)[0]))
    criteria: dict[str, Any] = {
        "bic": {**{str(k): float(v[0]) for k, v in steps.items()}, "line": line, "smooth": smoothly},
        "p_permutation": p_order,
        "p_smooth": p_smooth,
        "autocorrelation": rho,
        "alpha": ALPHA,
        "images": count,
    }
    reasons = []
    if best == 1:
        reasons.append("BIC sees no step")
    elif min(smoothly, line) <= float(steps[best][0]):
        rivals = f"BIC {min(smoothly, line):.0f} against {float(steps[best][0]):.0f}"
        reasons.append(f"smooth curves fit better than the best staircase ({rivals})")
    if p_order > ALPHA:
        reasons.append(f"layers in any other order give as good a staircase (p = {p_order:.3f})")
    if p_smooth > ALPHA:
        reasons.append(f"smooth curves with noise like this give as good a staircase (p = {p_smooth:.3f})")
    if best > 1:
        edges = found[best][1][0]
        redrawn = _scored(resampled(everything, weight))
        agree, low, high = _stability(redrawn, best, edges)
        criteria["agreement"] = agree
        if agree < STABLE:
            reasons.append(f"resamples of the images agree in {agree:.0%} only (number and place of the boundaries)")
    if reasons:
        return Stages("not shown", False, reasons, used, criteria=criteria)
    boundaries = [{"layer": int(e), "low": int(a), "high": int(b)} for e, a, b in zip(edges, low, high, strict=True)]
    where = " and ".join(str(e) for e in edges) if best < 4 else f"{edges[0]}, {edges[1]} and {edges[2]}"
    verdict = f"{_NUMBERS[best]} stages, {'boundary' if best == 2 else 'boundaries'} in front of layer{'s' * (best > 2)} {where}"
    segments = _described(used, everything, z[0], weight, [0, *edges.tolist(), layers])
    return Stages(verdict, True, [], used, segments, boundaries, criteria)


def _scored(curves: np.ndarray) -> np.ndarray:
    """Each quantity with mean 0 and standard deviation 1 over the layers, [..., L, Q]."""
    return (curves - curves.mean(-2, keepdims=True)) / np.maximum(curves.std(-2, keepdims=True), 1e-12)


def _p(null: np.ndarray, seen: float) -> float:
    """Share of the null that reaches what was seen, itself included; rounding breaks no tie (an order reversed, say)."""
    return float((1 + (null >= seen - 1e-9 * max(1.0, abs(seen))).sum()) / (1 + len(null)))


def _stability(z: np.ndarray, best: int, edges: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Share of the resamples z [R, L, Q] with ``best`` segments and every boundary within a layer; intervals of boundaries."""
    found = staircases(z)
    places = found[best][1]  # [R, best - 1]
    same = (fewest(staircase_bic(z, found)) == best) & (np.abs(places - edges) <= 1).all(1)
    low, high = np.quantile(places, [0.025, 0.975], axis=0, method="nearest")
    return float(same.mean()), low, high


def _described(
    used: Sequence[str], everything: np.ndarray, z: np.ndarray, weight: np.ndarray, ends: Sequence[int]
) -> list[dict[str, Any]]:
    """Segments by their measured properties: levels of the first, changes of the others, where images agree about them."""
    out: list[dict[str, Any]] = []
    redrawn = resampled(everything, weight)  # [R, L, Q]
    for number, (first, end) in enumerate(pairwise(ends)):
        words = []
        for q, name in enumerate(used):
            if name not in WORDS:
                continue
            what, up, down, high, low = WORDS[name]
            level = z[first:end, q].mean()
            if number == 0:
                moved, rising, falling = level, high, low
            else:
                before = ends[number - 1]
                moved, rising, falling = level - z[before:first, q].mean(), up, down
                change = redrawn[:, first:end, q].mean(1) - redrawn[:, before:first, q].mean(1)
                if np.quantile(change, 0.025) <= 0 <= np.quantile(change, 0.975):
                    continue
            if abs(moved) >= _SEEN:
                words.append(f"{what} {rising if moved > 0 else falling}")
        means = {name: float(everything[:, first:end, q].mean()) for q, name in enumerate(used)}
        what = ", ".join(words) or ("no marked level" if number == 0 else "no marked change")
        out.append({"first": int(first), "last": int(end) - 1, "what": what, "means": means})
    return out
