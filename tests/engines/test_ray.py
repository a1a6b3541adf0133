"""On a real local Ray cluster of two workers: the rows are those of one process, also when actors and drivers are killed.

``EMBED_IMAGES=10000`` runs the test with kills on that many images (minutes).
"""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab.embed import OutputError, Rows, embed
from saint.lab.embed.parts import Parts, files
from saint.lab.embed.work import Job
from saint.session import as_plan
from support.records import by_key

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
pytest.importorskip("ray.data", reason="ray[data] is not installed: pip install '.[ray]'")
import psutil
import ray
import ray.data

from saint.lab.embed.ray import embed as on_ray

torch.set_num_threads(1)  # as in the actors

COUNT = int(os.environ.get("EMBED_IMAGES", "240"))
PLAN = saint.Saint(threshold=0.5)
MODEL = {"model": "timm:test_vit", "plan": PLAN, "pretrained": False}
PROMPT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # Ray's 15 waits for whatever else runs here
TIMEOUT = 300 + COUNT / 10  # s; seconds where nothing else runs


@pytest.fixture(scope="module")
def cluster():
    os.environ |= PROMPT
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def encoded(seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    smooth = Image.fromarray(generator.integers(0, 255, (3 + seed % 5, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    smooth.resize((40, 36), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    """Images of which one in a hundred, and at least one, is broken."""
    broken = set(random.Random(0).sample(range(count), max(1, count // 100)))
    for i in range(count):
        file = folder / f"{i // 1000}" / f"{i:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i)[: 40 if i in broken else None])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("small"), 30)


@pytest.fixture(scope="module")
def alone(folder):
    return by_key(embed(folder, device="cpu", batch=4, **MODEL))


def close(row, other):
    """Equal but for the rounding of another composition of the batch."""
    assert {**row, "embedding": None, "path": None, "key": None} == {
        **other,
        "embedding": None,
        "path": None,
        "key": None,
    }
    assert (row["embedding"] is None) == (other["embedding"] is None)
    if row["embedding"] is not None:
        assert np.allclose(row["embedding"], other["embedding"], atol=1e-5)


def test_a_folder_gives_the_rows_of_one_process(cluster, folder, alone, tmp_path):
    made = on_ray(folder, output=tmp_path / "out", batch=4, rows=7, **MODEL)
    assert by_key(made.take_all()) == alone  # bit for bit: the batches are the same
    assert len(files(tmp_path / "out")) == 5
    assert embed(folder, output=tmp_path / "out", batch=4, **MODEL).resumed == 30  # either continues the other
    with pytest.raises(OutputError, match="threshold: 0.5 there, 0.6 now"):
        on_ray(folder, output=tmp_path / "out", batch=4, **{**MODEL, "plan": saint.Saint(threshold=0.6)})


def test_a_data_set_with_bytes_is_lazy(cluster, folder, alone, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in alone:
            tar.add(folder / key, arcname=f"{Path(key).stem}.png")
    shards = ray.data.read_webdataset(str(tmp_path / "0.tar"), decoder=None)
    made = by_key(on_ray(shards, batch=4, workers=1, **MODEL).take_all())
    for key, row in made.items():
        close(row, alone[f"0/{key}.png"])
    assert len(made) == 30


def test_a_data_set_with_paths_continues(cluster, folder, alone, tmp_path):
    out, some = tmp_path / "out", list(alone)[:14]
    job = Job(MODEL["model"], as_plan(PLAN), pretrained=False)
    facts = {**job.facts(), "batch": 4, "source": {"dataset": True, "column": None, "key": None}}
    with Parts(out, facts, 7) as parts:  # what a killed driver leaves
        parts.add(job.table([alone[key] for key in some]))
    before = {file.name: file.read_bytes() for file in files(out)}
    assert len(before) == 2
    paths = ray.data.from_items([{"id": key, "image_path": str(folder / key)} for key in alone])
    ticks = []
    made = on_ray(paths, output=out, batch=4, workers=1, rows=7, tick=ticks.append, **MODEL)
    assert (ticks[0], sum(ticks)) == (14, 30)
    assert {name: (out / name).read_bytes() for name in before} == before
    rows = by_key(made.take_all())
    assert rows.keys() == alone.keys()
    for key, row in rows.items():
        close(row, alone[key])


def test_answers_of_a_folder_and_of_a_data_set(cluster, folder, tmp_path):
    checkpoints.llava(tmp_path / "model")
    asked = {
        "model": f"hf:{tmp_path / 'model'}", "plan": saint.Plan(connector=saint.methods.DivPrune(keep=0.25)),
        "question": "w5 w6", "max_new_tokens": 3, "batch": 3,
    }  # fmt: skip
    said = by_key(embed(folder, device="cpu", **asked))
    assert sum(row["error"] is not None for row in said.values()) == 1
    assert len({row["answer"] for row in said.values()}) > 1
    assert {row["kept"][-1]["tokens"] * 4 for row in said.values() if row["kept"]} == {checkpoints.TOKENS}
    made = on_ray(folder, output=tmp_path / "out", rows=7, **asked)
    assert by_key(made.take_all()) == said
    assert embed(folder, output=tmp_path / "out", **asked).resumed == 30  # either continues the other
    paths = ray.data.from_items([{"id": key, "path": str(folder / key)} for key in said])
    lazy = by_key(on_ray(paths, workers=1, **asked).take_all())
    assert {key: row["answer"] for key, row in lazy.items()} == {key: row["answer"] for key, row in said.items()}
    with pytest.raises(OutputError, match="w5 w6"):
        on_ray(folder, output=tmp_path / "out", **{**asked, "question": "w7"})


def test_errors_say_what_to_do(cluster, folder, tmp_path):
    with pytest.raises(ValueError, match="has no model 'test_vitt'"):
        on_ray(folder, output=tmp_path / "out", **{**MODEL, "model": "timm:test_vitt"})
    twice = ray.data.from_items([{"id": "a", "path": str(folder / "0/00000.png")}] * 2)
    with pytest.raises(OutputError, match="'a' came twice"):
        on_ray(twice, output=tmp_path / "twice", workers=1, **MODEL)
    with pytest.raises(TypeError, match=r"a ray.data.Dataset or a path is expected, got list"):
        on_ray([1], **MODEL)


# -- kills ------------------------------------------------------------------------------------------------------------


def command(folder: Path, out: Path) -> list[str]:
    line = [
        "embed",
        folder,
        "-o",
        out,
        "--model",
        "timm:test_vit",
        "--no-pretrained",
        "--batch",
        4,
        "--rows",
        20,
        "--ray",
    ]
    line += ["--workers", 2, "--plan", '{"version": 1, "vision": {"method": {"method": "saint", "threshold": 0.5}}}']
    return [sys.executable, "-m", "saint", *map(str, line)]


def actors(driver: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait(what, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert process.poll() is None, f"the driver ended with status {process.returncode} before it was killed"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_killed_actors_and_drivers_lose_and_double_nothing(tmp_path):
    folder, out = make_folder(tmp_path / "in", COUNT), tmp_path / "out"
    whole = by_key(embed(folder, device="cpu", batch=4, output=tmp_path / "whole", **MODEL))

    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | PROMPT
    first = subprocess.Popen(command(folder, out), env=environment, start_new_session=True)
    some = max(1, COUNT // 80)  # a quarter of the parts
    wait(lambda: len(files(out)) >= some, first)
    (killed, *_) = actors(first.pid)
    killed.send_signal(signal.SIGKILL)
    had = len(files(out))
    wait(lambda: len(files(out)) >= had + some, first)  # it goes on
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    there = Rows.of(out).count
    assert 0 < there < COUNT, "the kills came too late: slow the run down"

    done = subprocess.run(command(folder, out), env=environment, capture_output=True, text=True, timeout=TIMEOUT * 4)
    assert done.returncode == 1, done.stderr  # some images are broken
    assert f"{there} of them from an earlier run" in " ".join(done.stdout.split())
    print(f"{COUNT} images; {there} rows were there when the driver was killed, an actor was killed behind {had} parts")
    rows = by_key(Rows.of(out))
    assert rows.keys() == whole.keys()
    assert len(rows) == COUNT
    assert sum(row["error"] is not None for row in rows.values()) == max(1, COUNT // 100)
    assert rows == whole  # bit for bit
