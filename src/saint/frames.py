"""Edges of the similarity graph across the frames of a video.

A *cell* is one place of one video: candidates with the same number show it at different times, in the order of samples and
slots. Pure tensor functions, as in :mod:`saint.graph`.

Letters: B batch, N candidate slots, S = ceil(N / 2) sources, D head dim.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import graph

NONE = -1  # the cell of a candidate that is of no video, and what is earlier than the first


def numbered(videos: Iterable[tuple[int, int]]) -> tuple[list[Tensor], int]:
    """The cells of one frame of each video, and how many cells there are.

    Args:
        videos: frames, and places of a frame. A single frame has no cells.

    Returns:
        Per video int64 [places], and the number that comes next.
    """
    cells, first = list[Tensor](), 0
    for frames, places in videos:
        cells.append(torch.arange(first, first + places) if frames > 1 else torch.full((places,), NONE))
        first += places if frames > 1 else 0
    return cells, first


def earlier(cells: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The candidate of the same cell in the nearest earlier frame that still has one.

    Args:
        cells: int64 [B, N]; -1: of no video.
        valid: bool [B, N], False for padding; None means all real.

    Returns:
        Place among the flattened B * N slots, int64 [B, N]; -1 where there is none.
    """
    flat = (cells if valid is None else cells.masked_fill(~valid, NONE)).flatten()
    order = torch.sort(flat, stable=True).indices  # of equal cells the earlier frame first
    here = flat[order]
    before = torch.full_like(flat, NONE)
    again = (here[1:] == here[:-1]) & (here[1:] != NONE)
    before[order[1:]] = torch.where(again, order[:-1], NONE)
    return before.view_as(cells)


def resemblance(points: Tensor, before: Tensor) -> Tensor:
    """Cosine of each candidate and its cell in the frame before, float32 [B, N]; -2 where there is none.

    Args:
        points: unit vectors, float32 [B, N, D].
        before: see :func:`earlier`.
    """
    past = points.flatten(0, 1)[before.clamp_min(0)]  # [B, N, D]
    return (points * past).sum(-1).masked_fill(before == NONE, graph.NO_TARGET)


class Ballot(NamedTuple):
    """Outcome of the voting graph of a video.

    Attributes:
        score: redundancy, float32 [B, N]; -inf of candidates that cannot go.
        votes: candidates that vote to go, int64 [B].
    """

    score: Tensor
    votes: Tensor


def vote(
    keys: Tensor,
    cells: Tensor,
    threshold: float,
    neighbors: int,
    gamma: float,
    across: int,
    *,
    center: bool = False,
    valid: Tensor | None = None,
) -> Ballot:
    """The voting graph of :func:`saint.graph.vote` with edges across frames.

    Every candidate whose cosine with its cell in the frame before reaches the threshold has one more edge, which counts as
    ``across``. With c_i edges of mean similarity s_i, as there::

        score_i = c_i * exp(gamma * (s_i - threshold))   if c_i > 0
                  mean_j S_ij                            otherwise, of sources (even positions)

    and a candidate votes to go when c_i >= neighbors. Odd positions, targets of their own frame, can go by the edge across frames
    alone; without it they stay.

    Args:
        keys: [B, H, N, D] or [B, N, D].
        cells: int64 [B, N], see the module.
        threshold: cosine, in (-1, 1].
        neighbors: edges a candidate needs to vote, >= 1.
        gamma: sharpness of the score.
        across: edges that one across frames counts as, >= 1.
        center: see :func:`saint.graph.metric`.
        valid: bool [B, N], False for padding.
    """
    with graph.full_precision(keys.device):
        points = graph.metric(keys, center=center, valid=valid)
        edges = graph.link(points, threshold, valid=valid)
        same = resemblance(points, earlier(cells, valid=valid))
        floor = graph.just_below(threshold)
        linked = same > floor  # [B, N]
        degree = linked.to(torch.float32) * across
        excess = (same - floor).clamp_min(0) * across
        degree[:, 0::2] += edges.degree
        within, mean = edges.sums()
        excess[:, 0::2] += within
        score = torch.addcdiv(degree.clamp_min(1).log(), excess, degree.clamp_min(1), value=gamma).exp()
        lonely = torch.full_like(score, -torch.inf)
        lonely[:, 0::2] = mean
        score = torch.where(degree > 0, torch.maximum(score, lonely), lonely)
        ballots = degree >= neighbors
        if valid is not None:
            score, ballots = score.masked_fill(~valid, -torch.inf), ballots & valid
        return Ballot(score, ballots.sum(-1))
