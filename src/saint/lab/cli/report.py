"""`saint report RECORD...`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import doing, out


def report(
    records: Annotated[
        list[Path], typer.Argument(help="records: what --json FILE of the other commands wrote", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="the page; FILE.md: as Markdown, without pictures")
    ] = Path("report.html"),
) -> None:
    """One page from records of saint analyze, bench, eval, demo, tune and view: HTML, or Markdown for an issue or a repository.

    A single file: nothing is fetched when it is opened. Records of speed and of accuracy for the same model and plans are also
    plotted against each other.
    """
    from ...files import write_whole
    from ..report import make_markdown, make_report, read_records

    if output.is_dir():
        raise IsADirectoryError(f"-o needs a file name, {output} is a directory")
    if output.resolve() in {file.resolve() for file in records}:
        raise ValueError(f"-o {output} is one of the records: the page would take its place; name another file")
    with doing("reading"):
        read = read_records(records)
        page = make_markdown(read) if output.suffix.lower() == ".md" else make_report(read)
    write_whole(output, page.encode())
    out.print(
        f"wrote {output} ({len(page.encode()) / 1e3:.0f} kB, {len(records)} record{'s' if len(records) != 1 else ''})",
        highlight=False,
    )
