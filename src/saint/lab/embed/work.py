"""What a process with a model does: images in, rows out. The same here and in every actor of a cluster."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...errors import SaintError
from ...extras import require
from ...graph import vote
from ...plans import Plan
from ...session import apply
from ..eval.report import fingerprint
from ..images import reason
from ..kinds import Subject, kind_of
from ..sources.listing import printable
from .sources import Item, Reader

_PATIENCE = 4  # images that the model may fail on before its first success
_READERS = 8  # threads that read, decode and preprocess
_GRID = 14  # patches along the shorter side
_SAME = 0.95  # cosine of the pixels of two patches
_WINDOW = 4  # batches whose images are sorted among each other

ModelSource = str | Subject | Callable[[], Subject]
Row = dict[str, Any]
Prepared = Image.Image | Tensor  # preprocessed [3, height, width], where the model takes pictures of one size
Picture = Prepared | Exception


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made of each image. Plain data where ``model`` is a name, so that it can be sent to another process.

    Attributes:
        model: ``timm:NAME``, ``hf:NAME_OR_PATH``, ``open_clip:NAME/TAG`` or ``demo:NAME``; a subject of ``saint.lab.kinds``; or a
            function without arguments that returns one.
        plan: what is dropped.
        question: for vision-language models: answers instead of embeddings; None: embeddings.
        max_new_tokens: of an answer.
        pretrained: False gives random weights.
        size: side of the pictures in pixels; None means the model's own.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's.
    """

    model: ModelSource
    plan: Plan
    question: str | None = None
    max_new_tokens: int = 16
    pretrained: bool = True
    size: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.question is not None and not self.question.strip():
            raise ValueError("the question is empty")
        if self.question is not None and self.size is not None:
            raise ValueError("size is for encoders: the processor of a vision-language model chooses the size")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")

    @property
    def gives(self) -> str:
        """Return what rows hold, "answers" or "embeddings"."""
        return "embeddings" if self.question is None else "answers"

    @property
    def batch(self) -> int:
        """Images per forward where nobody says."""
        return 32 if self.question is None else 1

    @property
    def ragged(self) -> bool:
        """Tell whether images of a batch keep different numbers of tokens, and are padded to the longest."""
        stages = self.plan.vision
        return self.question is None and any(stage.method.votes and not stage.method.shared for stage in stages)

    def units(self, items: Sequence[Item], batch: int) -> list[list[Item]]:
        """The items in units that are made together: batches, or windows of batches where images are sorted.

        They depend on the listing, ``batch`` and the plan alone, so a run that continues makes the same ones.
        """
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        size = batch * (_WINDOW if self.ragged else 1)
        return [list(items[start : start + size]) for start in range(0, len(items), size)]

    def facts(self) -> dict[str, Any]:
        """Return what rows depend on, plain data for the manifest."""
        if isinstance(self.model, Subject):
            name = self.model.spec or type(self.model.model).__name__
        else:
            name = self.model if isinstance(self.model, str) else getattr(self.model, "__qualname__", "a function")
        facts = {"model": name, "pretrained": self.pretrained, "size": self.size, "dtype": self.dtype}
        asked = {} if self.question is None else {"question": self.question, "max_new_tokens": self.max_new_tokens}
        return {"rows": self.gives, **facts, **asked, "plan": self.plan.to_dict()}

    def schema(self) -> Any:
        """The ``pyarrow.Schema`` of the rows."""
        arrow = require("pyarrow", "embed")
        point = arrow.struct([("stage", arrow.string()), ("layer", arrow.int32()), ("tokens", arrow.int32())])
        text = arrow.string()
        made = [("embedding", arrow.list_(arrow.float32()))]
        if self.question is not None:
            made = [("question", text), ("answer", text)]
        return arrow.schema(
            [
                ("key", text), ("path", text), *made, ("tokens", arrow.int32()), ("kept", arrow.list_(point)),
                ("plan", text), ("error", text),
            ]
        )  # fmt: skip

    def table(self, rows: Sequence[Row]) -> Any:
        """Rows as a ``pyarrow.Table``."""
        arrow = require("pyarrow", "embed")
        schema = self.schema()
        columns = [arrow.array([row.get(field.name) for row in rows], field.type) for field in schema]
        return arrow.Table.from_arrays(columns, schema=schema)

    def load(self, device: str) -> Subject:
        """The model, in eval mode.

        Raises:
            TypeError: the function returned something else, or a model of another kind.
        """
        found: Any = self.model
        if isinstance(found, str):
            number = None if self.dtype == "auto" else getattr(torch, self.dtype)
            return kind_of(found, self.gives).load(found, device, self.pretrained, size=self.size, dtype=number)
        found = found() if callable(found) else found
        if not isinstance(found, Subject) or found.gives != self.gives:
            got = f"{found.called}" if isinstance(found, Subject) else f"a {type(found).__name__}"
            raise TypeError(f"{self.gives} need a subject of saint.lab.kinds that gives them, got {got}")
        return found


class Worker:
    """A loaded model under its plan. A context manager: behind it the model is as it was.

    Attributes:
        weights: fingerprint of the model's weights.
    """

    def __init__(self, job: Job, device: str = "auto") -> None:
        self.job = job
        plan, self.subject = job.load(device).fitted(job.plan)
        self.weights = fingerprint(self.subject.model)
        self.plan = json.dumps(job.plan.to_dict(), sort_keys=True)
        self.session = apply(self.subject.model, plan)
        self._open = ExitStack()
        self._rows = self._open.enter_context(self.subject.rows(job.max_new_tokens))
        self._failed, self._succeeded = 0, False

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()
        self.session.remove()

    def prepare(self, image: Image.Image) -> Prepared:
        """Return what can be done of an image outside the model, in a thread of its own."""
        return self.subject.prepared(image)

    def rows(
        self, keys: Sequence[str], paths: Sequence[str], pictures: Sequence[Picture], questions: Sequence[str] = ()
    ) -> list[Row]:
        """One row per image, in order; what could not be read, or what the model failed on, has an ``error``.

        Args:
            keys: of the rows.
            paths: files to look at.
            pictures: images as :meth:`prepare` gives them, or why there is none.
            questions: one per image; none means the job's.

        Raises:
            SaintError: the model cannot do what the plan asks.
            torch.OutOfMemoryError: the batch is too large.
            Exception: what the model raised, where it fails on the first images already.
        """
        rows: list[Row] = [{"key": k, "path": p, "plan": self.plan} for k, p in zip(keys, paths, strict=True)]
        if self.job.question is not None:
            asked: Sequence[str | None] = questions or [self.job.question] * len(rows)
            for row, question in zip(rows, asked, strict=True):
                row["question"] = question
        good: list[tuple[Row, Prepared]] = []
        for row, picture in zip(rows, pictures, strict=True):
            if isinstance(picture, Exception):
                row["error"] = reason(picture)
            else:
                good.append((row, picture))
        self._run(good)
        return rows

    def _run(self, good: list[tuple[Row, Prepared]]) -> None:
        if not good:
            return
        try:
            made = self._forward([row for row, _ in good], [picture for _, picture in good])
        except (SaintError, torch.OutOfMemoryError):
            raise  # about the model, the plan or the batch, not about an image
        except Exception as error:
            if len(good) > 1:  # find the one that is to blame
                for pair in good:
                    self._run([pair])
                return
            self._failed += 1
            if not self._succeeded and self._failed >= _PATIENCE:
                raise
            good[0][0]["error"] = reason(error)
            return
        self._succeeded = True
        for (row, _), result in zip(good, made, strict=True):
            row.update(result)

    def _forward(self, rows: Sequence[Row], images: Sequence[Any]) -> list[Row]:
        made = self._rows([row.get("question") or "" for row in rows], images)
        for row, counts in zip(made, self._kept(len(images)), strict=True):
            whole, left = row.get("tokens"), row.get("kept", [])  # of smaller pictures in front of the model
            row.update(counts, kept=left + counts["kept"], tokens=counts["tokens"] if whole is None else whole)
        return made

    def _kept(self, batch: int) -> list[Row]:
        """Tokens before the first drop point and behind each; of stages that count per sample."""
        trace = [step for step in self.session.trace if len(step.tokens_in) == batch]
        found: list[Row] = [{"tokens": None, "kept": []} for _ in range(batch)]
        for step in trace:
            for row, before, after in zip(found, step.tokens_in.tolist(), step.tokens_out.tolist(), strict=True):
                row["tokens"] = before if row["tokens"] is None else row["tokens"]
                row["kept"].append({"stage": step.stage, "layer": step.layer, "tokens": after})
        return found


def picture(read: Callable[[], Prepared]) -> Picture:
    """Return what ``read`` returns, or what it raises."""
    try:
        return read()
    except Exception as error:  # whatever a decoder raises on broken data
        return error


def sameness(pixels: Tensor) -> int:
    """Tell how redundant the patches of [3, height, width] are: votes of the paper's graph on their pixels. Costs no model.

    On 250 photographs its rank correlation with the tokens that CLIP ViT-B/16 drops (threshold 0.75) is 0.82; that of bytes per
    pixel of the file is 0.67, that of differences between neighbouring pixels 0.61.
    """
    side = max(1, min(pixels.shape[1:]) // _GRID)
    patches = torch.nn.functional.unfold(pixels[None], side, stride=side)  # [1, D, N]
    return int(vote(patches.transpose(1, 2), _SAME).votes.sum())


def alike(pictures: Sequence[Picture], batch: int) -> list[list[int]]:
    """Places of ``pictures`` in batches of similar sameness; in their order where they fit into one."""
    order = list(range(len(pictures)))
    if len(order) > batch:
        same = [sameness(one) if isinstance(one, Tensor) else -1 for one in pictures]
        order.sort(key=lambda place: same[place])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def stream(worker: Worker, units: Iterable[Sequence[Item]], batch: int) -> Iterator[list[Row]]:
    """Rows of each batch of each unit; the next unit is read, decoded and preprocessed while one is in the model."""
    reader = Reader()

    def read(item: Item) -> Picture:
        return picture(lambda: worker.prepare(reader(item)))

    queue = iter(units)
    with ThreadPoolExecutor(_READERS) as pool:

        def ahead() -> tuple[Sequence[Item], list[Future[Picture]]]:
            items = next(queue, [])
            return items, [pool.submit(read, item) for item in items]

        items, coming = ahead()
        while items:
            now, futures = items, coming
            items, coming = ahead()
            pictures = [future.result() for future in futures]
            for places in alike(pictures, batch):
                some = [now[i] for i in places]
                yield worker.rows(
                    [i.key for i in some], [printable(i.path) for i in some], [pictures[i] for i in places]
                )
