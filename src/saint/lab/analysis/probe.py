"""The observer that measures: quantities of every layer during one forward, and nothing else is kept of it.

Letters: L layers, S points of the residual stream (in front of layer 0 and behind each layer), m tokens compared by CKA.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.attended import Attended
from ...runtime.observe import Passed
from ...tokens import Candidates
from . import geometry, similarity
from .attention import Summary, received_entropy, received_entropy_by_max, summarize

COMPARED = 256  # tokens of an image that CKA compares, evenly spaced: a kernel of all would be N x N


@dataclass(frozen=True)
class Quantity:
    """What a number is called, and its unit."""

    title: str
    unit: str


QUANTITIES = {
    "key_similarity": Quantity("similarity of keys", "cosine"),
    "key_similarity_centred": Quantity("similarity of centred keys", "cosine"),
    "text_similarity": Quantity("similarity of text keys to visual keys", "cosine"),
    "cls_entropy": Quantity("entropy of the attention of CLS", "nat"),
    "last_entropy": Quantity("entropy of the attention of the last prompt token", "nat"),
    "token_entropy": Quantity("entropy of the attention of visual tokens", "nat"),
    "received_entropy": Quantity("entropy of received attention", "nat"),
    "received_entropy_max": Quantity("the same, divided by its maximum (the authors' version)", ""),
    "cls_share": Quantity("share of attention on CLS", "share"),
    "visual_share": Quantity("share of the attention of visual tokens on visual tokens", "share"),
    "text_share": Quantity("share of the attention of text on visual tokens", "share"),
    "last_share": Quantity("share of the attention of the last prompt token on visual tokens", "share"),
    "effective_rank": Quantity("effective rank", "dimensions"),
    "residual_update": Quantity("update of the residual stream", "relative norm"),
    "cka_adjacent": Quantity("CKA of what enters and what leaves", "CKA"),
    "outliers": Quantity("share of high-norm tokens", "share"),
}


class Probe:
    """Measures one image per forward; an observer for :func:`saint.apply` with an empty plan.

    In a vision encoder "CLS" is the first protected token, and visual tokens are the candidates. In a language model they are the
    visual tokens of the prompt, and text means what stands behind the first of them; without images they are the tokens of the
    prompt but its first and last, and nothing is said of text and visual tokens. Where an image is several samples (tiles)
    or a layer's attention several calls (windows, parallel attentions), numbers are means over them.

    Args:
        thresholds: for :func:`saint.lab.analysis.similarity.droppable`.
        neighbors: likewise.
        center: likewise, by stage; a stage that is missing is not centred.
        visual: the candidates are of images.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        neighbors: int = 5,
        center: dict[str, bool] | None = None,
        visual: bool = True,
    ) -> None:
        self.thresholds, self.neighbors, self.center, self.visual = list(thresholds), neighbors, center or {}, visual
        self._sums: dict[str, dict[str, dict[int, list[float]]]] = {}
        self._grams: dict[str, list[Tensor]] = {}
        self._counts: dict[str, tuple[float, int]] = {}

    def _add(self, stage: str, name: str, layer: int, value: float, weight: float = 1.0) -> None:
        if math.isfinite(value):
            sums = self._sums.setdefault(stage, {}).setdefault(name, {}).setdefault(layer, [0.0, 0.0])
            sums[0] += value * weight
            sums[1] += weight

    # -- events -------------------------------------------------------------------------------------------------------

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        """Similarities of keys."""
        for sample, count in enumerate(candidates.tokens.lengths):
            keys = candidates.keys[sample, :count]
            self._add(stage, "key_similarity", layer, similarity.key_similarity(keys))
            self._add(stage, "key_similarity_centred", layer, similarity.key_similarity(keys, center=True))
            center = self.center.get(stage, False)
            shares = similarity.droppable(keys, self.thresholds, self.neighbors, center=center)
            for place, share in enumerate(shares):
                self._add(stage, f"droppable {place}", layer, share)

    def layer(self, stage: str, layer: int, passed: Passed) -> None:
        """Rank, updates, outliers; kernels for CKA."""
        before, after = passed.candidates()
        lengths = passed.left.candidates.lengths
        text = passed.before.shape[1] - lengths[0] if stage == "language" else 0
        self._counts[stage] = (sum(lengths) / len(lengths), passed.prefix + text)
        for sample, count in enumerate(lengths):
            x, y = before[sample, :count], after[sample, :count]
            self._add(stage, "residual_update", layer, geometry.residual_update(x, y))
            self._add(stage, "effective_rank", layer, geometry.effective_rank(y))
            self._add(stage, "outliers", layer, geometry.outliers(y))
        points = [after] if self._grams.get(stage) else [before, after]
        for point in points:
            kept = [point[sample, geometry.spread(count, COMPARED)] for sample, count in enumerate(lengths)]
            self._grams.setdefault(stage, []).append(_stack([geometry.gram(rows) for rows in kept]))

    def attention(self, stage: str, layer: int, attended: Attended) -> None:
        """Entropies and shares of attention."""
        if attended.query.shape[-2] != attended.key.shape[-2]:
            return  # a cache from an earlier prompt
        for sample in range(len(attended.query)):
            if stage == "language":
                self._language(layer, attended, sample)
            else:
                self._vision(layer, attended, sample)

    def _vision(self, layer: int, attended: Attended, sample: int) -> None:
        count, prefix = attended.query.shape[2], attended.prefix
        real = torch.ones(count, dtype=torch.bool, device=attended.query.device)
        valid = attended.state.tokens.valid
        if valid is not None and len(valid) == len(attended.query) and valid.shape[1] == count - prefix:
            real[prefix:] = valid[sample]
        senders = real.clone()
        senders[:prefix] = False
        first = torch.zeros_like(real)
        first[0] = True
        found = self._summary(attended, sample, senders, first)
        add = self._add
        if prefix:
            add("vision", "cls_entropy", layer, float(found.entropy[0]))
            add("vision", "cls_share", layer, float(found.share[senders].mean()))
        self._tokens("vision", layer, found, senders)

    def _language(self, layer: int, attended: Attended, sample: int) -> None:
        count, state = attended.query.shape[2], attended.state
        places = torch.arange(count, device=attended.query.device).view(1, count, 1).expand(len(attended.query), -1, 1)
        visual = torch.zeros(count, dtype=torch.bool, device=attended.query.device)
        visual[state.of_candidates(places)[sample, : state.candidates.lengths[sample], 0]] = True
        if not bool(visual.any()):
            return
        found = self._summary(attended, sample, visual, visual)
        self._add("language", "last_entropy", layer, float(found.entropy[-1]))
        self._tokens("language", layer, found, visual)
        if not self.visual:
            return
        keys = attended.key[sample].float().mean(0)
        self._add("language", "text_similarity", layer, similarity.cross_similarity(keys[visual], keys[~visual]))
        behind = ~visual & (visual.cumsum(0) > 0)
        self._add("language", "last_share", layer, float(found.share[-1]))
        self._add("language", "visual_share", layer, float(found.share[visual].mean()))
        self._add("language", "text_share", layer, float(found.share[behind].mean()))

    def _summary(self, attended: Attended, sample: int, senders: Tensor, onto: Tensor) -> Summary:
        query, key = attended.query[sample], attended.key[sample]
        mask = attended.mask_of(sample)
        return summarize(query, key, senders, onto, scale=attended.scale, mask=mask, causal=attended.causal)

    def _tokens(self, stage: str, layer: int, found: Summary, senders: Tensor) -> None:
        weight = float(senders.sum())
        self._add(stage, "token_entropy", layer, float(found.entropy[senders].mean()), weight)
        self._add(stage, "received_entropy", layer, received_entropy(found.received), weight)
        self._add(stage, "received_entropy_max", layer, received_entropy_by_max(found.received), weight)

    # -- result -------------------------------------------------------------------------------------------------------

    def take(self) -> dict[str, dict[str, Any]]:
        """What was measured since the last call, by stage, as plain data; None where a layer gave no number.

        ``quantities``: by name, [L]; ``droppable``: by threshold, [L]; ``hsic``: [S][S], means over samples; ``tokens``:
        candidates and protected tokens of a sample.
        """
        out: dict[str, dict[str, Any]] = {}
        for stage, named in self._sums.items():
            depth = 1 + max(layer for layers in named.values() for layer in layers)
            rows = {name: [_mean(sums.get(layer)) for layer in range(depth)] for name, sums in named.items()}
            droppable = [rows.pop(f"droppable {place}", []) for place in range(len(self.thresholds))]
            grams = torch.stack(self._grams[stage])  # [S, samples, m, m]
            hsic = torch.stack([geometry.hsic(grams[:, sample]) for sample in range(grams.shape[1])]).mean(0)
            rows["cka_adjacent"] = [_number(v) for v in geometry.cka(hsic).diagonal(1).tolist()]
            out[stage] = {
                "quantities": rows,
                "droppable": droppable,
                "hsic": [[_number(v) for v in row] for row in hsic.tolist()],
                "tokens": self._counts[stage],
            }
        self._sums, self._grams, self._counts = {}, {}, {}
        return out


def _stack(grams: list[Tensor]) -> Tensor:
    """Kernels of samples, [samples, m, m]; samples with fewer tokens than the longest are left out."""
    most = max(len(gram) for gram in grams)
    return torch.stack([gram for gram in grams if len(gram) == most])


def _mean(sums: list[float] | None) -> float | None:
    return None if sums is None else sums[0] / sums[1]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
