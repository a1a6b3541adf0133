"""Percentile intervals over images, all from one set of resamples.

A resample is a weight per image (how often it was drawn, divided by the number of images), so the mean of any quantity under
all resamples is one matrix product, and statistics of several quantities are resampled together.

Letters: R resamples, n images, L layers.
"""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Mean over images and its 95 % percentile interval, arrays of one shape; low and high are NaN with one image."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def weights(count: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Resamples of ``count`` images with replacement, float64 [R, n]; rows sum to 1."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn / count


def resampled(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Means of ``values`` [n, ...] under each resample, [R, ...]. Images without a value (NaN) are left out of theirs."""
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = (weight @ np.where(there, flat, 0.0)) / (weight @ there)
    return out.reshape(len(weight), *values.shape[1:])


def interval(values: np.ndarray, weight: np.ndarray) -> Interval:
    """Mean of ``values`` [n, ...] over images, and the 2.5 % and 97.5 % quantiles of its resamples ``weight`` [R, n]."""
    mean = resampled(values, np.full((1, len(values)), 1 / len(values)))[0]
    return Interval(mean, *bounds(resampled(values, weight), len(values)))


def bounds(samples: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """2.5 % and 97.5 % quantiles over the resamples of a statistic [R, ...] of ``count`` images; one image says nothing."""
    if count < 2:
        nothing = np.full(samples.shape[1:], np.nan)
        return nothing, nothing
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return low, high
