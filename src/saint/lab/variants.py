"""Copies of a model that share its weights, one under each plan: what every comparison runs."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..errors import AlreadyAppliedError
from ..plans import Plan
from ..session import PlanLike, Session, pruned, status

BASE = "base"  # the name of the unpruned one


class Variant(NamedTuple):
    """A copy of the model; ``session`` is None of the unpruned one."""

    model: Any
    session: Session | None


@contextmanager
def variants(
    model: nn.Module, plans: Mapping[str, PlanLike], observers: Mapping[str, Sequence[object]] | None = None
) -> Iterator[dict[str, Variant]]:
    """Yield the unpruned model as "base", then one copy per plan, by name; the user's model is not touched.

    Args:
        model: in eval mode, without a plan.
        plans: what to apply, by name.
        observers: of the sessions, by name of the plan.

    Raises:
        AlreadyAppliedError: the model carries a plan.
        ValueError: what :func:`saint.apply` raises.
    """
    if status(model) is not None:
        raise AlreadyAppliedError("the model to compare carries a plan; call saint.remove(model) first")
    with ExitStack() as stack:
        made = {BASE: Variant(copy_sharing_weights(model), None)}
        for name, plan in plans.items():
            twin = copy_sharing_weights(model)
            session = stack.enter_context(pruned(twin, plan, observers=list((observers or {}).get(name, ()))))
            made[name] = Variant(twin, session)
        yield made


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """Return a second model on the same weights: its own modules, hooks and config, but shared parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def check_plans(plans: Mapping[str, Plan], taken: Sequence[str] = ()) -> None:
    """Refuse plans that cannot be compared by name.

    Args:
        plans: by name.
        taken: names that mean something else.

    Raises:
        ValueError: no plan, or one called "base" or one of ``taken``.
    """
    taken = (BASE, *taken)
    if not plans or set(taken) & set(plans):
        names = ", ".join(f'"{name}"' for name in taken)
        raise ValueError(f"give at least one plan, none of them called {names}, got {list(plans)}")
