"""The sweep over model names, and that README and record agree."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import zoo  # noqa: E402

ROWS = list(csv.DictReader((ROOT / "docs" / "zoo.csv").read_text().splitlines()))


def test_no_name_fails_and_every_refusal_says_why():
    assert {row["outcome"] for row in ROWS} <= {"holds", "refused", "not tried"}
    assert all(row["detail"] for row in ROWS)
    assert not [
        row["name"] for row in ROWS if row["outcome"] == "refused" and "cannot be pruned: " not in row["detail"]
    ]
    assert len({(row["library"], row["name"]) for row in ROWS}) == len(ROWS)


def test_most_names_of_timm_hold():
    modules = {"vision_transformer", "deit", "eva", "beit", "vision_transformer_hybrid", "vision_transformer_relpos",
               "naflexvit", "vitamin", "cait", "vision_transformer_sam", "hieradet_sam2", "gemma4_vit"}  # fmt: skip
    counts = Counter(row["outcome"] for row in ROWS if row["library"] == "timm" and row["module"] in modules)
    assert counts["holds"] >= 300


def test_the_readme_says_what_the_record_says():
    held = sum(row["outcome"] == "holds" for row in ROWS)
    assert f"{held} of {len(ROWS)} models hold" in (ROOT / "README.md").read_text()


def test_every_name_of_the_recorded_timm_is_in_the_record():
    if not ROWS[0]["versions"].startswith(f"timm {timm.__version__},"):
        pytest.skip("another timm")
    here = {name for module in zoo.MODULES for name in timm.list_models(module=module)}
    assert here == {row["name"] for row in ROWS if row["library"] == "timm"}


def test_one_name_of_each_outcome(monkeypatch):
    record = zoo.attempt("timm", "vision_transformer", "test_vit")
    assert (record.outcome, record.cls) == ("holds", "VisionTransformer"), record
    assert record.detail.startswith("3 blocks, width 64")
    record = zoo.attempt("timm", "tnt", "tnt_s_patch16_224")
    assert (record.outcome, record.cls) == ("refused", "TNT")
    assert "an inner sequence" in record.detail
    record = zoo.attempt("timm", "vision_transformer", "no_such_model")
    assert record.outcome == "not tried"
    assert "no_such_model" in record.detail
    monkeypatch.setattr(zoo, "check_batch", lambda *_: (_ for _ in ()).throw(AssertionError("mates matter")))
    record = zoo.attempt("timm", "vision_transformer", "test_vit")
    assert record.outcome == "fails"
    assert "mates matter" in record.detail


SLOW = """
import time
import zoo
def slow(*_):
    for _ in range(500):  # ends by itself: a limit that never comes fails the test and nothing else
        time.sleep(0.02)
zoo.build = slow
record = zoo.attempt("timm", "vision_transformer", "test_vit", limit=1)
print(record.outcome, record.detail, sep=": ")
"""


@pytest.mark.parametrize("blocked", [(), (signal.SIGALRM,)], ids=["plain", "signal blocked"])
def test_a_model_that_takes_too_long(blocked):
    """In its own process: a process inherits the signals that its parent has blocked."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked),
    )
    assert done.stdout == "not tried: more than 1 s\n", done.stderr


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(zoo, "names", lambda: [("timm", "a", "one"), ("timm", "b", "two"), ("open_clip", "c", "three")])

    def attempt(library, module, name, limit):
        tried.append(name)
        return zoo.Record(library, module, name, "Class", "holds", "tiny, it was", "timm 1")

    monkeypatch.setattr(zoo, "attempt", attempt)
    path = tmp_path / "zoo.jsonl"
    zoo.sweep(path, only="two")
    with path.open("a") as file:
        file.write('{"library": "timm", "na')  # a run that was killed
    zoo.sweep(path)
    assert tried == ["two", "one", "three"]
    assert "[2/2, 0 min left] open_clip three: holds" in capsys.readouterr().err
    assert [json.loads(line)["name"] for line in path.read_text().splitlines() if line.endswith("}")] == tried
    zoo.write_table(tmp_path / "zoo.csv", zoo.read(path))
    rows = list(csv.DictReader((tmp_path / "zoo.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert rows[0]["detail"] == "tiny, it was"
    assert list(rows[0]) == ["library", "module", "name", "class", "outcome", "detail", "versions"]
