"""Embeddings or answers of a source of images, in one process."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...extras import require
from ...session import PlanLike, as_plan
from ..eval.report import digest
from ..sources.listing import printable
from .parts import Parts, files
from .sources import Item, find_items
from .work import Job, ModelSource, Worker, stream


@dataclass(frozen=True)
class Rows:
    """The rows of a run; iterating gives each as a dict, without loading all of them.

    Attributes:
        count: how many there are: one per image of the source.
        errors: how many of them have an error in place of a result.
        resumed: how many were on disk already.
        output: folder with the parts; None where the rows are in memory.
    """

    count: int
    errors: int
    resumed: int
    output: Path | None
    memory: Any = None  # a pyarrow.Table where there is no output

    @classmethod
    def of(cls, output: Path, resumed: int = 0) -> "Rows":
        """What lies in ``output``."""
        dataset, compute = require("pyarrow.dataset", "embed"), require("pyarrow.compute", "embed")
        rows = dataset.dataset([str(file) for file in files(output)])
        return cls(rows.count_rows(), rows.count_rows(filter=compute.field("error").is_valid()), resumed, output)

    def table(self) -> Any:
        """All rows as a ``pyarrow.Table``."""
        if self.output is None:
            return self.memory
        return require("pyarrow.dataset", "embed").dataset([str(file) for file in files(self.output)]).to_table()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.output is None:
            yield from self.memory.to_pylist()
            return
        for file in files(self.output):
            yield from require("pyarrow.parquet", "embed").read_table(file).to_pylist()


def embed(
    source: str | os.PathLike[str],
    model: ModelSource,
    plan: PlanLike,
    *,
    question: str | None = None,
    max_new_tokens: int = 16,
    output: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    device: str = "auto",
    pretrained: bool = True,
    size: int | None = None,
    dtype: str = "auto",
    column: str | None = None,
    rows: int = 1000,
    tick: Callable[[int], None] = lambda _: None,
) -> Rows:
    """Embed every image of ``source`` under ``plan`` (what goes into the model's classifier, or its output), or ask about it.

    Args:
        source: a folder of images, ``.parquet`` files or ``.tar`` shards; see :func:`find_items`.
        model: ``timm:NAME``, ``hf:NAME_OR_PATH``, ``open_clip:NAME/TAG`` or ``demo:NAME``, or a subject of ``saint.lab.kinds``;
            of a vision-language model with a ``question``.
        plan: like that of :func:`saint.apply`; ``saint.Plan()`` drops nothing.
        question: what a vision-language model is asked about every image; rows hold ``answer`` in place of ``embedding``.
        max_new_tokens: of an answer, which is greedy.
        output: folder for the rows. A run that was killed and is started again with the same arguments continues, and every row
            is written once. None keeps the rows in memory.
        batch: images per forward; None means 32, with a question 1.
        device: auto, cpu, cuda, cuda:1 or mps.
        pretrained: False gives random weights (always the same).
        size: side of the pictures in pixels; None means the model's own.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's.
        column: of parquet files.
        rows: per part.
        tick: called with the number of images dealt with since the last call.

    Returns:
        One row per image, with an ``error`` where it could not be read.

    Raises:
        OutputError: ``output`` holds another run, or is in use.
        FileNotFoundError, ValueError: no such source, model or plan.

    Example:
        >>> rows = embed("photos", "demo:clip-b16", "vit/published", output="out")  # doctest: +SKIP
        >>> rows.table().column("embedding")  # doctest: +SKIP
    """
    job = Job(model, as_plan(plan), question, max_new_tokens, pretrained, size, dtype)
    batch = job.batch if batch is None else batch
    return run(find_items(source, column=column), source, job, output, batch=batch, device=device, rows=rows, tick=tick)


def facts_of(job: Job, source: str | os.PathLike[str], items: Sequence[Item], batch: int) -> dict[str, Any]:
    """What the manifest of a run holds: model, plan and source."""
    listing = digest([[item.key, item.size, item.column, item.error] for item in items])
    told = {"name": printable(Path(source).resolve().name), "images": len(items), "listing": listing}
    return {**job.facts(), "batch": batch, "source": told}


def check_output(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse an output folder inside the source: its parts would be listed as images.

    Raises:
        ValueError: it is.
    """
    if Path(source).is_dir() and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"the output {output} lies inside the source {source}: give a folder elsewhere")


def run(
    items: Sequence[Item],
    source: str | os.PathLike[str],
    job: Job,
    output: str | os.PathLike[str] | None,
    *,
    batch: int,
    device: str,
    rows: int,
    tick: Callable[[int], None],
) -> Rows:
    """:func:`embed` behind the listing of the source."""
    if output is None:
        units = job.units(items, batch)
        with Worker(job, device) as worker:
            made = []
            for found in stream(worker, units, batch):
                made += found
                tick(len(found))
        return Rows(len(made), sum(row.get("error") is not None for row in made), 0, None, job.table(made))

    def make(left: list[Sequence[Item]], parts: Parts) -> None:
        with Worker(job, device) as worker:
            parts.check_weights(worker.weights)
            for found in stream(worker, left, batch):
                tick(parts.add(job.table(found)))

    return written(items, source, job, output, batch=batch, rows=rows, tick=tick, make=make)


def written(
    items: Sequence[Item],
    source: str | os.PathLike[str],
    job: Job,
    output: str | os.PathLike[str],
    *,
    batch: int,
    rows: int,
    tick: Callable[[int], None],
    make: Callable[[list[Sequence[Item]], Parts], None],
) -> Rows:
    """The rows of a run in ``output``: ``make`` adds those of the units that an earlier run left, wherever its models are."""
    units = job.units(items, batch)
    check_output(source, output)
    with Parts(output, facts_of(job, source, items, batch), rows) as parts:
        resumed = len(parts.done)
        tick(resumed)
        left = parts.missing(units)
        if left:
            make(left, parts)
        parts.finish(len(items))
    return Rows.of(Path(output), resumed)
