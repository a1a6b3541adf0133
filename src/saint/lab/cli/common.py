"""Habits that several commands share."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ...plans import Plan
    from ..bench import Spread
    from ..kinds import Subject
    from ..loading.plans import Choice
    from ..sources.items import Item
    from ..sources.listing import Left
    from ..sources.photos import Photo, Unreadable

out = Console()
err = Console(stderr=True)


def warn_busy(load: float | None, spreads: "Mapping[str, Spread]") -> None:
    """Say so when this machine was too busy for its times to mean much."""
    from ..bench.timing import disturbances

    for reason in disturbances(load, spreads):
        err.print(f"[yellow]note[/] {reason}", highlight=False)


class Named(NamedTuple):
    """A plan and what people call it."""

    name: str
    plan: "Plan"


@dataclass(frozen=True)
class Asked:
    """The plan that a command's options ask for, read before a model is loaded.

    Attributes:
        choice: of ``--plan``, ``--keep`` and ``--pixels``; None where none is given.
        threshold: of ``--threshold``.
        layers: of ``--layers``.
    """

    choice: "Choice | None"
    threshold: float | None = None
    layers: str | None = None

    @classmethod
    def read(
        cls,
        plan: str | None,
        keep: float | None,
        threshold: float | None = None,
        layers: str | None = None,
        pixels: str | None = None,
    ) -> "Asked":
        """Read what was typed.

        Raises:
            ValueError: not a plan, no share, or both.
        """
        from ..loading.plans import choose

        return cls(choose(plan, keep, pixels), threshold, layers)

    @property
    def changes(self) -> str:
        """Say what ``--threshold`` and ``--layers`` change, in words; "" for nothing."""
        given = {"threshold": self.threshold, "layers": self.layers}
        return "".join(f", {name} {value}" for name, value in given.items() if value is not None)

    @property
    def open(self) -> bool:
        """Tell whether nothing was asked for."""
        return self.choice is None and not self.changes

    def of(self, subject: "Subject") -> Named:
        """Return the plan for a model: where none is asked for one at half of its work, or its usual one with other settings.

        Raises:
            ValueError: an option that does not fit the plan's method, or a share that no plan leaves.
        """
        from ...plans import Plan
        from ..loading.plans import HALF, changed_plan

        if self.choice is None and self.changes:
            name, plan = USUAL, subject.plan or Plan()
        else:
            choice = self.choice or HALF
            name, plan = choice.name, subject.planned(choice)
        return Named(name + self.changes, changed_plan(plan, self.threshold, self.layers))


USUAL = "the usual plan"  # the name of the one that suits a model as published


def show(record: dict[str, Any]) -> None:
    """Print the sheet of a record, which the report of the same record shows too."""
    from ..records import plain
    from ..report import Record
    from ..report.sheets import sheet_of
    from ..report.terminal import show as render

    render(out, sheet_of(Record("", Path(), plain(record))))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", *, numbers: bool = True) -> None:
    """Print a table; see :func:`saint.lab.report.terminal.print_table`."""
    from ..report.terminal import print_table

    print_table(out, title, head, rows, numbers=numbers)


def save(file: Path, record: dict[str, Any]) -> None:
    """Write the record of ``--json``, and say so."""
    from ..records import write_json

    write_json(file, record)
    err.print(f"wrote {file}", highlight=False)


def inputs_of(subject: "Subject", items: "Sequence[Item]", bad: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Inputs of each item; ``bad`` gets those that cannot be read, and why."""
    from ..images import reason

    made = []
    for item in items:
        try:
            made.append(subject.inputs([item], [item.load()]))
        except (OSError, ValueError) as error:
            bad.append((item.where, reason(error)))
    return made


def pictures(images: Path | None, limit: int, left: "Left") -> tuple[list["Photo"], list["Unreadable"]]:
    """The user's images, or photographs that are there anyway; and what cannot be read.

    ``left`` gets what is left out, see :func:`saint.lab.sources.listing.find_pictures`.
    """
    from ..sources.photos import Photo, load_images

    if images is None:
        from ..demo import photos

        return [Photo(name, photo) for name, photo in photos()[:limit]], []
    good, bad = load_images(images, limit, left)
    return good, bad


def finish(left_out: Sequence[Sequence[str]], what: str = "read", things: str = "image(s)") -> None:
    """Name what was left out, each with the reason, and end with exit status 1 where there is anything.

    Args:
        left_out: where and why.
        what: could not be done with them.
        things: what they are.
    """
    if left_out:
        for where, reason in left_out[:20]:
            err.print(f"[yellow]skipped[/] {where}: {reason}", highlight=False)
        err.print(f"[yellow]{len(left_out)} {things} could not be {what}[/]")
        raise typer.Exit(1)


@contextmanager
def progress(what: str, total: int, hidden: bool = False) -> Iterator[Any]:
    """A bar on stderr, or where that is no terminal a line per tenth; yields the function that advances it.

    Args:
        what: is done.
        total: steps.
        hidden: show nothing.
    """
    if hidden:
        yield lambda count=1: None
        return
    if not err.is_terminal:
        yield lines(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)


_QUIET = 2.0  # s within which no second line is said
_AT_ONCE = 0.5  # s; what is done by then was there already


def lines(what: str, total: int, clock: Callable[[], float] = time.monotonic) -> Callable[..., None]:
    """Return what says in lines how far something is: behind the first step, then at each tenth, with what is to come.

    Args:
        what: is done.
        total: steps.
        clock: seconds.
    """
    begun = said = clock()
    done = told = at_once = 0

    def advance(count: int = 1) -> None:
        nonlocal done, told, said, at_once
        done += count
        now, tenth = clock(), 10 * done // max(1, total)
        if now - begun < _AT_ONCE:
            at_once += count
        elif at_once < done < total and (told == 0 or tenth > told) and now - said >= _QUIET:
            told, said = max(1, tenth), now
            left = (now - begun) / (done - at_once) * (total - done)
            err.print(f"{what}: {done} of {total}, about {_duration(left)} to go", highlight=False, markup=False)

    return advance


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say on stderr what is done that may take long: a line that goes away, or stays where stderr is no terminal."""
    if err.is_terminal:
        with err.status(what):
            yield
    else:
        err.print(f"{what} ...", highlight=False, soft_wrap=True, markup=False)
        yield


@contextmanager
def resumable(journal: Path | None) -> Iterator[None]:
    """An interruption ends with status 130 and says how to go on; results are in ``journal``, where there is one."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "nothing was kept"
        if journal is not None:
            kept = f"results so far are in {journal}: run the same command again to continue"
        err.print(f"[yellow]interrupted[/]; {kept}", highlight=False)
        raise typer.Exit(130) from None
