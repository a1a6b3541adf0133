"""Orders with ties by place. An exported graph gets them from comparisons and sums.

ONNX has no stable sort, and a runtime's TopK may break ties as it likes (OpenVINO's does), so a graph that leaves PyTorch would
not select what the model selects.

Letters: B batch, N places, K places that are True.
"""

import torch
from torch import Tensor


def descending(score: Tensor) -> Tensor:
    """Places of the scores from high to low, ties by place: [B, N] -> int64 [B, N]."""
    if not torch.compiler.is_exporting():
        return torch.sort(score, dim=-1, descending=True, stable=True).indices
    places = torch.arange(score.shape[1], device=score.device)
    own, other = score.unsqueeze(2), score.unsqueeze(1)
    first = (other > own) | ((other == own) & (places < places.unsqueeze(1)))  # [B, N, N]: j comes before i
    return torch.zeros_like(score, dtype=torch.long).scatter(1, first.sum(-1), places.expand(score.shape))


def true_places(mask: Tensor, count: int) -> Tensor:
    """Places of the True of each row, ascending, in an exported graph: bool [B, N], ``count`` True each -> int64 [B, count]."""
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    rank = torch.where(mask, mask.cumsum(1) - 1, count)  # the others all go to a slot behind the last, which is cut off
    return places.new_zeros(mask.shape[0], count + 1).scatter(1, rank, places)[:, :count]
