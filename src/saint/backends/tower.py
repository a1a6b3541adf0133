"""The vision tower of a vision-language model, alone.

Letters: B images, P prefix tokens, K survivors, C channels.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..plans import Plan
from ..session import apply
from ..tokens import Candidates, Selection
from ..upstream.specs import FamilySpec, part
from ..vision.locate import locate_tower
from ..vlm.model import read_features


class Tower(nn.Module):
    """Pixels to the features that the connector reads, and the patches that they are of.

    Args:
        path: of the model in the user's.
        model: the vision-language model.
        spec: what is known of its family.
        plan: for its vision stage.
        stack: undoes the plan.

    Raises:
        UnsupportedModelError: a tower that is more than pixels to features.
    """

    def __init__(self, path: str, model: nn.Module, spec: FamilySpec, plan: Plan, stack: ExitStack) -> None:
        super().__init__()
        if spec.merge_size(model) is not None:
            raise UnsupportedModelError(
                f"the connector of {spec.title} joins squares of patches and reads a full-length map, so its tower alone cannot "
                "hand on fewer tokens: apply the plan to the whole model in PyTorch"
            )
        _, tower, tower_spec = locate_tower(model, spec)
        self.tower = tower
        self._layer = read_features(model, spec, len(list(part(tower, tower_spec.blocks))))
        self._kept = _Kept()
        stack.enter_context(apply(model, plan, observers=[self._kept]))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values [B, 3, H, W] -> features [B, P + K, C], and kept, original indices of the patches, int64 [B, K]."""
        self._kept.index = None
        out: Any = self.tower(pixel_values, output_hidden_states=True)
        features = {"features": out.hidden_states[self._layer]}
        return features if self._kept.index is None else {**features, "kept": self._kept.index}


class _Kept:
    """Notes which patches are left behind the last drop point."""

    def __init__(self) -> None:
        self.index: Tensor | None = None

    def decided(self, stage: str, layer: int, candidates: Candidates, selection: Selection) -> None:
        if stage == "vision":
            self.index = torch.gather(candidates.tokens.index, 1, selection.slots)
