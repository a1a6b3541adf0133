"""An append-only file of per-sample results, so that a killed run continues where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SaintError

VERSION = 1


class JournalError(SaintError, ValueError):
    """The journal belongs to another run, or is damaged."""


class Journal:
    """Results by sample id in a JSON Lines file: a header with the run's key, then one object with an ``id`` per sample.

    Each :meth:`append` is on disk when it returns. A last line without its end, left by a killed run, is cut off on
    opening; its sample is done again. Several processes write a file each (``name.rank1of2.jsonl``) and read all of them.

    Args:
        path: the file; its folder is made.
        key: what the results depend on; plain data.
        rank: number of this process.
        world: number of processes.

    Raises:
        JournalError: the file belongs to another key, or a line inside it is damaged.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], key: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"the journal needs a file name, {path} is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path if world == 1 else path.with_name(f"{path.stem}.rank{rank}of{world}{path.suffix}")
        self._key = json.loads(json.dumps(key))  # as it will be read
        self.done: dict[str, dict[str, Any]] = {}
        siblings = {path, self.path, *path.parent.glob(f"{_escaped(path.stem)}.rank*of*{_escaped(path.suffix)}")}
        for file in sorted(siblings):
            good = self._read(file) if file.exists() else 0
            if file == self.path:
                self._open(good)

    def _read(self, file: Path) -> int:
        """Take over the results of a file; bytes up to the end of its last whole line."""
        good = 0
        data = file.read_bytes()
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # behind the last newline: nothing, or a torn line
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or (number > 1 and not isinstance(entry.get("id"), str)):
                    raise ValueError("no object with an id")
            except ValueError as error:
                if number == len(lines) - 1 and number > 1:
                    break  # the last one: done again
                raise JournalError(
                    f"{file}, line {number} is damaged ({error}): delete the file to start anew"
                ) from error
            if number == 1:
                self._check(file, entry)
            else:
                self.done.setdefault(entry["id"], entry)
            good += len(line) + 1
        return good

    def _check(self, file: Path, header: dict[str, Any]) -> None:
        if header.get("journal") != VERSION or not isinstance(header.get("key"), dict):
            raise JournalError(f"{file} is not a journal of this version; give another file name")
        theirs = header["key"]
        changed = sorted(k for k in theirs.keys() | self._key.keys() if theirs.get(k) != self._key.get(k))
        if changed:
            shown = "; ".join(f"{k}: {_short(theirs.get(k))} there, {_short(self._key.get(k))} now" for k in changed)
            raise JournalError(
                f"{file} holds the results of another run ({shown}): delete it or give another file name"
            )

    def _open(self, good: int) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, good)
        os.lseek(self._file, good, os.SEEK_SET)
        self._end = good
        if not good:
            self._write(json.dumps({"journal": VERSION, "key": self._key}) + "\n")

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write results down.

        Raises:
            JournalError: a sample is there already.
            OSError: the disk is full, say; what was written before stays valid.
        """
        double = [entry["id"] for entry in entries if entry["id"] in self.done]
        if double:
            raise JournalError(f"{self.path} already has a result for {double[0]}")
        self._write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))
        self.done.update({entry["id"]: dict(entry) for entry in entries})

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)  # no half batch
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise OSError(
                error.errno,
                f"cannot write the journal ({error.strerror}); its {len(self.done)} result(s) are safe: make room and "
                "run the same command again",
                str(self.path),
            ) from error
        self._end += len(text.encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
