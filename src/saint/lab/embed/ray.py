"""Embeddings and answers on a Ray cluster: Ray Data schedules, retries and moves; a model lives in each actor.

Ray delivers the output of a task once, however often an actor died in it, and the driver alone writes (``parts``), so
every row is written once. Nothing here but the driver needs the output folder.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import SaintError
from ...extras import require
from ...session import PlanLike, as_plan
from ..images import as_rgb, read_image
from ..sources.listing import known
from .parts import Parts
from .run import Rows, written
from .sources import NAMES, Item, Reader, find_items, located
from .work import Job, ModelSource, Worker, picture, stream

_KEYS = ("key", "__key__", "id", "path")  # columns of a data set that name its rows
_TOGETHER = 2  # units per task: one is read while another is in the model; what a killed actor repeats
_WEIGHTS = "weights"  # a column between actors and driver


def embed(
    dataset: Any,
    model: ModelSource,
    plan: PlanLike,
    *,
    question: str | None = None,
    max_new_tokens: int = 16,
    output: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    pretrained: bool = True,
    size: int | None = None,
    dtype: str = "auto",
    column: str | None = None,
    key: str | None = None,
    rows: int = 1000,
    tick: Callable[[int], None] = lambda _: None,
) -> Any:
    """Embed every image of a data set under ``plan``, or ask about it; the rows of :func:`saint.lab.embed.embed`, in any order.

    Args:
        dataset: a ``ray.data.Dataset`` with a column of images (arrays as ``read_images`` gives them, bytes, or paths), or a
            source like that of :func:`saint.lab.embed.embed`, which every node of the cluster sees under the same path.
        model: ``timm:NAME``, ``hf:NAME_OR_PATH``, ``open_clip:NAME/TAG`` or ``demo:NAME``, or a function without arguments that
            returns a subject of ``saint.lab.kinds``; it is called in every actor. Of a vision-language model with a ``question``.
        plan: like that of :func:`saint.apply`.
        question: see :func:`saint.lab.embed.embed`.
        max_new_tokens: of an answer.
        output: folder for the rows, which only this process writes. A run whose driver was killed continues when it is started
            again, and every row is written once. None: nothing runs before the result is asked for.
        batch: images per forward; None means 32, with a question 1.
        workers: actors, each with a model; None means one per GPU of the cluster, or per CPU where it has none.
        gpus: of an actor; None means 1 where the cluster has any.
        pretrained: False gives random weights (always the same).
        size: side of the pictures in pixels; None means the model's own.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's.
        column: with the images; None means the one that is called like them.
        key: column of a ``Dataset`` with a unique name per row; None means "key", "__key__", "id" or "path", whichever is there.
        rows: per part.
        tick: called with the number of rows written since the last call.

    Returns:
        A ``ray.data.Dataset`` of the rows: lazy, or what lies in ``output``.

    Raises:
        OutputError: ``output`` holds another run, is in use, or a key came twice.
        ValueError, FileNotFoundError: no such source, model, plan or column.

    Example:
        >>> import ray
        >>> from saint.lab.embed.ray import embed
        >>> images = ray.data.read_binary_files("photos", include_paths=True)  # doctest: +SKIP
        >>> embed(images, "demo:clip-b16", "vit/published").write_parquet("out")  # doctest: +SKIP
    """
    job = Job(model, as_plan(plan), question, max_new_tokens, pretrained, size, dtype)
    batch = job.batch if batch is None else batch
    return _made(dataset, job, output, batch, workers, gpus, column, key, rows, tick)


def _made(
    dataset: Any, job: Job, output: str | os.PathLike[str] | None, batch: int, workers: int | None, gpus: float | None,
    column: str | None, key: str | None, rows: int, tick: Callable[[int], None],
) -> Any:  # fmt: skip
    data = require("ray.data", "ray")
    if isinstance(dataset, (str, os.PathLike)):
        items = find_items(dataset, column=column)
        if output is None:
            return _of_units(job, job.units(items, batch), batch, workers, gpus, stamp=False)
        run(items, dataset, job, output, batch=batch, rows=rows, workers=workers, gpus=gpus, tick=tick)
    elif not isinstance(dataset, data.Dataset):
        raise TypeError(f"a ray.data.Dataset or a path is expected, got {type(dataset).__name__}")
    elif output is None:
        return _of_rows(job, dataset, batch, workers, gpus, column, key, stamp=False)
    else:
        facts = {**job.facts(), "batch": batch, "source": {"dataset": True, "column": column, "key": key}}
        with Parts(output, facts, rows) as parts:
            tick(len(parts.done))
            left = dataset
            if parts.done:
                done = require("ray", "ray").put(parts.done)
                left = dataset.map_batches(lambda table: _missing(table, done, key), batch_format="pyarrow")
            _write(_of_rows(job, left, batch, workers, gpus, column, key, stamp=True), parts, tick)
            parts.finish()
    # a folder, not its files: Ray 2.60 resolves a list in threads, which fails now and then where aiohttp is not installed
    return data.read_parquet(str(output), file_extensions=["parquet"])


def run(
    items: Sequence[Item],
    source: str | os.PathLike[str],
    job: Job,
    output: str | os.PathLike[str],
    *,
    batch: int,
    rows: int,
    workers: int | None = None,
    gpus: float | None = None,
    tick: Callable[[int], None],
) -> Rows:
    """:func:`run.run` on a cluster: the same batches, the same rows, the same folder; either continues the other."""

    def make(left: list[Sequence[Item]], parts: Parts) -> None:
        _write(_of_units(job, left, batch, workers, gpus, stamp=True), parts, tick)

    return written(items, source, job, output, batch=batch, rows=rows, tick=tick, make=make)


@contextmanager
def local_cluster() -> Iterator[None]:
    """The cluster that ``RAY_ADDRESS`` names, or one of this machine's CPUs and GPUs that ends with the block; Ray is quiet."""
    ray = require("ray", "ray")
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    ray.init(
        include_dashboard=None if "RAY_ADDRESS" in os.environ else False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        context = require("ray.data", "ray").DataContext.get_current()
        context.enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


# -- the driver -------------------------------------------------------------------------------------------------------


def _of_units(
    job: Job, units: Sequence[Sequence[Item]], batch: int, workers: int | None, gpus: float | None, *, stamp: bool
) -> Any:
    """Rows of the items; each unit is a row of what goes in, so that Ray cannot mix them."""
    data = require("ray.data", "ray")
    blocks = -(-len(units) // _TOGETHER)
    planned = data.from_items([{"items": pickle.dumps(list(unit))} for unit in units], override_num_blocks=blocks)
    return _mapped(planned, _UnitActor, (job, stamp, batch), _TOGETHER, workers, gpus, reads=False)


def _of_rows(
    job: Job, dataset: Any, batch: int, workers: int | None, gpus: float | None, column: str | None, key: str | None,
    *, stamp: bool,
) -> Any:  # fmt: skip
    return _mapped(dataset, _RowActor, (job, stamp, column, key), batch, workers, gpus, reads=True)


def _mapped(
    dataset: Any, actor: type, arguments: tuple[Any, ...], batch: int, workers: int | None, gpus: float | None,
    *, reads: bool,
) -> Any:  # fmt: skip
    ray = require("ray", "ray")
    strategy = require("ray.data", "ray").ActorPoolStrategy
    if not ray.is_initialized():
        ray.init()
    held = ray.cluster_resources()
    gpus = min(1, held.get("GPU", 0)) if gpus is None else gpus
    # tasks that read a data set need CPUs of their own
    most = int(held["GPU"] // gpus) if gpus else max(1, int(held.get("CPU", 1)) - reads)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    return dataset.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=batch,
        batch_format="numpy",
        compute=strategy(size=workers or most),
        num_cpus=1,
        num_gpus=gpus or None,
    )


def _write(made: Any, parts: Parts, tick: Callable[[int], None]) -> None:
    """Run, and write what arrives."""
    exceptions = require("ray.exceptions", "ray")
    try:
        for table in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            if len(table):
                parts.check_weights(table.column(_WEIGHTS)[0].as_py())
                tick(parts.add(table.drop_columns([_WEIGHTS])))
    except exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, exceptions.RayTaskError) or (
            cause is not None and type(cause).__name__ == "UserCodeException"
        ):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, (SaintError, ValueError, OSError)):
            raise cause from error
        raise


def _missing(table: Any, done: Any, key: str | None) -> Any:
    keys = require("ray", "ray").get(done)
    name = _pick(table.column_names, key, _KEYS, "key")
    return table.filter([value not in keys for value in map(str, table.column(name).to_pylist())])


def _images() -> tuple[str, ...]:
    """Columns that may hold images; those of webdataset shards are called like endings."""
    return ("image", "bytes", "jpg", "png", *sorted(ending.removeprefix(".") for ending in known()), *NAMES)


def _pick(names: Sequence[str], wanted: str | None, among: Sequence[str], option: str) -> str:
    found = [name for name in ((wanted,) if wanted is not None else among) if name in names]
    if not found:
        looked = wanted if wanted is not None else ", ".join(among[:6])
        raise ValueError(f"no column {looked} among {', '.join(names)}: name one ({option}=)")
    return found[0]


# -- the actors -------------------------------------------------------------------------------------------------------


class _Actor:
    """A model under its plan, which makes tables of rows; with ``stamp`` the weights' fingerprint is a column of its own."""

    def __init__(self, job: Job, stamp: bool) -> None:
        self.stamp = stamp
        self.failed: Exception | None = None
        try:
            gpu = bool(require("ray", "ray").get_gpu_ids())
            self.worker = Worker(job, "cuda" if gpu else "cpu")
        except (
            Exception
        ) as error:  # raised by the first call: of an actor that could not start, Ray hands on nothing but text
            self.failed = error

    def started(self) -> Worker:
        if self.failed is not None:
            raise self.failed
        return self.worker

    def table(self, rows: list[dict[str, Any]]) -> Any:
        table = self.worker.job.table(rows)
        return table.append_column(_WEIGHTS, [[self.worker.weights] * len(table)]) if self.stamp else table


class _UnitActor(_Actor):
    def __init__(self, job: Job, stamp: bool, batch: int) -> None:
        super().__init__(job, stamp)
        self.batch = batch

    def __call__(self, units: dict[str, np.ndarray]) -> Iterator[Any]:
        for rows in stream(self.started(), [pickle.loads(items) for items in units["items"]], self.batch):
            yield self.table(rows)


class _RowActor(_Actor):
    def __init__(self, job: Job, stamp: bool, column: str | None, key: str | None) -> None:
        super().__init__(job, stamp)
        self.column, self.key = column, key
        self.pool, self.reader = ThreadPoolExecutor(8), Reader()

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        names = list(batch)
        column = _pick(names, self.column, _images(), "column")
        keys = [str(value) for value in batch[_pick(names, self.key, _KEYS, "key")]]
        paths = [str(value) for value in batch["path"]] if "path" in names else keys
        worker = self.started()
        pictures = self.pool.map(lambda value: picture(lambda: worker.prepare(self.read(value))), batch[column])
        return self.table(worker.rows(keys, paths, list(pictures)))

    def read(self, value: Any) -> Image.Image:
        if isinstance(value, np.ndarray):
            return as_rgb(Image.fromarray(value))
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return read_image(value)
        return self.reader(located("", value, Path()))
