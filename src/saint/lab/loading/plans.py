"""Plans as users give them: as text, and changed by options."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ...methods.base import check_budget
from ...plans import Plan


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan as it was asked for, before a model is there.

    Attributes:
        name: for people: the recipe's, the file's, "plan" of JSON text, "keep 0.5" of a share.
        plan: None where a share is asked for.
        keep: share of the model's work that a plan made for it leaves; None where there is a plan, and of smaller pictures alone.
        pixels: where there is none, what pictures are shrunk to in front of the one that is made; see :class:`saint.Plan`.
    """

    name: str
    plan: Plan | None = None
    keep: float | None = None
    pixels: int | float | None = None

    @classmethod
    def share(cls, keep: float) -> "Choice":
        """A share of the work.

        Raises:
            ValueError: not in (0, 1].
        """
        if not 0 < keep <= 1:
            raise ValueError(f"a share of the work is in (0, 1], e.g. --keep 0.5 for half of it; got {keep:g}")
        return cls(f"keep {keep:g}", keep=keep)

    @classmethod
    def read(cls, text: str) -> "Choice":
        """Read what ``text`` asks for: a share ("0.5"), or what :func:`read_plan` reads."""
        try:
            share = float(text)
        except ValueError:
            named = (
                "plan" if text.lstrip().startswith(("{", "[")) else Path(text).name if text.endswith(".json") else text
            )
            return cls(named, read_plan(text))
        return cls.share(share)

    def smaller(self, pixels: int | float | None) -> "Choice":
        """The same with smaller pictures in front, and a name that says so; None leaves them."""
        if pixels is None:
            return self
        name = f"{self.name}, pixels {pixels}"
        if self.plan is None:
            return dataclasses.replace(self, name=name, pixels=pixels)
        return dataclasses.replace(self, name=name, plan=self.plan.resized(pixels))


HALF = Choice.share(0.5)  # what a command runs where nobody names a plan


def read_pixels(text: str | None) -> int | float | None:
    """Read the option ``--pixels``: a share such as 0.6, or a number of patches.

    Raises:
        ValueError: neither.
    """
    if text is None:
        return None
    try:
        pixels = float(text) if "." in text or "e" in text.lower() else int(text)
        check_budget(pixels, name="pixels")
    except ValueError:
        raise ValueError(
            f"--pixels is the share of the pixels that pictures are shrunk to, such as 0.6, or how many patches they have at "
            f"most, such as 256; got {text}"
        ) from None
    return pixels


def choose(plan: str | None, keep: float | None, pixels: str | None = None) -> Choice | None:
    """Read what the options ``--plan``, ``--keep`` and ``--pixels`` ask for; None where none is given.

    Raises:
        ValueError: both, no plan, or no share.
    """
    if plan is not None and keep is not None:
        raise ValueError(f"--keep {keep:g} makes a plan for the model, and --plan gives one: give one of them")
    smaller = read_pixels(pixels)
    if keep is not None:
        return Choice.share(keep).smaller(smaller)
    if plan is None:
        return None if smaller is None else Choice(f"pixels {smaller}", pixels=smaller)
    return Choice.read(plan).smaller(smaller)


def choose_several(texts: Sequence[str]) -> list[Choice]:
    """Read what each of ``texts`` asks for, no two under one name: several plans in JSON are "plan1", "plan2" and so on.

    Raises:
        ValueError: one is no plan, or given twice.
    """
    read = [Choice.read(text) for text in texts]
    bare = [choice for choice in read if choice.name == "plan"]
    names = {id(choice): f"plan{number}" for number, choice in enumerate(bare, 1)}
    read = [dataclasses.replace(choice, name=names.get(id(choice), choice.name)) for choice in read]
    twice = [
        choice.name for number, choice in enumerate(read) if choice.name in {other.name for other in read[:number]}
    ]
    if twice:
        raise ValueError(f"the plan {twice[0]} is given twice")
    return read


def read_plan(text: str) -> Plan:
    """The plan that ``text`` is, names or holds: :meth:`saint.Plan.load` of text."""
    return Plan.load(text)


def changed_plan(plan: Plan, threshold: float | None, layers: str | None) -> Plan:
    """``plan`` with another threshold or other drop points in its vision stage; None leaves them.

    Raises:
        ValueError: there is not one vision stage, or its method has no threshold.
    """
    if threshold is None and layers is None:
        return plan
    stages = plan.vision
    if len(stages) != 1:
        held = f"this plan has {len(stages) or 'none'}"
        raise ValueError(
            f"--threshold and --layers change the one vision stage of a plan, and {held}: write it into the plan (--plan)"
        )
    stage = stages[0]
    if threshold is not None:
        if "threshold" not in {field.name for field in dataclasses.fields(stage.method)}:
            raise ValueError(f"--threshold does not fit the method {stage.method.name}, which has none")
        stage = dataclasses.replace(stage, method=dataclasses.replace(stage.method, **{"threshold": threshold}))
    if layers is not None:
        stage = dataclasses.replace(stage, layers=layers)
    return dataclasses.replace(plan, vision=(stage,))
