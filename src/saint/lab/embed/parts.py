"""Results as parquet parts in a folder: one writer, whole files, every key once."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...errors import SaintError
from ...extras import require
from ...files import write_whole
from ..records import differences, write_json
from .sources import Item

MANIFEST = "manifest.json"
_LOCK = ".lock"


_FEW = 2  # settings of one fact that are said one by one


def in_words(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Tell what differs between the facts of two runs, e.g. "batch: 32 there, 8 now; another plan"; "" where nothing does."""
    said = []
    for name in dict.fromkeys([*there, *now]):
        shown = differences({name: there.get(name)}, {name: now.get(name)})
        if shown:
            said.append(shown if shown.count(" there, ") <= _FEW else f"another {name}")
    return "; ".join(said)


class OutputError(SaintError, ValueError):
    """The output folder belongs to another run, is in use, or is damaged."""


class Parts:
    """The output folder of a run. A context manager; while it is open, no other run can write there.

    A part is a parquet file that is written aside and then renamed, so it is whole or not there. A run that was killed is
    continued by opening its folder again: ``done`` holds the keys of all rows that are on disk.

    Args:
        output: the folder; it is made.
        facts: what the rows depend on, plain data; a folder with other facts is refused.
        rows: per part.

    Raises:
        OutputError: the folder holds another run, other files, or is in use.
        OSError: it cannot be read or written.
    """

    def __init__(self, output: str | os.PathLike[str], facts: Mapping[str, Any], rows: int = 1000) -> None:
        if rows < 1:
            raise ValueError(f"a part has >= 1 rows, got {rows}")
        self.folder, self.size = Path(output), rows
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"the output needs a folder, {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            self.facts: dict[str, Any] = json.loads(json.dumps(facts))  # as they will be read
            self._check_manifest()
            self._next, self.done = self._read()
        except BaseException:
            self._lock.close()
            raise
        self._new: set[str] = set()
        self._waiting: list[Any] = []

    def _check_manifest(self) -> None:
        file = self.folder / MANIFEST
        if not file.exists():
            others = sorted(
                f.name for f in self.folder.iterdir() if f.name != _LOCK and not f.name.startswith(f".{MANIFEST}")
            )
            if others:
                raise OutputError(
                    f"{self.folder} holds {others[0]} and no {MANIFEST}, so it is no output of this command: give an empty folder"
                )
            self._write_manifest(complete=False)
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{file} is damaged ({error}): give another folder") from error
        if self.facts.get("weights") is None:  # not known before the first batch
            self.facts["weights"] = held.get("weights")
        if held.get("weights") is None:
            held["weights"] = self.facts.get("weights")
        if shown := in_words(held, self.facts):
            raise OutputError(
                f"{self.folder} holds the rows of another run ({shown}): delete it or give another folder"
            )

    def _write_manifest(self, complete: bool, **counts: int) -> None:
        write_json(self.folder / MANIFEST, {"kind": "embed", "run": self.facts, "complete": complete, **counts})

    def _read(self) -> tuple[int, set[str]]:
        """Number of the next part, and the keys of all parts."""
        parquet = require("pyarrow.parquet", "embed")
        done: set[str] = set()
        last = -1
        for partial in self.folder.glob(".part-*"):
            partial.unlink()  # of a run that was killed
        for file in files(self.folder):
            try:
                done.update(parquet.read_table(file, columns=["key"]).column(0).to_pylist())
                last = max(last, int(file.stem.removeprefix("part-")))
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"{file} is damaged ({error}): delete the file, and its rows are made again"
                ) from error
        return last + 1, done

    def missing(self, units: Sequence[Sequence[Item]]) -> list[Sequence[Item]]:
        """The units of which a row is missing. They are made whole again, so that no result depends on where a run stopped."""
        return [unit for unit in units if any(item.key not in self.done for item in unit)]

    def check_weights(self, weights: str) -> None:
        """Hold the fingerprint of the model's weights against that of the rows on disk.

        Raises:
            OutputError: another.
        """
        if self.facts.get("weights") is None:
            self.facts["weights"] = weights
            self._write_manifest(complete=False)
        elif self.facts["weights"] != weights:
            raise OutputError(
                f"{self.folder} holds the rows of another run (weights: {self.facts['weights']} there, {weights} now): "
                "delete it or give another folder"
            )

    def add(self, table: Any) -> int:
        """Take rows, a ``pyarrow.Table``; those whose key is on disk already are passed over.

        Returns:
            How many were new.

        Raises:
            OutputError: a key came twice in this run.
            OSError: the disk is full, say; parts that were written stay.
        """
        keys = table.column("key").to_pylist()
        new = [row for row, key in enumerate(keys) if key not in self.done]
        for row in new:
            if keys[row] in self._new:
                raise OutputError(f"the key {keys[row]!r} came twice: keys must be unique within a source")
            self._new.add(keys[row])
        if len(new) < len(keys):
            table = table.take(require("pyarrow", "embed").array(new, "int64"))
        self._waiting.append(table)
        while sum(len(waiting) for waiting in self._waiting) >= self.size:
            self._flush()
        return len(new)

    def _flush(self) -> None:
        arrow, parquet = require("pyarrow", "embed"), require("pyarrow.parquet", "embed")
        table = arrow.concat_tables(self._waiting)
        part, rest = table.slice(0, self.size), table.slice(self.size)
        if len(part):
            buffer = io.BytesIO()
            parquet.write_table(part, buffer)
            write_whole(self.folder / f"part-{self._next:06d}.parquet", buffer.getvalue())
            self._next += 1
        self._waiting = [rest]

    def finish(self, total: int | None = None) -> None:
        """Write what is left, and say in the manifest that all rows are there.

        Args:
            total: how many there must be, where known.

        Raises:
            OutputError: they are not.
        """
        if self._waiting:
            self._flush()
        held = len(self.done) + len(self._new)
        if total is not None and held != total:
            raise OutputError(f"{self.folder} has {held} rows of {total}: run the same command again")
        self._write_manifest(complete=True, rows=held)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if self._waiting and kind is not None and not issubclass(kind, OSError):
                self._flush()  # an interruption keeps what was computed
        finally:
            self._lock.close()


def files(folder: Path) -> list[Path]:
    """The parts of an output folder, in order."""
    return sorted(folder.glob("part-*.parquet"))


def _locked(folder: Path) -> IO[str]:
    """The folder's lock, which the system gives back when this process ends, however it does."""
    file = (folder / _LOCK).open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError as error:
        file.close()
        raise OutputError(f"{folder} is in use by another run: wait for it, or give another folder") from error
    return file
