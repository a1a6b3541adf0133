"""How alike the attention keys of a layer are: the similarities that the voting graph of SAINT works on.

Letters: N candidates, M text tokens, D head dim, T thresholds.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph import metric

_BLOCK = 2**20  # cosines held at once (4 MiB); all pairs of a long sequence never are


def key_similarity(keys: Tensor, *, center: bool = False) -> float:
    """Mean of the bipartite cosine matrix, even positions against odd ones: ``mean_ij S_ij``, S_ij = cos(k_2i, k_2j+1).

    Source: development code of the authors of SAINT, protected tokens excluded. The mean over all pairs is the product of the
    mean unit keys, so no matrix is made.

    Args:
        keys: head-mean keys of the candidates of one image, [N, D].
        center: subtract their mean first.

    Returns:
        A cosine in [-1, 1]; NaN with fewer than two candidates.
    """
    if len(keys) < 2:
        return math.nan
    points = metric(keys[None], center=center)[0].double()
    return float(points[0::2].mean(0) @ points[1::2].mean(0))


def cross_similarity(visual: Tensor, text: Tensor) -> float:
    """Mean cosine between visual keys [N, D] and text keys [M, D]: ``mean_ij cos(v_i, t_j)``; NaN where one is empty.

    Not in the authors' code: the text-visual counterpart of :func:`key_similarity`.
    """
    if not len(visual) or not len(text):
        return math.nan
    a, b = (metric(keys[None])[0].double().mean(0) for keys in (visual, text))
    return float(a @ b)


def droppable(keys: Tensor, thresholds: Sequence[float], neighbors: int = 5, *, center: bool = False) -> list[float]:
    """Share of sources that would vote to go: ``mean_i [c_i >= K]``, c_i = number of targets with S_ij >= threshold.

    This is the vote of SAINT (the authors' code: at least K), of all even positions; at most half of the candidates are sources.
    Cosines are computed in blocks of sources.

    Args:
        keys: head-mean keys of the candidates of one image, [N, D].
        thresholds: T cosines.
        neighbors: K.
        center: as in :class:`saint.Saint`.

    Returns:
        T shares in [0, 1]; NaN without candidates.
    """
    if not len(keys):
        return [math.nan] * len(thresholds)
    points = metric(keys[None], center=center)[0]
    sources, targets = points[0::2], points[1::2]
    votes = torch.zeros(len(thresholds), dtype=torch.long, device=keys.device)
    for block in sources.split(max(1, _BLOCK // max(1, len(targets)))):
        cosines = block @ targets.T
        for place, threshold in enumerate(thresholds):
            votes[place] += ((cosines >= threshold).sum(1) >= neighbors).sum()
    return (votes / len(sources)).tolist()
