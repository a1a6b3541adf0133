"""Paired comparison of two sets of scores on the same samples: the difference, its interval, and what could have been seen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...extras import require

_RESAMPLES = 9999
_SAME = 1e-9  # relative spread of values that are equal but for rounding


@dataclass(frozen=True)
class Paired:
    """Pruned against base on the same ``n`` samples.

    Attributes:
        n: samples.
        base, pruned: mean scores.
        difference: pruned - base.
        low, high: confidence interval of the difference; None with fewer than two samples.
        confidence: of the interval, a fraction.
        method: how the interval was made.
        p_value: exact McNemar test of "no difference" (0/1 scores only).
        better, worse: samples on which the pruned model scores higher, lower.
        detectable: smallest true difference (absolute value) that n samples like these show with ``power`` at a two-sided
            level of 1 - ``confidence``; None where it is undefined.
        power: probability behind ``detectable``, a fraction.
    """

    n: int
    base: float
    pruned: float
    difference: float
    low: float | None
    high: float | None
    confidence: float
    method: str
    p_value: float | None
    better: int
    worse: int
    detectable: float | None
    power: float


def compare(
    base: Sequence[float], pruned: Sequence[float], confidence: float = 0.95, power: float = 0.8, seed: int = 0
) -> Paired:
    """Difference of the means of paired scores.

    Where every difference is -1, 0 or 1 and scores lie in [0, 1] (right or wrong), the interval is Tango's score interval
    (Statistics in Medicine 17, 1998) and the p-value that of the exact McNemar test: of the b + c discordant samples, c (only
    pruned is right) follow Binomial(b + c, 1/2). Otherwise the interval is a bootstrap of the mean difference: bias-corrected
    and accelerated up to 1000 samples, percentiles above.

    ``detectable``: with the share of discordant samples psi and z = z(1 - alpha/2), it solves
    ``delta * sqrt(n) = z * sqrt(psi) + z(power) * sqrt(psi - delta^2)`` (Connor, Biometrics 43, 1987); where psi is smaller
    than that delta, psi = delta: at best all discordant samples point the same way. For other scores it is
    ``(z + z(power)) * sd(differences) / sqrt(n)``.

    Args:
        base: scores of the unpruned model, one per sample.
        pruned: those of the pruned model, in the same order.
        confidence: of the interval, in (0, 1).
        power: in (0, 1).
        seed: of the bootstrap.

    Raises:
        ValueError: different lengths, no samples, or a score that is not finite.
        MissingExtraError: scipy is not installed.

    Example:
        >>> result = compare([1, 1, 0, 1], [1, 0, 0, 1])
        >>> result.difference, result.worse, result.p_value
        (-0.25, 1, 1.0)
    """
    stats = require("scipy.stats", "eval")

    if not (0 < confidence < 1 and 0 < power < 1):
        raise ValueError(f"confidence and power must lie in (0, 1), got {confidence} and {power}")
    a, b = np.asarray(base, dtype=np.float64), np.asarray(pruned, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"needs two equally long lists with at least one score, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("every score must be a finite number")
    n, delta = len(a), b - a
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    z_power = float(stats.norm.ppf(power))
    binary = bool(np.isin(delta, (-1, 0, 1)).all() and min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) <= 1)
    low = high = p_value = detectable = None
    if binary:
        method = "tango"
        p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        if n > 1:
            low, high = tango_interval(better, worse, n, z)
            detectable = detectable_binary((better + worse) / n, n, z, z_power)
    else:
        method = "bootstrap_bca" if n <= 1000 else "bootstrap_percentile"
        if n > 1 and np.ptp(delta) > 0:
            interval = stats.bootstrap(
                (delta,), np.mean, n_resamples=_RESAMPLES, batch=max(1, 10**7 // n), confidence_level=confidence,
                method="BCa" if n <= 1000 else "percentile", rng=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
            low, high = float(interval.low), float(interval.high)
            detectable = (z + z_power) * float(delta.std(ddof=1)) / math.sqrt(n)
    return Paired(
        n, float(a.mean()), float(b.mean()), float(delta.mean()), low, high, confidence, method, p_value, better, worse,
        detectable, power,
    )  # fmt: skip


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Confidence interval of a mean: Wilson's of a share, where every value is 0 or 1, else the bootstrap of :func:`compare`.

    Args:
        values: one per sample.
        confidence: in (0, 1).

    Returns:
        Its ends; None of fewer than two values, and where all are equal (but for rounding) and no share.

    Example:
        >>> [round(end, 3) for end in mean_interval([1, 1, 1, 0])]
        [0.301, 0.954]
    """
    if len(values) < 2:
        return None, None
    if set(values) <= {0, 1}:
        found = require("scipy.stats", "eval").binomtest(int(sum(values)), len(values))
        ends = found.proportion_ci(confidence, method="wilson")
        return float(ends.low), float(ends.high)
    if np.ptp(np.asarray(values)) <= _SAME * max(map(abs, values)):
        return None, None
    apart = compare([0.0] * len(values), values, confidence)
    return apart.low, apart.high


def tango_interval(better: int, worse: int, n: int, z: float) -> tuple[float, float]:
    """Tango's score interval of a difference of paired proportions.

    The bounds are the differences ``delta`` at which the score statistic
    ``((c - b)/n - delta) / sqrt((2q + delta(1 - delta))/n)`` is ``+-z``, where q is the maximum-likelihood estimate of the
    probability of "only base is right" given ``delta``: the larger root of
    ``2n q^2 + (delta(2n + b - c) - b - c) q - b delta (1 - delta) = 0``.

    Args:
        better: c, samples on which only the pruned model is right.
        worse: b, samples on which only the base model is right.
        n: all samples.
        z: normal quantile, e.g. 1.96.

    Returns:
        Lower and upper bound. With no discordant sample: ``+-z^2 / (n + z^2)``.
    """
    estimate = (better - worse) / n

    def statistic(delta: float) -> float:
        linear = delta * (2 * n + worse - better) - worse - better
        root = math.sqrt(max(0.0, linear**2 + 8 * n * worse * delta * (1 - delta)))
        variance = 2 * (root - linear) / (4 * n) + delta * (1 - delta)
        return (estimate - delta) / math.sqrt(max(variance, 1e-300) / n)

    tiny = 1e-12
    low = -1.0 if estimate <= -1 + tiny else _root(lambda d: statistic(d) - z, -1 + tiny, estimate)
    high = 1.0 if estimate >= 1 - tiny else _root(lambda d: statistic(d) + z, estimate, 1 - tiny)
    return low, high


def detectable_binary(discordant: float, n: int, z: float, z_power: float) -> float | None:
    """Smallest difference of paired proportions that ``n`` samples show; the formula is that of :func:`compare`.

    Args:
        discordant: psi, the observed share of samples on which exactly one model is right.
        n: samples.
        z: normal quantile of the two-sided level.
        z_power: normal quantile of the power.

    Returns:
        A difference in (0, 1]; None where not even a difference of 1 would be shown.
    """

    def lacking(delta: float) -> float:
        psi = max(discordant, delta)
        return delta * math.sqrt(n) - z * math.sqrt(psi) - z_power * math.sqrt(max(0.0, psi - delta**2))

    return _root(lacking, 1e-9, 1.0) if lacking(1.0) > 0 else None


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy import optimize

    if low >= high or function(low) * function(high) > 0:  # the statistic jumps at the estimate where its variance is 0
        return high if abs(function(high)) < abs(function(low)) else low
    found: Any = optimize.brentq(function, low, high, xtol=1e-10)
    return float(found)
