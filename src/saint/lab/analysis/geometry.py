"""The shape of the residual stream of a layer: rank, norms, updates, and how much two layers resemble each other.

Letters: N candidates, C channels, S points of the residual stream, m tokens that are compared.
"""

import math

import torch
from torch import Tensor

OUTLIER = 3.0  # a norm of more than so many medians


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values: ``exp(-sum_i p_i ln p_i)``, p_i = s_i / sum s (Roy and Vetterli, 2007).

    Of the candidates' features minus their mean; a number of dimensions between 1 and min(N - 1, C). Singular values are the
    roots of the eigenvalues of the smaller Gram matrix, in float64.

    Args:
        features: of one image, [N, C].

    Returns:
        NaN where all features are equal.
    """
    x = features.double()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    values = torch.where(values > values[-1] * 1e-12, values, 0.0).sqrt()  # what rounding leaves of a zero has no root
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else math.nan


def residual_update(before: Tensor, after: Tensor) -> float:
    """Tell how much a layer changes its tokens: ``mean_i ||x'_i - x_i|| / ||x_i||``; before and after [N, C]."""
    x, y = before.float(), after.float()
    change = torch.linalg.vector_norm(y - x, dim=-1) / torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12)
    return float(change.mean())


def outliers(features: Tensor, factor: float = OUTLIER) -> float:
    """Share of tokens with ``||x_i|| > factor * median_j ||x_j||``; features [N, C].

    High-norm tokens after Darcet et al. (2024), whose cut is absolute and fits one model; a multiple of the median fits any.
    """
    norms = torch.linalg.vector_norm(features.float(), dim=-1)
    return float((norms > factor * norms.median()).float().mean())


def spread(count: int, most: int) -> list[int]:
    """``most`` of ``count`` places, evenly spaced; all where there are no more."""
    if count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]


def gram(features: Tensor) -> Tensor:
    """Linear kernel of m tokens without its diagonal, ``K_ij = x_i . x_j``, K_ii = 0: features [m, C] -> float32 [m, m].

    Features are centred and scaled to unit total variance first: CKA does not see either, and rounding does.
    """
    x = features.float()
    x = x - x.mean(0)
    x = x / torch.linalg.vector_norm(x).clamp_min(1e-12)
    return (x @ x.T).fill_diagonal_(0.0)


def hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs of points of the residual stream, for one image (Song et al., 2012, eq. 5)::

        HSIC(K, L) = [tr(KL) + 1'K1 1'L1 / ((m-1)(m-2)) - 2 / (m-2) 1'KL1] / (m (m-3))

    Means over images of HSIC, each image a minibatch, give the CKA of all of them (:func:`cka`; Nguyen et al., 2021), so neither
    features nor kernels of several images are held.

    Args:
        grams: kernels with zero diagonals, [S, m, m].

    Returns:
        float64 [S, S]; NaN with m < 4.
    """
    points, m = grams.shape[:2]
    if m < 4:
        return torch.full((points, points), torch.nan, dtype=torch.float64)
    k = grams.double().flatten(1)
    sums = grams.double().sum(2)  # [S, m]
    total = sums.sum(1)
    value = k @ k.T + total.outer(total) / ((m - 1) * (m - 2)) - 2 / (m - 2) * (sums @ sums.T)
    return (value / (m * (m - 3))).cpu()


def cka(mean_hsic: Tensor) -> Tensor:
    """Linear CKA of all pairs: ``HSIC_kl / sqrt(HSIC_kk HSIC_ll)`` (Kornblith et al., 2019), from means over images.

    Args:
        mean_hsic: [..., S, S].

    Returns:
        [..., S, S], at most about 1; the diagonal is 1.
    """
    own = mean_hsic.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return mean_hsic / (own.unsqueeze(-1) * own.unsqueeze(-2))
