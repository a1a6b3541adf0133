"""The journal and the loop around it: nothing lost, nothing twice, nothing silent."""

import errno
import json
import sqlite3
import subprocess
import sys
from functools import partial

import pytest

from saint.lab.eval import Journal, JournalError
from saint.lab.eval.loop import Loop, Processes
from saint.lab.sources.items import Item

KEY = {"model": "m", "plans": {"a": {"version": 1}}}


ITEMS = [Item(str(i), "here", lambda: None) for i in range(10)]


def looped(path, score, *, read=lambda item: int(item.id), key=KEY, batch=3, processes=None, items=ITEMS):
    loop = Loop(score, journal=path, key=key, batch=batch, processes=processes or Processes(), tick=lambda _: None)
    return loop.run([Item(item.id, item.where, partial(read, item)) for item in items])


def square(_items, values):
    return [{"value": v * v} for v in values]


def rows(path):
    """Ids and entries, in the order they came."""
    connection = sqlite3.connect(path)
    found = {
        name: json.loads(entry) for name, entry in connection.execute("SELECT id, entry FROM results ORDER BY rowid")
    }
    connection.close()
    return found


# -- journal ----------------------------------------------------------------------------------------------------------


def test_results_are_there_after_reopening(tmp_path):
    path = tmp_path / "sub" / "j.sqlite"
    journal = Journal(path, KEY)
    journal.append([{"id": "b", "x": 1}, {"id": "a", "x": 2.5}])
    assert Journal(path, KEY).done == {"b": {"id": "b", "x": 1}, "a": {"id": "a", "x": 2.5}}
    assert list(Journal(path, KEY).done) == ["b", "a"]
    with pytest.raises(JournalError, match="already has a result for a"):
        journal.append([{"id": "c"}, {"id": "a"}])
    assert list(rows(path)) == ["b", "a"]


def test_of_two_results_for_a_sample_the_first_stays(tmp_path):
    path = tmp_path / "j.sqlite"
    one, two = Journal(path, KEY), Journal(path, KEY)
    assert one.append([{"id": "a", "by": "one"}]) == [{"id": "a", "by": "one"}]
    assert two.append([{"id": "a", "by": "two"}, {"id": "b", "by": "two"}]) == [
        {"id": "a", "by": "one"},
        {"id": "b", "by": "two"},
    ]
    assert two.done["a"] == rows(path)["a"] == {"id": "a", "by": "one"}
    assert Journal(path, KEY).done == two.done
    # the files of several processes: the first by name
    ranks = [Journal(tmp_path / "k.sqlite", KEY, rank, 2) for rank in (0, 1)]
    for rank in (1, 0):
        ranks[rank].append([{"id": "a", "by": rank}, {"id": f"own {rank}"}])
    done = Journal(tmp_path / "k.sqlite", KEY).done
    assert done == {"a": {"id": "a", "by": 0}, "own 0": {"id": "own 0"}, "own 1": {"id": "own 1"}}


_WRITER = """
import sys
from saint.lab.eval import Journal
journal = Journal(sys.argv[1], {"model": "m"})
print("open", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    journal.append([{"id": f"{sys.argv[2]} {i}", "text": "x" * 3000}, {"id": f"both {i}", "by": sys.argv[2]}])
"""


def test_two_processes_on_one_file_lose_nothing(tmp_path):
    path, count = tmp_path / "j.sqlite", 40
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "open\n"  # both have the file before either writes
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()
    found = Journal(path, {"model": "m"}).done
    assert set(found) == {f"{who} {i}" for who in ("one", "two", "both") for i in range(count)}
    assert all(len(entry["text"]) == 3000 for name, entry in found.items() if not name.startswith("both"))
    assert {entry["by"] for name, entry in found.items() if name.startswith("both")} <= {"one", "two"}


def test_a_run_killed_while_it_writes_leaves_nothing_of_the_batch(tmp_path):
    path = tmp_path / "j.sqlite"
    Journal(path, KEY).append([{"id": "a"}])
    code = (
        "import json, os, sys\n"
        "from saint.lab.eval import journal\n"
        "j = journal.Journal(sys.argv[1], json.loads(sys.argv[2]))\n"
        "j._connection.execute('PRAGMA cache_size = 1')\n"  # pages reach the disk before the commit
        "journal._transaction.__exit__ = lambda *_: os._exit(9)\n"
        "j.append([{'id': str(i), 'text': 'x' * 5000} for i in range(50)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), json.dumps(KEY)], check=False)
    assert done.returncode == 9
    journal = Journal(path, KEY)
    assert list(journal.done) == ["a"]
    journal.append([{"id": "b"}])
    assert list(rows(path)) == ["a", "b"]


def test_damage_is_told(tmp_path):
    path = tmp_path / "j.sqlite"
    Journal(path, KEY).append([{"id": str(i), "text": "x" * 200} for i in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 8192 + data[12288:])
    with pytest.raises(JournalError, match="j.sqlite is damaged.*delete the file"):
        Journal(path, KEY)


def test_another_setup_is_refused_and_named(tmp_path):
    path = tmp_path / "j.sqlite"
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
    assert path.read_text() == '{"some": "file"}\n'


def test_an_empty_file_becomes_a_journal(tmp_path):
    path = tmp_path / "j.sqlite"
    path.touch()
    Journal(path, KEY).append([{"id": "a"}])
    assert list(rows(path)) == ["a"]


def test_a_full_disk_keeps_what_was_written(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = Journal(path, KEY)
    journal.append([{"id": "a"}])
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(OSError, match=r"full.*1 result\(s\) are safe") as raised:
        journal.append([{"id": "b", "text": "x"}, {"id": "c", "text": "x" * 50_000}])
    assert (raised.value.filename, raised.value.errno) == (str(path), errno.ENOSPC)
    assert list(journal.done) == ["a"]
    journal._connection.execute("PRAGMA max_page_count = 100000")
    journal.append([{"id": "d"}])  # nothing of the half batch is left
    assert list(rows(path)) == list(Journal(path, KEY).done) == ["a", "d"]


def test_a_file_that_stays_locked_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("saint.lab.eval.journal._PATIENCE", 0.05)
    path = tmp_path / "j.sqlite"
    journal = Journal(path, KEY)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalError, match="in use by another process"):
        journal.append([{"id": "a"}])
    with pytest.raises(JournalError, match="in use by another process"):
        Journal(path, KEY)
    other.execute("ROLLBACK")
    journal.append([{"id": "a"}])
    assert list(rows(path)) == ["a"]


# -- loop -------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues_and_counts_nothing_twice(tmp_path):
    path = tmp_path / "j.sqlite"
    scored = []

    def score(items, values):
        if len(scored) == 6:
            raise KeyboardInterrupt
        scored.extend(values)
        return square(items, values)

    with pytest.raises(KeyboardInterrupt):
        looped(path, score)
    assert list(rows(path)) == [str(i) for i in range(6)]
    scored.append("go on")
    outcome = looped(path, score)
    assert outcome.resumed == 6
    assert [e["value"] for e in outcome.entries.values()] == [i * i for i in range(10)]
    assert [v for v in scored if v != "go on"] == list(range(10))
    assert looped(path, None).entries == outcome.entries  # all done: the model is not asked


def test_items_that_fail_are_told_and_the_rest_is_evaluated(tmp_path):
    path = tmp_path / "j.sqlite"

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
        looped(None, score, batch=1, items=[Item(str(i), "here", lambda: None) for i in range(1000)])
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
    path = tmp_path / "j.sqlite"
    first = looped(path, square, processes=Half(0, 2))
    assert list(first.entries) == ["0", "2", "4", "6", "8"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j.rank0of2.sqlite"]
    outcome = looped(path, square)  # one process goes on where one of two was killed
    assert outcome.resumed == 5
    assert len(outcome.entries) == 10
    with pytest.raises(JournalError):
        looped(path, square, key={**KEY, "model": "other"})


def test_the_batch_size_belongs_to_the_key(tmp_path):
    path = tmp_path / "j.sqlite"
    looped(path, square, items=ITEMS[:4])
    with pytest.raises(JournalError, match=r"batch: 3 there, 2 now"):
        looped(path, square, batch=2)
    assert looped(path, square).resumed == 4


def test_results_for_other_items_are_left_out(tmp_path):
    path = tmp_path / "j.sqlite"
    looped(path, square)
    outcome = looped(path, None, items=[ITEMS[7], ITEMS[2]])
    assert outcome.entries == {"7": {"id": "7", "value": 49}, "2": {"id": "2", "value": 4}}
    assert list(outcome.entries) == ["7", "2"]  # in the order of the items
    assert (outcome.resumed, outcome.failures) == (2, [])


def test_what_another_run_wrote_meanwhile_is_what_counts(tmp_path):
    path = tmp_path / "j.sqlite"

    def score(items, values):
        if 3 in values:
            Journal(path, {**KEY, "batch": 3}).append(
                [{"id": "3", "value": -1, "item": {"picture": -1}}, {"id": "stranger", "value": -2}]
            )
        return square(items, values)

    outcome = looped(path, score)
    assert [e["value"] for e in outcome.entries.values()] == [0, 1, 4, -1, *(i * i for i in range(4, 10))]
    assert looped(path, None).entries == outcome.entries


@pytest.mark.parametrize("name", ["a.sqlite", "results.journal", "z.db"])
def test_processes_read_the_files_of_all_of_a_run(tmp_path, name):
    """Whatever the order of their names, and though the file of a single process is not there."""
    first = Journal(tmp_path / name, KEY, rank=0, world=2)
    first.append([{"id": "a", "x": 1}])
    second = Journal(tmp_path / name, KEY, rank=1, world=2)
    assert set(second.done) == {"a"}
    second.append([{"id": "b", "x": 2}])
    assert set(Journal(tmp_path / name, KEY).done) == {"a", "b"}
