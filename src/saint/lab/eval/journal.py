"""A file of per-sample results, so that a killed run continues where it stopped."""

import errno
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import SaintError
from ..records import differences

VERSION = 2  # 1 was JSON lines, without the batch size in its key
_MAGIC = b"SQLite format 3\0"
_PATIENCE = 60.0  # s to wait for another process, which holds the file for milliseconds


class JournalError(SaintError, ValueError):
    """The journal belongs to another run, or is damaged."""


class Journal:
    """Results by sample id in a SQLite file: the run's key, then one row with a JSON object per sample.

    Each :meth:`append` is completely on disk when it returns; a run killed in the middle of one leaves nothing of it. Runs may
    share a file: every result is kept, and of two for one sample the first. Several processes of one run write a file each
    (``name.rank1of2.sqlite``) and read all of them. The file system must lock files, as local ones do.

    Args:
        path: the file; its folder is made.
        key: what the results depend on; plain data.
        rank: number of this process.
        world: number of processes.

    Raises:
        JournalError: the file belongs to another key, is no journal, or is damaged.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], key: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"the journal needs a file name, {path} is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path if world == 1 else path.with_name(f"{path.stem}.rank{rank}of{world}{path.suffix}")
        self._key: dict[str, Any] = json.loads(json.dumps(key))  # as it will be read
        self.done: dict[str, dict[str, Any]] = {}
        siblings = {path, self.path, *path.parent.glob(f"{_escaped(path.stem)}.rank*of*{_escaped(path.suffix)}")}
        for file in sorted(siblings):
            if file != self.path and not file.exists():
                continue
            _check_kind(file)
            connection = self._open(file)
            if file == self.path:
                self._connection = connection
            else:
                connection.close()

    def _open(self, file: Path) -> sqlite3.Connection:
        """Connect, check the key (or write it into a new file), take over the results."""
        try:
            connection = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None)
        except sqlite3.Error as error:
            raise OSError(errno.EACCES, f"cannot open the journal ({error})", str(file)) from error
        try:
            connection.execute("PRAGMA synchronous = FULL")
            with _transaction(connection):
                connection.execute("CREATE TABLE IF NOT EXISTS run (version INTEGER, key TEXT)")
                connection.execute("CREATE TABLE IF NOT EXISTS results (id TEXT PRIMARY KEY, entry TEXT NOT NULL)")
                header = connection.execute("SELECT version, key FROM run").fetchone()
                if header is None:
                    connection.execute("INSERT INTO run VALUES (?, ?)", (VERSION, json.dumps(self._key)))
                else:
                    self._check(file, *header)
            for name, entry in connection.execute("SELECT id, entry FROM results ORDER BY rowid"):
                self.done.setdefault(name, json.loads(entry))  # of two results the first
        except (sqlite3.Error, ValueError) as error:
            connection.close()
            raise error if isinstance(error, JournalError) else self._explained(file, error) from error
        return connection

    def _check(self, file: Path, version: Any, text: str) -> None:
        if version != VERSION:
            raise JournalError(f"{file} is not a journal of this version; give another file name")
        if shown := differences(json.loads(text), self._key):
            raise JournalError(
                f"{file} holds the results of another run ({shown}): delete it or give another file name"
            )

    def append(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write results down, all of them or none.

        Returns:
            What the journal holds for these samples: another run's result where that was there first.

        Raises:
            JournalError: this journal had a result for a sample already.
            OSError: the disk is full, say; what was written before stays valid.
        """
        double = [entry["id"] for entry in entries if entry["id"] in self.done]
        if double:
            raise JournalError(f"{self.path} already has a result for {double[0]}")
        rows = [(entry["id"], json.dumps(entry, allow_nan=False)) for entry in entries]
        held = []
        try:
            with _transaction(self._connection):
                for name, text in rows:
                    self._connection.execute("INSERT OR IGNORE INTO results VALUES (?, ?)", (name, text))
                    (text,) = self._connection.execute("SELECT entry FROM results WHERE id = ?", (name,)).fetchone()
                    held.append(json.loads(text))
        except sqlite3.Error as error:
            raise self._explained(self.path, error) from error
        self.done.update({entry["id"]: entry for entry in held})
        return held

    def _explained(self, file: Path, error: Exception) -> Exception:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return JournalError(f"{file} is in use by another process: wait for it, or give another file name")
        if isinstance(error, sqlite3.OperationalError):
            full = code == sqlite3.SQLITE_FULL
            return OSError(
                errno.ENOSPC if full else errno.EIO,
                f"cannot write the journal ({error}); its {len(self.done)} result(s) are safe: make room and run the same "
                "command again",
                str(file),
            )
        return JournalError(f"{file} is damaged ({error}): delete the file to start anew")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class _transaction:  # noqa: N801  (a context manager)
    """All or nothing, and no other writer meanwhile."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            try:
                self.connection.execute("COMMIT")
                return
            except sqlite3.Error:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        if self.connection.in_transaction:  # a full disk has rolled back by itself
            self.connection.execute("ROLLBACK")


def _check_kind(file: Path) -> None:
    """Refuse what is no journal, before SQLite says it in its own words; a new or empty file is fine."""
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("rb") as opened:
        head = opened.read(len(_MAGIC))
    if not head.startswith(_MAGIC):
        raise JournalError(f"{file} is not a journal; give another file name")


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
