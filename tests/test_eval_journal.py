"""The journal and the loop around it: nothing lost, nothing twice, nothing silent."""

import errno
import json
import os
from dataclasses import dataclass

import pytest

from saint.eval import Journal, JournalError
from saint.eval.loop import Loop, Processes

KEY = {"model": "m", "plans": {"a": {"version": 1}}}


@dataclass(frozen=True)
class Item:
    id: str
    where: str = "here"


ITEMS = [Item(str(i)) for i in range(10)]


def looped(path, score, *, read=lambda item: int(item.id), key=KEY, batch=3, processes=None, items=ITEMS):
    loop = Loop(
        read, score, journal=path, key=key, batch=batch, processes=processes or Processes(), tick=lambda _: None
    )
    return loop.run(items)


def square(_items, values):
    return [{"value": v * v} for v in values]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- journal ----------------------------------------------------------------------------------------------------------


def test_results_are_there_after_reopening(tmp_path):
    path = tmp_path / "sub" / "j.jsonl"
    journal = Journal(path, KEY)
    journal.append([{"id": "a", "x": 1}, {"id": "b", "x": 2.5}])
    assert Journal(path, KEY).done == {"a": {"id": "a", "x": 1}, "b": {"id": "b", "x": 2.5}}
    with pytest.raises(JournalError, match="already has a result for a"):
        journal.append([{"id": "a"}])


@pytest.mark.parametrize("cut", [1, 5, 18])
def test_a_torn_last_line_is_done_again(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append([{"id": "a", "x": 1}, {"id": "b", "x": 12345}])
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    journal = Journal(path, KEY)
    assert list(journal.done) == ["a"]
    journal.append([{"id": "b", "x": 12345}])
    assert path.read_bytes() == data


def test_garbage_behind_a_newline_is_cut_too(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append([{"id": "a"}])
    with path.open("ab") as file:
        file.write(b'\0\0\0{"id"\n')  # what some file systems leave after a power cut
    assert list(Journal(path, KEY).done) == ["a"]
    assert len(lines(path)) == 2


def test_a_torn_header_starts_anew(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"journal": 1, "ke')
    Journal(path, KEY).append([{"id": "a"}])
    assert [line.get("id") for line in lines(path)] == [None, "a"]


def test_damage_inside_is_told_by_line(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append([{"id": "a"}, {"id": "b"}])
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], "oops", text[2]]) + "\n")
    with pytest.raises(JournalError, match="line 2 is damaged"):
        Journal(path, KEY)


def test_another_setup_is_refused_and_named(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append([{"id": "a"}])
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r'another run \(model: "m" there, "n" now\)'):
        Journal(path, {**KEY, "model": "n"})
    with pytest.raises(JournalError, match="plans"):
        Journal(path, {**KEY, "plans": {"a": {"version": 2}}})
    assert path.read_bytes() == before
    path.write_text('{"some": "file"}\n')
    with pytest.raises(JournalError, match="not a journal"):
        Journal(path, KEY)


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, KEY)
    journal.append([{"id": "a"}])
    real = os.write

    def full(file, data):
        if file == journal._file:
            if len(data) <= 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data[:10])
        return real(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left.*1 result\(s\) are safe") as raised:
        journal.append([{"id": "b", "text": "x" * 5}])
    assert raised.value.filename == str(path)
    monkeypatch.undo()
    journal.append([{"id": "c"}])  # nothing of the half batch is left
    assert [line.get("id") for line in lines(path)] == [None, "a", "c"]
    assert list(Journal(path, KEY).done) == ["a", "c"]


# -- loop -------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues_and_counts_nothing_twice(tmp_path):
    path = tmp_path / "j.jsonl"
    scored = []

    def score(items, values):
        if len(scored) == 6:
            raise KeyboardInterrupt
        scored.extend(values)
        return square(items, values)

    with pytest.raises(KeyboardInterrupt):
        looped(path, score)
    assert len(lines(path)) == 1 + 6
    scored.append("go on")
    outcome = looped(path, score)
    assert outcome.resumed == 6
    assert [e["value"] for e in outcome.entries.values()] == [i * i for i in range(10)]
    assert [v for v in scored if v != "go on"] == list(range(10))
    assert looped(path, None).entries == outcome.entries  # all done: the model is not asked


def test_items_that_fail_are_told_and_the_rest_is_evaluated(tmp_path):
    path = tmp_path / "j.jsonl"

    def read(item):
        if item.id == "2":
            raise OSError("broken file")
        return int(item.id)

    def score(items, values):
        if 7 in values:
            raise RuntimeError("sequence too\nlong")
        return square(items, values)

    outcome = looped(path, score, read=read)
    assert list(outcome.entries) == [str(i) for i in range(10) if i not in (2, 7)]
    assert [(f.id, f.reason) for f in outcome.failures] == [("2", "broken file"), ("7", "sequence too long")]
    # they are not in the journal, so the next run tries them again
    assert list(looped(path, square).entries) == [str(i) for i in range(10)]


def test_a_model_that_never_works_is_an_error():
    calls = []

    def score(items, values):
        calls.append(len(values))
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        looped(None, score, batch=1, items=[Item(str(i)) for i in range(1000)])
    assert len(calls) < 10


def test_nothing_readable_is_an_error():
    def read(item):
        raise OSError(f"gone {item.id}")

    with pytest.raises(ValueError, match=r"none of the 10 .* gone 0"):
        looped(None, square, read=read)


def test_errors_of_the_library_are_not_blamed_on_a_sample():
    from saint.errors import HookNeverFiredError

    def score(items, values):
        raise HookNeverFiredError("attn.qkv")

    with pytest.raises(HookNeverFiredError):
        looped(None, score)


class Half(Processes):
    """One of two processes; the other one's results come from its journal."""

    def wait(self):
        pass

    def gather(self, mine):
        return mine


def test_processes_share_the_work_and_read_each_other(tmp_path):
    path = tmp_path / "j.jsonl"
    first = looped(path, square, processes=Half(0, 2))
    assert list(first.entries) == ["0", "2", "4", "6", "8"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j.rank0of2.jsonl"]
    outcome = looped(path, square)  # one process goes on where one of two was killed
    assert outcome.resumed == 5
    assert len(outcome.entries) == 10
    with pytest.raises(JournalError):
        looped(path, square, key={**KEY, "model": "other"})
