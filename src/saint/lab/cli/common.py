"""Habits that several commands share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ...plans import Plan
    from ..bench import Spread
    from ..sources.listing import Left
    from ..sources.photos import Photo, Unreadable

out = Console()
err = Console(stderr=True)


def warn_busy(load: float | None, spreads: "Mapping[str, Spread]") -> None:
    """Say so when this machine was too busy for its times to mean much."""
    from ..bench.timing import disturbances

    for reason in disturbances(load, spreads):
        err.print(f"[yellow]note[/] {reason}", highlight=False)


def make_plan(default: "Plan", plan: str | None, threshold: float | None, layers: str | None) -> "Plan":
    """The plan the options ask for.

    Raises:
        ValueError: not a plan, or an option that does not fit its method.
    """
    from ..loading.plans import changed_plan, read_plan

    return changed_plan(default if plan is None else read_plan(plan), threshold, layers)


def show(record: dict[str, Any]) -> None:
    """Print the sheet of a record, which the report of the same record shows too."""
    from ..records import plain
    from ..report import Record
    from ..report.sheets import sheet_of
    from ..report.terminal import show as render

    render(out, sheet_of(Record("", Path(), plain(record))))


def save(file: Path, record: dict[str, Any]) -> None:
    """Write the record of ``--json``, and say so."""
    from ..records import write_json

    write_json(file, record)
    err.print(f"wrote {file}", highlight=False)


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
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr; yields the function that advances it, by one where no number is given."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)


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
