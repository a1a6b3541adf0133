"""What an evaluation found, as data."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...plans import Plan
from ...session import Session
from ..sources.items import Failure
from .compare import Paired, compare, mean_interval

YES_OR_NO = ("same_top1", "same_answer", "same_first_token")  # agreement that a sample has or has not
BySample = dict[str, dict[str, dict[str, float]]]  # by "base" or plan, by score, by sample id


@dataclass(frozen=True)
class Summary:
    """Distribution of a quantity that needs no labels, over ``n`` samples."""

    mean: float
    median: float
    p20: float
    p80: float
    n: int
    low: float | None = None  # ends of the 95 % interval of the mean; None of a single sample
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Of at least one value."""
        t = torch.tensor(values, dtype=torch.float64)
        p20, median, p80 = torch.quantile(t, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        low, high = mean_interval(values)
        return cls(float(t.mean()), median, p20, p80, len(values), low, high)


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
        samples: what the scores are means of. Not part of a record; the journal has it.
    """

    given: int
    evaluated: int
    failures: list[Failure]
    plans: dict[str, Plan]
    scores: dict[str, dict[str, Paired]]
    agreement: dict[str, dict[str, Summary]]
    categories: dict[str, dict[str, dict[str, Paired]]]
    conditions: dict[str, Any]
    samples: BySample = dataclasses.field(repr=False)

    def between(self, first: str, second: str) -> dict[str, Paired]:
        """Every score of plan ``second`` against plan ``first`` as base, on the samples that have both.

        Raises:
            ValueError: a name that is no plan of this report.
        """
        for name in (first, second):
            if name not in self.samples:
                raise ValueError(f"no plan {name!r} in this report; there are {', '.join(self.samples)}")
        return between(self.samples, first, second)

    def against_first(self) -> dict[str, dict[str, Paired]]:
        """The second plan, the third and so on, each against the first: which of them is better is another question than
        what each loses."""
        first, *others = self.plans
        return {name: self.between(first, name) for name in others}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        data = dataclasses.asdict(dataclasses.replace(self, samples={}))
        del data["samples"]
        versus = {p: {s: dataclasses.asdict(v) for s, v in found.items()} for p, found in self.against_first().items()}
        return {**data, "plans": {name: plan.to_dict() for name, plan in self.plans.items()}, "against_first": versus}


def by_sample(entries: Sequence[Mapping[str, Any]], variants: Sequence[str], among: Sequence[str]) -> BySample:
    """Every score of ``among`` that entries have, by variant, score and sample id."""
    found: BySample = {}
    for variant in variants:
        scores = {s: {e["id"]: float(e[variant][s]) for e in entries if s in e[variant]} for s in among}
        found[variant] = {score: values for score, values in scores.items() if values}
    return found


def between(samples: BySample, first: str, second: str, ids: Collection[str] | None = None) -> dict[str, Paired]:
    """Every score that both have, on the samples (of ``ids``) that have it in both."""
    found = {}
    for score, base in samples[first].items():
        other = samples[second].get(score, {})
        common = [name for name in base if name in other and (ids is None or name in ids)]
        if common:
            found[score] = compare([base[name] for name in common], [other[name] for name in common])
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


def work_left(session: Session) -> float | None:
    """Share of the FLOPs that is left of the last forward, mean of its samples without padding; None where it is unknown.

    Of a vision-language model those of the language model's layers for the prompt, of an encoder those of its blocks.
    """
    if not session.trace:
        return None
    found = session.summary()
    return found.flops_left if found.prefill_left is None else found.prefill_left


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
