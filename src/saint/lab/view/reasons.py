"""Why tokens were dropped, as plain data for records and pages: what stands for them, and the neighbours of sources.

Letters: N candidates at a drop point, D head dim, S = ceil(N / 2) sources.
"""

from typing import Any

import torch
from torch import Tensor

from ... import graph
from ...gathers import similar_survivor
from ...methods.saint import Saint
from ...plans import Plan
from ...runtime.observe import Observer
from ...tokens import Candidates, Selection


class Reasons(Observer):
    """Collects the reasons of every drop point of one forward; give it to ``saint.apply(..., observers=[reasons])``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen: Candidates | None = None
        self._found: list[list[dict[str, Any]]] = []
        self._stages: list[str] = []  # of the drop points so far

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        self._seen = candidates

    def selected(self, stage: str, layer: int, selection: Selection) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            return
        method = _method(self._plan, stage, layer, first=stage not in self._stages)
        self._stages.append(stage)
        self._found.append([_reason(seen, selection, sample, method) for sample in range(len(seen.tokens.lengths))])

    def take(self) -> list[list[dict[str, Any]]]:
        """Of each drop point since they were taken last, in the order of the trace, and of each sample: ``why`` of a record.

        ``gone`` and ``into``: original indices of what was dropped, and of each what it is part of, or the survivor with the most
        similar key. ``merged``: which of the two. Where the method votes: ``degree`` of each source (the even positions of what
        came), ``neighbors`` and ``threshold``.
        """
        found, self._found, self._stages = self._found, [], []
        return found


def _method(plan: Plan, stage: str, layer: int, *, first: bool) -> Any:
    """The method of a drop point, None where the plan alone does not say which."""
    stages = plan.slots.get(stage, ())
    if first and (entry := [s for s in stages if s.placement == "input"]):
        return entry[0].method
    rest = [s for s in stages if s.placement != "input"]
    named = [s for s in rest if isinstance(s.layers, (tuple, range)) and layer in s.layers]
    open_ = [s for s in rest if not isinstance(s.layers, (tuple, range))]
    found = named or open_
    return found[0].method if len(found) == 1 else None


def _reason(seen: Candidates, selection: Selection, sample: int, method: Any) -> dict[str, Any]:
    count = seen.tokens.lengths[sample]
    index, keys = seen.tokens.index[sample, :count].cpu(), seen.keys[sample, :count].float().cpu()  # [N], [N, D]
    kept = selection.slots[sample, : selection.lengths[sample]].cpu()
    gone = torch.ones(count, dtype=torch.bool).scatter(0, kept, False)
    into: Tensor = index[:0]
    merged = selection.merges(sample)
    if bool(gone.any()):
        if merged:
            assert selection.owner is not None
            stands = selection.owner[sample, :count].cpu()
        else:
            # keys as they are, also where the method centres them: so does a stage with output="similar"
            stands = similar_survivor(graph.metric(keys[None]), Selection(kept[None], (len(kept),)))[0]
        into = index[kept][stands][gone]
    why = {"gone": index[gone].tolist(), "into": into.tolist(), "merged": merged}
    if isinstance(method, Saint):
        degree = graph.connect(keys[None], method.threshold, center=method.center).degree[0]  # [S]
        why |= {"degree": degree.int().tolist(), "neighbors": method.neighbors, "threshold": method.threshold}
    return why
