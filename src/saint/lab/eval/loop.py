"""The loop that all evaluations share: read, score, write down; over processes, with failures told and kept apart."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import SaintError
from ...extras import require
from ..records import differences
from ..sources.items import Failure, Item
from .journal import Journal, JournalError

MARK = "item"  # of a journal's entry: what tells the item from another with its id
_PATIENCE = 4  # samples that the model may fail on before its first success


@dataclass(frozen=True)
class Outcome:
    """What the loop made of the items.

    Attributes:
        entries: results by id, in the order of the items.
        failures: items without a result.
        resumed: how many results were in the journal already.
    """

    entries: dict[str, dict[str, Any]]
    failures: list[Failure]
    resumed: int


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that ``accelerate launch`` started; one of one otherwise."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls, cpu: bool = False) -> "Processes":
        """Of this process.

        Args:
            cpu: talk over gloo even where there is CUDA.

        Raises:
            MissingExtraError: several were launched and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        state = require("accelerate", "eval").PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes joined, in order of rank; the same on every process."""
        if self.world == 1:
            return mine
        from accelerate.utils import gather_object

        return list(gather_object(mine))


Picture = Image.Image | None  # what an item loads


class Loop:
    """Evaluate items in batches.

    Args:
        score: results of a batch from its items and their images, one per item, as plain data without ``id``. Images are read
            in threads, ahead of the model; an item whose image cannot be read fails.
        journal: file for the results, or None.
        key: what the results depend on, for the journal; the batch size is added.
        batch: items per call of ``score``.
        processes: among which the items are split.
        tick: called with the number of items dealt with since the last call.
        mark: plain data that tells an item from another with its id; a result of another is refused. Not part of the key, so
            that an item that failed can be mended.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Item], Sequence[Any]], list[dict[str, Any]]],
        *,
        journal: str | os.PathLike[str] | None,
        key: Mapping[str, Any],
        batch: int,
        processes: Processes,
        tick: Callable[[int], None],
        mark: Callable[[Item], Mapping[str, Any]] = lambda item: {"picture": item.mark},
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        self.score, self.batch, self.processes, self.tick = score, batch, processes, tick
        self.path = None if journal is None else Path(journal)
        self.key, self.mark = key, mark
        self._failures: list[Failure] = []
        self._model_failed = 0

    def run(self, items: Sequence[Item]) -> Outcome:
        """All items, except those that the journal has.

        Raises:
            ValueError: nothing could be evaluated, or what the model raises when it fails from the start.
            JournalError, OSError: the journal cannot be used, or holds the result of another item under the same id.
        """
        own = self.processes
        key = {**self.key, "batch": self.batch}  # results move with it: by rounding, and with budget="batch" by more
        journal = None if self.path is None else Journal(self.path, key, own.rank, own.world)
        try:
            own.wait()  # no process writes before every process has read
            done = dict(journal.done) if journal is not None else {}
            done = {item.id: self._same(item, done[item.id]) for item in items if item.id in done}
            left = [item for item in items if item.id not in done]
            self.tick(len(done))
            marks = {item.id: {MARK: dict(self.mark(item))} for item in left} if journal is not None else {}
            made: dict[str, dict[str, Any]] = {}
            for entries in self._batches(left[own.rank :: own.world], bool(done)):
                if journal is not None:
                    entries = journal.append([entry | marks[entry["id"]] for entry in entries])
                made.update({entry["id"]: _bare(entry) for entry in entries})
        finally:
            if journal is not None:
                journal.close()
        gathered = {entry["id"]: entry for entry in own.gather(list(made.values()))}
        failures: list[Failure] = own.gather(self._failures)
        found = {**done, **gathered}
        if items and not found:
            reasons = "; ".join(f"{f.where}: {f.reason}" for f in failures[:3])
            raise ValueError(f"none of the {len(items)} sample(s) could be evaluated ({reasons})")
        order = {item.id: place for place, item in enumerate(items)}
        failures.sort(key=lambda failure: order[failure.id])
        return Outcome({item.id: found[item.id] for item in items if item.id in found}, failures, len(done))

    def _same(self, item: Item, entry: dict[str, Any]) -> dict[str, Any]:
        """``entry``, which must be of ``item`` and not of another that had its id."""
        if shown := differences(entry.get(MARK, {}), dict(self.mark(item))):
            raise JournalError(
                f"{self.path} holds the result of something else for {item.where} ({shown}): delete it or give another file name"
            )
        return _bare(entry)

    def _batches(self, items: Sequence[Item], succeeded: bool) -> Iterator[list[dict[str, Any]]]:
        """Results of each batch; the next batch is read while one is scored."""
        queue = iter(items)
        with ThreadPoolExecutor(max_workers=min(8, self.batch)) as pool:

            def ahead() -> list[tuple[Item, Future[Picture]]]:
                return [(item, pool.submit(item.load)) for item in islice(queue, self.batch)]

            coming = ahead()
            while coming:
                now, coming = coming, ahead()
                good: list[tuple[Item, Picture]] = []
                for item, future in now:
                    try:
                        good.append((item, future.result()))
                    except Exception as error:  # whatever a decoder raises on broken data
                        self._fail(item, error)
                entries = self._scored(good, succeeded)
                succeeded = succeeded or bool(entries)
                if entries:
                    yield entries
                self.tick(len(now))

    def _scored(self, good: list[tuple[Item, Picture]], succeeded: bool) -> list[dict[str, Any]]:
        if not good:
            return []
        try:
            made = self.score([item for item, _ in good], [payload for _, payload in good])
        except SaintError:
            raise  # about the model or the plan, not about a sample
        except Exception as error:
            if len(good) > 1:  # find the one that is to blame
                made_singly: list[dict[str, Any]] = []
                for pair in good:
                    made_singly += self._scored([pair], succeeded or bool(made_singly))
                return made_singly
            self._model_failed += 1
            if not succeeded and self._model_failed >= _PATIENCE:
                raise
            self._fail(good[0][0], error)
            return []
        return [{"id": item.id, **entry} for (item, _), entry in zip(good, made, strict=True)]

    def _fail(self, item: Item, error: Exception) -> None:
        text = " ".join(str(error).split())[:300]
        self._failures.append(Failure(item.id, item.where, text or type(error).__name__))


def _bare(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != MARK}
