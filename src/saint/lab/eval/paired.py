"""One evaluation, whatever is scored: base and plans on the same items, compared in pairs."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from ...plans import Plan
from ..sources.items import Failure, Item
from ..variants import BASE, Variant, check_plans, variants
from .compare import Paired
from .loop import MARK, Loop, Processes
from .report import BySample, Report, between, by_sample, fingerprint, kept, summaries, work_left

Entry = dict[str, Any]  # plain data of an item and a variant


class Front(NamedTuple):
    """What smaller pictures leave in front of a plan.

    Attributes:
        tokens: visual tokens of each item.
        whole: the same of the whole pictures.
        work: share of the FLOPs that a plan's are a share of; None where it is unknown.
    """

    tokens: list[int]
    whole: list[int]
    work: float | None


class Judge(Protocol):
    """What is scored, and how.

    Attributes:
        kind: of the record.
        scores: names of what is scored per item and variant.
        agreement: names of what compares a plan with the unpruned model.
    """

    kind: ClassVar[str]
    scores: ClassVar[Sequence[str]]
    agreement: ClassVar[Sequence[str]]

    def watch(self, model: nn.Module) -> Any:
        """Return what runs a copy of the model."""

    def inputs(self, items: Sequence[Item], images: Sequence[Any]) -> Any:
        """Return what the model is given; the same for every variant, or by name of a variant what :meth:`look` gives it."""

    def front(self, inputs: Any, name: str) -> Front | None:
        """Return what smaller pictures leave in the inputs of a variant; None where it is given the whole ones."""

    def look(self, watched: Any, inputs: Any, name: str) -> Any:
        """Return what a variant makes of it, by :meth:`watch`'s.

        Raises:
            ValueError: it is not finite.
        """

    def own(self, seen: Any, items: Sequence[Item]) -> list[Entry]:
        """Return the scores of a variant, one entry per item."""

    def against(self, base: Any, seen: Any) -> list[Entry]:
        """Return the agreement of a plan with the unpruned model, one entry per item."""

    def scored(self, entries: Sequence[Mapping[str, Any]], found: BySample) -> BySample:
        """Return the scores by variant, with those that need all items at once."""


def evaluate(
    model: nn.Module,
    items: Sequence[Item],
    plans: Mapping[str, Plan],
    judge: Judge,
    *,
    conditions: Mapping[str, Any],
    facts: Mapping[str, Any],
    unusable: Sequence[Failure],
    groups: Mapping[str, str],
    batch: int,
    journal: str | os.PathLike[str] | None,
    tick: Callable[[int], None],
) -> Report:
    """Run every item through the model, unpruned and under each plan, and compare.

    The user's model is not touched: the variants are copies that share its weights.

    Args:
        model: in eval mode, without a plan.
        items: what it is to look at.
        plans: what to compare, by name.
        judge: what is scored.
        conditions: what results depend on besides model and plans: go into the record and the journal's key.
        facts: the same, from outside, e.g. the model's name.
        unusable: what was given and cannot be evaluated.
        groups: category of each item, by id; none: there are no categories.
        batch: items per forward.
        journal: file that keeps results, so that a killed run continues; see :class:`saint.lab.eval.Journal`.
        tick: called with the number of items dealt with since the last call.

    Raises:
        ValueError: no plan, a bad name of one, or nothing could be evaluated.
        AlreadyAppliedError: the model carries a plan.
        JournalError: the journal belongs to another run.
    """
    check_plans(plans, ("id", MARK))  # what else an entry of the journal holds
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    known = {
        **facts,
        "model_class": type(model).__name__,
        "weights": fingerprint(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        **conditions,
    }
    processes = Processes.here(parameter.device.type == "cpu")
    with variants(model, plans) as made:
        loop = Loop(
            _scorer(judge, made),
            journal=journal,
            key={"kind": judge.kind, **known, "plans": {name: plan.to_dict() for name, plan in plans.items()}},
            batch=batch,
            processes=processes,
            tick=tick,
        )
        outcome = loop.run(items)
    entries = list(outcome.entries.values())
    by_variant = judge.scored(entries, by_sample(entries, (BASE, *plans), judge.scores))
    return Report(
        given=len(items) + len(unusable),
        evaluated=len(entries),
        failures=[*unusable, *outcome.failures],
        plans=dict(plans),
        scores={plan: between(by_variant, BASE, plan) for plan in plans},
        agreement={plan: summaries(entries, plan, judge.agreement) for plan in plans},
        categories=_by_category(entries, groups, by_variant, plans),
        conditions={
            **known,
            "batch": batch,
            "processes": processes.world,
            "threads": torch.get_num_threads(),
            "resumed": outcome.resumed,
        },
        samples=by_variant,
    )


def _scorer(judge: Judge, made: Mapping[str, Variant]) -> Callable[[Sequence[Item], Sequence[Any]], list[Entry]]:
    """Return what scores a batch: every variant on the same inputs, then each plan against the unpruned model."""
    watched = {name: judge.watch(variant.model) for name, variant in made.items()}

    def score(items: Sequence[Item], images: Sequence[Any]) -> list[Entry]:
        inputs = judge.inputs(items, images)
        entries: list[Entry] = [{} for _ in items]
        seen: dict[str, Any] = {}
        for name, variant in made.items():
            seen[name] = judge.look(watched[name], inputs, name)
            left = _left(variant, judge.front(inputs, name), len(items))
            for entry, own, more in zip(entries, judge.own(seen[name], items), left, strict=True):
                entry[name] = {**own, **more}
        for name in (name for name in made if name != BASE):
            for entry, same in zip(entries, judge.against(seen[BASE], seen[name]), strict=True):
                entry[name] |= same
        return entries

    return score


def _left(variant: Variant, front: Front | None, count: int) -> list[Entry]:
    """Return the shares of the tokens and of the work that a plan leaves of each item; of smaller pictures the tokens too."""
    session = variant.session
    if session is None:
        return [{} for _ in range(count)]
    shares, work = kept(session, count), work_left(session)
    if front is None:
        found: list[Entry] = [{} for _ in range(count)] if shares is None else [{"kept": share} for share in shares]
    else:
        if not session.trace:  # a plan of smaller pictures alone
            shares, work = [1.0] * count, 1.0
        work = None if front.work is None or work is None else front.work * work
        pairs = list(zip(front.tokens, front.whole, strict=True))
        found = [{"visual_tokens": own, "visual_tokens_unpruned": whole} for own, whole in pairs]
        for entry, share, (own, whole) in zip(found, shares or (), pairs, strict=False):
            entry["kept"] = share * own / whole
    return found if work is None else [{**entry, "flops": work} for entry in found]


def _by_category(
    entries: Sequence[Mapping[str, Any]], groups: Mapping[str, str], found: BySample, plans: Iterable[str]
) -> dict[str, dict[str, dict[str, Paired]]]:
    """Return scores within each category; nothing where items have none."""
    members: dict[str, set[str]] = {}
    for entry in entries if groups else ():
        members.setdefault(groups[entry["id"]], set()).add(entry["id"])
    if not members or (len(members) == 1 and "" in members):
        return {}
    return {
        group or "(none)": {plan: between(found, BASE, plan, ids) for plan in plans}
        for group, ids in sorted(members.items())
    }
