"""Similarity graphs over tokens: voting (SAINT section 3) and full-graph elimination.

Pure tensor functions: no model, no state. Everything is computed in float32 whatever the input dtype, ties are broken
by token index, and no gradient flows through a decision.

Letters: B batch, H heads, N candidate tokens, D head dim, S = ceil(N / 2) sources.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .gathers import gather_tokens
from .order import descending as descending

# A cosine never gets here and a valid threshold neither: marks targets that do not exist (padding).
NO_TARGET = -2.0


class Vote(NamedTuple):
    """Outcome of the voting graph of one layer.

    Attributes:
        sources: candidate index of each source (the even positions), int64 [S].
        degree: number of targets at or above the threshold, int64 [B, S].
        score: redundancy, float32 [B, S]; padded sources hold -inf.
        votes: number of sources whose degree reaches ``neighbors``, int64 [B].
    """

    sources: Tensor
    degree: Tensor
    score: Tensor
    votes: Tensor


def check_threshold(threshold: float) -> None:
    """Raise ``ValueError`` unless ``threshold`` is a cosine in (-1, 1]."""
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or not -1.0 < threshold <= 1.0:
        raise ValueError(
            f"threshold must be a cosine in (-1, 1], got {threshold!r}; 0.75 suits CLIP-like encoders, "
            "a higher value drops fewer tokens"
        )


def check_neighbors(neighbors: int) -> None:
    """Raise ``ValueError`` unless ``neighbors`` is an integer in [1, 2^31]."""
    if not isinstance(neighbors, int) or isinstance(neighbors, bool) or not 1 <= neighbors <= 2**31:
        raise ValueError(f"neighbors must be an integer >= 1, got {neighbors!r}; the published value is 5")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """No autograd and no autocast: bf16 similarities would flip votes."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type):
        return _NOTHING  # entering and leaving real contexts costs a tenth of a small layer's scoring
    return _full_precision(device)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def just_below(threshold: float) -> float:
    """The float32 below the threshold, itself rounded to float32 as a comparison would (plain arithmetic: it compiles)."""
    mantissa, exponent = math.frexp(threshold)
    bits = 25 if mantissa == 0.5 else 24  # below a power of two the floats lie twice as dense
    return math.ldexp(round(mantissa * 2**bits) - 1, exponent - bits)


def averaged(keys: Tensor, *, center: bool = False, valid: Tensor | None = None) -> Tensor:
    """Head-mean keys, float32 [B, N, D]; arguments of :func:`metric`."""
    mean = keys.mean(1, dtype=torch.float32) if keys.ndim == 4 else keys.float()
    if not center:
        return mean
    if valid is None:
        return mean - mean.mean(1, keepdim=True)
    weight = valid.unsqueeze(-1).to(mean.dtype)
    return mean - (mean * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)


def metric(keys: Tensor, *, center: bool = False, valid: Tensor | None = None) -> Tensor:
    """Unit-length head-mean keys, the tokens' positions on the sphere.

    Args:
        keys: [B, H, N, D] or already averaged over heads [B, N, D], any float dtype.
        center: subtract the mean over the candidates first; for encoders whose keys share a large common component.
        valid: bool [B, N], False for padding; None means all real.

    Returns:
        float32 [B, N, D]; a zero key stays the zero vector.
    """
    mean = averaged(keys, center=center, valid=valid)
    # clamp instead of torch.nn.functional.normalize: one temporary less on a path counted in microseconds
    return mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(1e-12)


class Edges(NamedTuple):
    """Edges of the voting graph, before anything is scored.

    Attributes:
        degree: number of targets at or above the threshold, float32 [B, S] (exact below 2^24).
        sums: gives what a score is made of: how far the cosines of the edges lie above the threshold, summed, and the mean cosine
            of all real targets, each float32 [B, S]. A drop point at which no source votes does not ask.
    """

    degree: Tensor
    sums: Callable[[], tuple[Tensor, Tensor]]


def connect(keys: Tensor, threshold: float, *, center: bool = False, valid: Tensor | None = None) -> Edges:
    """The edges of the voting graph; arguments of :func:`vote`, not checked."""
    with full_precision(keys.device):
        return link(metric(keys, center=center, valid=valid), threshold, valid=valid)


# cosines of a sample that are held at once, 4 MiB of them: all up to 2048 tokens, blocks of rows beyond
_HELD = 2**20


def link(points: Tensor, threshold: float, *, valid: Tensor | None = None) -> Edges:
    """:func:`connect` for candidates whose unit vectors are known, float32 [B, N, D]; in full precision.

    Needs memory for O(N) numbers a sample: of many tokens, blocks of rows of the matrix of cosines are made one after another.
    An exported graph, which is of one size, has the whole.
    """
    sources, targets, floor = points[:, 0::2], points[:, 1::2].mT, just_below(threshold)
    real = None if valid is None else valid[:, 1::2].unsqueeze(1)
    blocks = -(-sources.shape[1] * targets.shape[2] // _HELD)
    if blocks <= 1 or torch.compiler.is_exporting():
        similarity = _cosines(sources, targets, real)
        return Edges(_degree(similarity, floor), lambda: _sums(similarity, floor, real))
    # blocks as equal as can be: the product of a block of one row would be rounded otherwise
    parts = [_block(some, targets, floor, real) for some in sources.tensor_split(blocks, 1)]
    degree, excess, mean = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Edges(degree, lambda: (excess, mean))


def _block(sources: Tensor, targets: Tensor, floor: float, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Degree and ``Edges.sums`` of some sources; their cosines are gone when it returns."""
    similarity = _cosines(sources, targets, real)
    return _degree(similarity, floor), *_sums(similarity, floor, real)


def _cosines(sources: Tensor, targets: Tensor, real: Tensor | None) -> Tensor:
    """Cosines of unit vectors: [B, S, D] and [B, D, T] -> [B, S, T]; -2 with padded targets, by ``real`` [B, 1, T]."""
    similarity = torch.bmm(sources, targets)
    return similarity if real is None else similarity.masked_fill(~real, NO_TARGET)


def _degree(similarity: Tensor, floor: float) -> Tensor:
    """Count the cosines above ``floor``: [B, S, T] -> float32 [B, S]."""
    if torch.compiler.is_exporting():
        return (similarity > floor).sum(-1, dtype=torch.float32)
    # a sum over bool takes several times as long on a CPU
    return torch.gt(similarity, floor, out=torch.empty_like(similarity)).sum(-1)


def _sums(similarity: Tensor, floor: float, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Edges.sums``: [B, S, T] -> two of [B, S]."""
    # the shift by the float just below the threshold is that of the comparison: each edge adds more than zero
    excess = (similarity - floor).clamp_min_(0).sum(-1)
    if real is None:
        return excess, similarity.mean(-1) if similarity.shape[-1] else torch.zeros_like(excess)  # not 0 / 0
    return excess, (similarity * real).sum(-1) / real.sum(-1).clamp_min(1)


def count_votes(edges: Edges, neighbors: int, *, valid: Tensor | None = None) -> Tensor:
    """Number of sources that vote to go, int64 [B]: see :func:`vote`."""
    ballots = edges.degree >= neighbors  # [B, S]
    return (ballots if valid is None else ballots & valid[:, 0::2]).sum(-1)


def redundancy(edges: Edges, gamma: float, *, valid: Tensor | None = None) -> Tensor:
    """Score of each source, float32 [B, S]: see :func:`vote`."""
    degree = edges.degree
    with full_precision(degree.device):
        excess, mean = edges.sums()
        if torch.compiler.is_exporting():  # the same without a NaN: ONNX has no fmax, and runtimes simplify 0 / 0
            edges_or_one = degree.clamp_min(1)
            linked = torch.addcdiv(edges_or_one.log(), excess, edges_or_one, value=gamma).exp()
            return torch.where(degree > 0, torch.maximum(linked, mean), mean)
        # log(c) + gamma * (s - threshold); without an edge 0 / 0, a NaN, for which fmax puts the mean
        linked = torch.addcdiv(degree.log(), excess, degree, value=gamma).exp_()
        score = torch.fmax(linked, mean)
        return score if valid is None else score.masked_fill(~valid[:, 0::2], -torch.inf)


def vote(
    keys: Tensor,
    threshold: float,
    neighbors: int = 5,
    gamma: float = 10.0,
    *,
    center: bool = False,
    valid: Tensor | None = None,
) -> Vote:
    """The voting graph: bipartite, even positions (sources) against odd positions (targets).

    With S_ij the cosine of source i and target j, an edge where S_ij >= threshold, c_i the degree and
    s_i the mean similarity over the edges::

        score_i = c_i * exp(gamma * (s_i - threshold))   if c_i > 0      (always >= 1)
                  mean_j S_ij                            otherwise       (always <= 1)

    A source votes to go when c_i >= neighbors (the authors' code; their figure draws a strict inequality).

    Args:
        keys: attention keys of the candidates, [B, H, N, D] or [B, N, D].
        threshold: cosine at which two tokens count as similar, in (-1, 1].
        neighbors: edges a source needs to vote, >= 1.
        gamma: sharpness of the score.
        center: see :func:`metric`.
        valid: bool [B, N], False for padding, which is neither source nor target.

    Returns:
        The :class:`Vote`.

    Raises:
        ValueError: bad ``threshold``, ``neighbors`` or shape of ``keys``.

    Example:
        >>> angles = torch.deg2rad(torch.tensor([0., 1, 2, 4, 40, 6, 80, 8, 120, 41]))
        >>> ballot = vote(torch.stack([angles.cos(), angles.sin()], -1)[None], 0.95, neighbors=3)
        >>> drop_order(ballot)[0, : int(ballot.votes)].tolist()
        [2, 0]
    """
    check_threshold(threshold)
    check_neighbors(neighbors)
    if keys.ndim not in (3, 4):
        raise ValueError(f"keys must be [B, H, N, D] or [B, N, D], got shape {tuple(keys.shape)}")
    edges = connect(keys, threshold, center=center, valid=valid)
    score = redundancy(edges, gamma, valid=valid)
    sources = torch.arange(0, keys.shape[-2], 2, device=keys.device)
    return Vote(sources, edges.degree.long(), score, count_votes(edges, neighbors, valid=valid))


def drop_order(vote: Vote) -> Tensor:
    """Candidate indices of the sources, most redundant first, ties by index. int64 [B, S]."""
    return vote.sources[descending(vote.score)]


_GRID = 2.0**20  # see `eliminate`


def _exact_points(keys: Tensor, center: bool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit keys times 2^20, rounded, and what is missing from their squares to 2^40 (zero keys: 0); float64.

    MPS has no float64: float32 there, and near-ties may fall otherwise in another batch.
    """
    wide = torch.float32 if keys.device.type == "mps" else torch.float64
    mean = keys.sum(1, dtype=wide) if keys.ndim == 4 else keys.to(wide)
    if center:
        real = torch.ones_like(mean[..., :1]) if valid is None else valid.unsqueeze(-1).to(wide)
        mean = mean - (mean * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    points = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(1e-12)
    points = points.mul_(_GRID).round_()
    square = points.square().sum(-1, keepdim=True)
    return points, (square > 0).to(wide) * _GRID**2 - square


def eliminate(
    keys: Tensor,
    keep: int | list[int],
    step: int = 16,
    *,
    center: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Full-graph elimination: drop the tokens most similar to all that are left, a share at a time.

    While more than ``keep`` tokens remain: score_i = sum of the cosines S_ij over the tokens j still there, itself included; the
    ``max(1, remaining // step)`` highest go (never more than needed), ties by index.

    The sum over j is taken before the product, ``sum_j S_ij = p_i . sum_j p_j``, so no N x N matrix is needed. Unit keys p are
    rounded to multiples of 2^-20 (which moves a cosine by some 4e-7), and S_ii is 1: in float64, sums over at most 2^13 tokens
    are then exact in any order. What a sample loses does not depend on its batch mates or on padding, and equal scores are equal:
    two tokens that are left always tie.

    Args:
        keys: [B, H, N, D] or [B, N, D].
        keep: survivors per sample, one number or one per sample.
        step: a round removes one ``step``-th of what remains, >= 1.
        center: see :func:`metric`.
        valid: bool [B, N], False for padding.

    Returns:
        bool [B, N], True for survivors. Padding is never a survivor.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"step must be an integer >= 1, got {step!r}; the published value is 16")
    with full_precision(keys.device):
        points, own = _exact_points(keys, center, valid)  # [B, N, D], [B, N, 1]
        batch, count = points.shape[:2]
        alive = torch.ones(batch, count, dtype=torch.bool, device=keys.device) if valid is None else valid.clone()
        if valid is None and isinstance(keep, int):  # one number for all: an exported graph knows no size of its batch
            left, goal = [count], [keep]
        else:
            left = [count] * batch if valid is None else valid.sum(1).tolist()
            goal = [keep] * batch if isinstance(keep, int) else list(keep)
        rank = torch.arange(count, device=keys.device)
        while True:
            out = [min(n - k, max(1, n // step)) if n > k else 0 for n, k in zip(left, goal, strict=True)]
            if not any(out):
                return alive
            total = alive.unsqueeze(1).to(points.dtype) @ points  # [B, 1, D]
            score = (points @ total.mT + own).squeeze(-1)
            order = descending(score.masked_fill(~alive, -torch.inf))
            if len(set(out)) == 1:
                alive = alive.scatter(1, order[:, : out[0]], False)
            else:
                stay = rank >= torch.tensor(out, device=keys.device).unsqueeze(1)
                alive = alive & torch.empty_like(alive).scatter_(1, order, stay)
            left = [n - k for n, k in zip(left, out, strict=True)]


class Partners(NamedTuple):
    """The best partner of each source.

    Attributes:
        sources: candidate index of each source (the even positions), int64 [S].
        targets: candidate index of its most similar target (an odd position), int64 [B, S].
        similarity: their cosine, float32 [B, S]; padded sources, and sources without any target, hold -inf.
    """

    sources: Tensor
    targets: Tensor
    similarity: Tensor


def match(keys: Tensor, *, valid: Tensor | None = None) -> Partners:
    """Bipartite matching of ToMe: even positions (sources) each pick their most similar odd one; ties by index.

    Args:
        keys: [B, H, N, D] or [B, N, D], N >= 2.
        valid: bool [B, N], False for padding.
    """
    with full_precision(keys.device):
        points = metric(keys, valid=valid)
        similarity = points[:, 0::2] @ points[:, 1::2].mT
        if valid is not None:
            similarity = similarity.masked_fill(~valid[:, 1::2].unsqueeze(1), -torch.inf)
        best = similarity.argmax(-1)
        score = similarity.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        if valid is not None:
            score = score.masked_fill(~valid[:, 0::2], -torch.inf)
        return Partners(torch.arange(0, points.shape[1], 2, device=keys.device), 2 * best + 1, score)


# -- matching -----------------------------------------------------------------------------------------------------------

_FREE = -1.5  # below every cosine, above `NO_TARGET` and what unmatched sources hold
_LAST = 2**40  # behind every place on a grid


class Pairs(NamedTuple):
    """Pairs of similar tokens, one for each source, disjoint where they were won.

    Attributes:
        leaves: slot of the token of a pair that is more similar to all others, int64 [B, S].
        stays: slot of its partner, int64 [B, S].
        similarity: their cosine, float32 [B, S]. A source that won no target comes after all pairs: it leaves, its most similar
            target stays, and 4 is taken off their cosine. Padding holds -inf.
    """

    leaves: Tensor
    stays: Tensor
    similarity: Tensor


def snake(index: Tensor, columns: int) -> Tensor:
    """Rank of places on a grid in a walk that turns round at the end of each row: the parity of the rank is a chessboard.

    Args:
        index: places, row by row, int64 [B, N].
        columns: of the grid.
    """
    row = torch.div(index, columns, rounding_mode="floor")
    back = row * (2 * columns) + (columns - 1) - index  # row * columns + (columns - 1 - column)
    return torch.where(row % 2 == 0, index, back)


def pair(
    keys: Tensor,
    index: Tensor,
    columns: int | None = None,
    *,
    center: bool = False,
    valid: Tensor | None = None,
) -> Pairs:
    """Matching of the similarity graph by two rounds of proposals.

    Tokens alternate between sources and targets along the sequence, or along a snake over the grid, which makes the two sides
    the colours of a chessboard (the published split by position makes them whole columns where the grid is even). Every source
    proposes to its most similar target, and a target takes the most similar of its proposers (of equal ones the first). Sources
    that were not taken propose once more, to the most similar of the targets that hold nothing more similar, which then let go
    what they hold. More rounds would end in greedy matching (edges in descending order). No loop over tokens.

    Of a pair leaves the token with the larger sum of cosines to all tokens of the sample, of equal ones the source.

    Args:
        keys: [B, H, N, D] or [B, N, D], N >= 2.
        index: original place of each token, int64 [B, N].
        columns: of the grid that ``index`` counts along; None: tokens alternate in order.
        center: see :func:`metric`.
        valid: bool [B, N], False for padding.
    """
    with full_precision(keys.device):
        points = metric(keys, center=center, valid=valid)  # [B, N, D]
        if columns is None:
            order = torch.arange(points.shape[1], device=keys.device).expand(points.shape[:2])
        else:
            walk = snake(index, columns)
            order = torch.sort(walk if valid is None else walk.masked_fill(~valid, _LAST), dim=1).indices
            points = gather_tokens(points, order, 0)
            valid = None if valid is None else valid.gather(1, order)
        real = points if valid is None else points * valid.unsqueeze(-1)
        crowd = torch.bmm(points, real.sum(1).unsqueeze(-1)).squeeze(-1)  # [B, N]: sum of cosines to all tokens
        similarity = torch.bmm(points[:, 0::2], points[:, 1::2].mT)  # [B, S, T]
        if valid is not None:
            both = valid[:, 0::2].unsqueeze(2) & valid[:, 1::2].unsqueeze(1)
            similarity = similarity.masked_fill(~both, NO_TARGET)
        batch, _, targets = similarity.shape
        held = similarity.new_full((batch, targets), _FREE)  # [B, T]: what each target has taken
        value, best = similarity.max(-1)  # [B, S]
        held.scatter_reduce_(1, best, value, "amax")
        won = value == held.gather(1, best)
        more, other = similarity.masked_fill_(similarity <= held.unsqueeze(1), NO_TARGET).max(-1)
        held.scatter_reduce_(1, other, more.masked_fill_(won, NO_TARGET), "amax")
        late = (more == held.gather(1, other)) & (more > _FREE)
        won = (won & (value == held.gather(1, best))) | late
        pick, value = torch.where(late, other, best), torch.where(late, more, value)
        # of equal proposals the first is taken
        rank = torch.arange(pick.shape[1], device=keys.device).expand_as(pick)
        nobody = torch.full_like(order[:, 1::2], pick.shape[1])
        first = nobody.scatter_reduce_(1, pick, rank.masked_fill(~won, pick.shape[1]), "amin")
        won = first.gather(1, pick) == rank
        weight = torch.where(won, value, value - 4)
        if valid is not None:
            weight = weight.masked_fill(~valid[:, 0::2], -torch.inf)
        swap = (crowd[:, 1::2].gather(1, pick) > crowd[:, 0::2]) & won
        source, target = order[:, 0::2], order[:, 1::2].gather(1, pick)
        return Pairs(torch.where(swap, target, source), torch.where(swap, source, target), weight)
