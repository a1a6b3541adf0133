"""`saint report RECORD...`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import err, out


def report(
    records: Annotated[
        list[Path], typer.Argument(help="records: what --json FILE of the other commands wrote", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the page")] = Path("report.html"),
) -> None:
    """One HTML page from records of saint analyze, bench, eval, demo, tune and view.

    A single file: nothing is fetched when it is opened. Records of speed and of accuracy for the same model and plans are also
    plotted against each other.
    """
    from ...files import write_whole
    from ..report import make_report, read_records

    if output.is_dir():
        raise IsADirectoryError(f"-o needs a file name, {output} is a directory")
    if output.resolve() in {file.resolve() for file in records}:
        raise ValueError(f"-o {output} is one of the records: the page would take its place; name another file")
    with err.status("reading"):
        page = make_report(read_records(records))
    write_whole(output, page.encode())
    out.print(
        f"wrote {output} ({len(page.encode()) / 1e3:.0f} kB, {len(records)} record{'s' if len(records) != 1 else ''})",
        highlight=False,
    )
