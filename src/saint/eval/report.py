"""What an evaluation found, as data."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan
from ..session import Session
from .compare import Paired, compare
from .loop import Failure

BASE = "base"


@dataclass(frozen=True)
class Summary:
    """Distribution of a quantity that needs no labels, over ``n`` samples."""

    mean: float
    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Of at least one value."""
        t = torch.tensor(values, dtype=torch.float64)
        p20, median, p80 = torch.quantile(t, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(float(t.mean()), median, p20, p80, len(values))


@dataclass(frozen=True)
class Report:
    """Base and pruned on the same samples.

    Attributes:
        given: samples that were to be evaluated.
        evaluated: samples that were; the scores are over these.
        failures: the others, with reasons.
        plans: what was applied, by name.
        scores: by plan, then by score.
        agreement: by plan: measures that compare the two models and need no labels.
        categories: ``scores`` within each category of questions.
        conditions: all else that the numbers depend on.
    """

    given: int
    evaluated: int
    failures: list[Failure]
    plans: dict[str, Plan]
    scores: dict[str, dict[str, Paired]]
    agreement: dict[str, dict[str, Summary]]
    categories: dict[str, dict[str, dict[str, Paired]]]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {**dataclasses.asdict(self), "plans": {name: plan.to_dict() for name, plan in self.plans.items()}}


def check_plans(plans: Mapping[str, Plan]) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: no plan, or one called "base".
    """
    if not plans or BASE in plans:
        raise ValueError(f'give at least one plan, none of them called "{BASE}", got {list(plans)}')


def paired(entries: Sequence[Mapping[str, Any]], plan: str, among: Sequence[str]) -> dict[str, Paired]:
    """Every score of ``among`` that entries have for base and ``plan``."""
    found = {}
    for score in among:
        have = [e for e in entries if score in e[BASE] and score in e[plan]]
        if have:
            found[score] = compare([e[BASE][score] for e in have], [e[plan][score] for e in have])
    return found


def summaries(entries: Sequence[Mapping[str, Any]], plan: str, among: Sequence[str]) -> dict[str, Summary]:
    """Every label-free measure of ``among`` that entries have for ``plan``; null (not finite) is left out and shows in n."""
    found = {}
    for name in among:
        values = [e[plan][name] for e in entries if e[plan].get(name) is not None]
        if values:
            found[name] = Summary.of(values)
    return found


def kept(session: Session, batch: int) -> list[float] | None:
    """Share of the visual tokens that each sample has left behind the last drop point; None where stages count differently."""
    trace = session.trace
    if not trace or any(len(step.tokens_in) != batch for step in (trace[0], trace[-1])):
        return None
    return [float(x) for x in trace[-1].tokens_out.double().cpu() / trace[0].tokens_in.double().cpu()]


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights: names, shapes and the ends of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            flat = tensor.detach().flatten()
            ends = torch.cat([flat[:16], flat[-16:]]).double().cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {ends.tolist()}".encode())
    return digest.hexdigest()[:16]


def digest(value: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
