"""Scores per sample: distributions against one another, features against labels. Pure functions."""

from typing import Any

import torch
from torch import Tensor

from ...extras import require

# -- distributions ----------------------------------------------------------------------------------------------------


def kl_divergence(base: Tensor, pruned: Tensor) -> Tensor:
    """KL(base || pruned) of two categorical distributions, in nats.

    Args:
        base, pruned: logits [B, C]; computed in float64. A class that base rules out (-inf) adds nothing.

    Returns:
        [B], float64, infinite where pruned rules out what base does not.
    """
    log_p, log_q = base.double().log_softmax(-1), pruned.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0)


# -- features ---------------------------------------------------------------------------------------------------------


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k highest logits.

    Args:
        logits: [B, C].
        labels: [B], class indices.
        k: at most C counts; with fewer classes every sample is a hit.

    Returns:
        bool [B].
    """
    return (logits.topk(min(k, logits.shape[-1]), -1).indices == labels[:, None]).any(-1)


def knn(features: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Leave-one-out k-nearest-neighbour classification by cosine.

    The majority of the k nearest other samples wins; of equally frequent classes the one with the nearer neighbours.

    Args:
        features: [N, C].
        labels: [N], class indices.
        k: neighbours; at most N - 1 are there.

    Returns:
        bool [N], whether each sample got its own label.

    Raises:
        ValueError: fewer than two samples.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"nearest neighbours need at least two samples, got {count}")
    k = min(k, count - 1)
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    weight = 1 + 0.01 * 0.5 ** torch.arange(k)  # a tie-break: the sum of the second terms stays below one vote
    right = torch.empty(count, dtype=torch.bool)
    for start in range(0, count, 1024):
        rows = torch.arange(start, min(start + 1024, count))
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        near = labels[similarity.topk(k, -1).indices]
        votes = torch.zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, near, weight.expand(len(rows), k).contiguous())
        right[rows] = votes.argmax(-1) == labels[rows]
    return right


def linear_probe(features: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Logistic regression on standardised features.

    Args:
        features: [N, C].
        labels: [N], class indices.
        test: bool [N]; the others train.

    Returns:
        bool [T], for the test samples in order: whether the prediction is right.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require("sklearn", "eval")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, held = features.double().numpy(), labels.numpy(), test.numpy()
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(x[~held], y[~held])
    return torch.from_numpy(model.predict(x[held]) == y[held])


def split(labels: Tensor) -> Tensor:
    """Which half of the samples tests a linear probe: every second of each class, always the same.

    Args:
        labels: [N].

    Returns:
        bool [N], True for the test half.

    Raises:
        ValueError: fewer than two classes, or a class with a single sample.
    """
    names, counts = labels.unique(return_counts=True)
    if len(names) < 2 or int(counts.min()) < 2:
        raise ValueError(
            f"a linear probe needs at least two classes with two samples each, got {len(names)} class(es), "
            f"the smallest with {int(counts.min()) if len(counts) else 0}"
        )
    seen: dict[int, int] = {}
    test = torch.zeros(len(labels), dtype=torch.bool)
    for place, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, -1) + 1
        test[place] = seen[label] % 2 == 1
    return test
