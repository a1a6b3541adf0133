"""`saint embed` in one process: every image a row, once, also behind a kill; what does not fit is refused."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab.embed import OutputError, Rows, embed, find_items, work
from saint.lab.embed.parts import Parts, files, in_words
from saint.lab.embed.sources import Reader, located
from saint.lab.embed.work import Job
from saint.lab.kinds import VLM, Encoder
from support.command_line import one_line
from support.families import FAMILIES
from support.families import prompts as prompts_of
from support.records import by_key

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[embed]'")
MODEL = {"model": "timm:test_vit", "pretrained": False, "device": "cpu"}
FAMILY = FAMILIES["llava-llama"]
PLAN = saint.Saint(threshold=0.5)
BROKEN = b"not a picture"


def image(seed):
    generator = np.random.default_rng(seed)
    smooth = Image.fromarray(generator.integers(0, 255, (3 + seed % 5, 4, 3), dtype=np.uint8))
    return smooth.resize((40 + seed, 36), Image.Resampling.BICUBIC)


def encoded(seed, form="PNG"):
    buffer = io.BytesIO()
    image(seed).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten images, the fourth broken, in two folders."""
    for i in range(10):
        file = tmp_path / "in" / f"{'ab'[i % 2]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(BROKEN if i == 3 else encoded(i))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_image_is_a_row(folder, tmp_path):
    rows = embed(folder, plan=PLAN, output=tmp_path / "out", batch=4, rows=3, **MODEL)
    found = by_key(rows)
    assert (rows.count, rows.errors, rows.resumed) == (10, 1, 0)
    assert sorted(found) == sorted(f"{'ab'[i % 2]}/{i}.png" for i in range(10))
    broken = found.pop("b/3.png")
    assert broken["embedding"] is None
    assert broken["kept"] is None
    assert "image" in broken["error"]
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    for key, row in found.items():  # by hand, one at a time
        with saint.pruned(loaded.model, PLAN) as session, torch.no_grad():
            inputs = loaded.pixels([image(int(key[2:-4]))])
            want = loaded.model.forward_head(loaded.model.forward_features(inputs["x"]), pre_logits=True)[0]
            trace = session.trace
        assert np.allclose(row["embedding"], want.numpy(), atol=1e-5)
        counts = [(step.stage, step.layer, int(step.tokens_out)) for step in trace]
        assert [(k["stage"], k["layer"], k["tokens"]) for k in row["kept"]] == counts
        assert row["tokens"] == int(trace[0].tokens_in)
        assert row["error"] is None
        assert saint.Plan.load(row["plan"]) == saint.Plan(vision=PLAN)
        assert row["path"] == str(folder / key)
    assert len({tuple(k["tokens"] for k in row["kept"]) for row in found.values()}) > 1
    assert [len(rows) for rows in map(by_key, (Rows.of(tmp_path / "out"),))] == [10]
    assert len(files(tmp_path / "out")) == 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["run"]["plan"] == saint.Plan(vision=PLAN).to_dict()


def test_rows_in_memory_are_those_on_disk(folder, tmp_path):
    memory = embed(folder, plan=PLAN, batch=4, **MODEL)
    assert memory.table().equals(embed(folder, plan=PLAN, output=tmp_path / "out", batch=4, rows=3, **MODEL).table())
    assert list(memory) == memory.table().to_pylist()


def test_the_users_model_is_as_it_was(folder):
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    hooks = len(loaded.model.get_classifier()._forward_pre_hooks)
    assert embed(folder, loaded, PLAN).count == 10
    assert saint.status(loaded.model) is None
    assert len(loaded.model.get_classifier()._forward_pre_hooks) == hooks


def test_an_image_that_the_model_fails_on_is_the_only_row_with_an_error(folder, monkeypatch):
    from saint.lab.kinds.features import Features

    real, bad = Features.__call__, image(6).size

    def picky(self, inputs):
        if any(bool((one == marked).all()) for one in inputs["x"]):
            raise RuntimeError("no good")
        return real(self, inputs)

    loaded = Encoder.load("timm:test_vit", pretrained=False)
    marked = loaded.pixels([image(6)])["x"][0]
    monkeypatch.setattr(Features, "__call__", picky)
    rows = by_key(embed(folder, loaded, PLAN, batch=4))
    assert bad
    assert {key: row["error"] for key, row in rows.items() if row["error"] and key != "b/3.png"} == {
        "a/6.png": "no good"
    }


def test_a_model_that_always_fails_is_no_row(folder, monkeypatch):
    from saint.lab.kinds.features import Features

    monkeypatch.setattr(Features, "__call__", lambda self, inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        embed(folder, plan=PLAN, batch=4, **MODEL)


class TinyVLM(VLM):
    """A random LLaVA whose prompt is always the same."""

    def prompted(self, prompts, images):
        torch.manual_seed(0)
        made = prompts_of(FAMILY, self.model, [[3, "0", 4]])
        return {name: value.repeat_interleave(len(images), 0) for name, value in made.items()}

    def decode(self, tokens):
        return " ".join(map(str, tokens.tolist()))


def test_answers(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(BROKEN if i == 1 else encoded(i))
    plan = saint.Plan(connector=saint.SaintFullGraph(keep=0.5))
    loaded = TinyVLM(FAMILY.build(), torch.device("cpu"))
    rows = embed(tmp_path / "in", loaded, plan, question="What color?", max_new_tokens=3, batch=3)
    good, broken, other = rows
    with saint.pruned(loaded.model, plan), torch.no_grad():
        inputs = loaded.prompted(["What color?"], [image(0)])
        tokens = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert good["answer"] == other["answer"] == loaded.decode(tokens)
    assert good["question"] == broken["question"] == "What color?"
    assert [k["stage"] for k in good["kept"]] == ["connector"]
    assert good["kept"][0]["tokens"] * 2 == good["tokens"]
    assert broken["answer"] is None
    assert broken["error"]
    assert "embedding" not in good
    with pytest.raises(TypeError, match="embeddings need a subject"):
        embed(tmp_path / "in", loaded, plan)
    with pytest.raises(ValueError, match="the question is empty"):
        embed(tmp_path / "in", loaded, plan, question=" ")


def test_images_of_similar_budgets_share_a_batch(tmp_path, monkeypatch):
    from saint.lab.embed.work import Worker, alike, sameness

    quiet, busy = torch.ones(3, 56, 56), torch.randn(3, 56, 56)
    half = torch.cat([quiet[:, :28], busy[:, 28:]], 1)
    assert sameness(busy) < sameness(half) < sameness(quiet)
    mixed = [quiet, busy, ValueError("broken"), half]
    assert alike(mixed, 2) == [[2, 1], [3, 0]]
    assert alike(mixed, 4) == [[0, 1, 2, 3]]
    (tmp_path / "in").mkdir()
    for i in range(8):
        made = Image.new("RGB", (40, 40), "green") if i % 2 else Image.effect_noise((40, 40), 90).convert("RGB")
        made.save(tmp_path / "in" / f"{i}.png")
    real, seen = Worker.rows, []
    monkeypatch.setattr(
        Worker, "rows", lambda self, keys, *rest: seen.append([k[0] for k in keys]) or real(self, keys, *rest)
    )
    embed(tmp_path / "in", plan=PLAN, batch=4, **MODEL)
    assert [sorted(keys) for keys in seen] == [list("0246"), list("1357")]  # the flat ones come last
    seen.clear()
    embed(tmp_path / "in", plan=saint.Saint(keep=0.5), batch=4, **MODEL)
    assert seen == [list("0123"), list("4567")]  # nothing is padded, so nothing is sorted


# -- sources ----------------------------------------------------------------------------------------------------------


def test_the_sources_hold_the_same_images(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [encoded(i) for i in range(5)]
    for name in ("images", "bytes", "paths", "structs", "shards"):
        (tmp_path / name).mkdir()
    for i, one in enumerate(data):
        (tmp_path / "images" / f"{i}.png").write_bytes(one)
    links = [f"../images/{i}.png" if i % 2 else (tmp_path / "images" / f"{i}.png").as_uri() for i in range(5)]
    tables = {
        "bytes": arrow.table({"jpeg": data, "label": list(range(5))}),
        "paths": arrow.table({"url": links, "text": ["a"] * 5}),
        "structs": arrow.table({"image": [{"bytes": one, "path": None} for one in data]}),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / name / "0.parquet", row_group_size=2)
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for i, one in enumerate(data):
            for ending, content in (("cls", b"1"), ("png", one)):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    keys = {"images": "{}.png", "shards": "0.tar/{}"}
    for name in ("images", "bytes", "paths", "structs", "shards"):
        items, reader = find_items(tmp_path / name), Reader()
        assert [item.key for item in items] == [keys.get(name, "0.parquet/{}").format(i) for i in range(5)]
        for i in (4, 0, 1, 2, 3):  # in any order
            assert np.array_equal(np.asarray(reader(items[i])), np.asarray(image(i))), (name, i)


NAMES = ["my photos", "Größe ü", "100 %", "%20", "a#b", "what?", "a;b&c=d", "plus+", "[x]", "~", "a:b", "'q'"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_path_in_every_kind_of_source(tmp_path, name):
    """In folders, shards, columns of paths and of URLs; what a URL means by % is what its maker wrote for the name."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "in here, ü" / name / f"{name}.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(encoded(3))
    assert located("k", file.as_uri(), tmp_path).path == str(file)
    assert located("k", file.as_uri().replace("file://", "FILE://localhost"), tmp_path).path == str(file)
    relative = f"{name}/{name}.png"
    assert located("k", relative, file.parent.parent).path == str(file)
    assert located("k", str(file), tmp_path / "elsewhere").path == str(file)
    (tmp_path / "tables").mkdir()
    values = [file.as_uri(), str(file), f"../in here, ü/{relative}"]
    parquet.write_table(arrow.table({"path": values}), tmp_path / "tables" / f"{name}.parquet")
    structs = [{"bytes": None, "path": value} for value in values] + [{"bytes": encoded(3), "path": "x"}]
    (tmp_path / "structs").mkdir()
    parquet.write_table(arrow.table({"image": structs}), tmp_path / "structs" / f"{name}.parquet")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as tar:
        tar.add(file, f"{name}/{name}.png")
    (tmp_path / "a pictures").mkdir()
    (tmp_path / "a pictures" / f"{name}.png").write_bytes(encoded(3))
    keys = {
        "a pictures": [f"{name}.png"],
        "tables": [f"{name}.parquet/{row}" for row in range(3)],
        "structs": [f"{name}.parquet/{row}" for row in range(4)],
        "shards": [f"{name}.tar/{name}/{name}"],
    }
    for source, expected in keys.items():
        items, reader = find_items(tmp_path / source), Reader()
        assert [item.key for item in items] == expected
        for item in items:
            assert item.error == ""
            assert np.array_equal(np.asarray(reader(item)), np.asarray(image(3))), item


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://a/b.png", "http is not fetched"),
        ("s3://bucket/my file.png", "s3 is not fetched"),
        ("data:image/png;base64,AAAA", "data URI"),
        ("", "empty"),
        (None, "empty"),
        ("x" * 1025, "1025 characters"),
        ("http://[a/b.png", "no path or URL"),
    ],
)
def test_what_is_no_path_says_why(tmp_path, value, words):
    found = located("k", value, tmp_path)
    assert found.key == "k"
    assert words in found.error
    assert located("k", "x" * 1024, tmp_path).error == ""


def test_what_cannot_be_read_keeps_its_row(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "p").mkdir()
    values = ["http://a/b.jpg", None, "missing.png"]
    parquet.write_table(arrow.table({"path": values}), tmp_path / "p" / "0.parquet")
    parquet.write_table(arrow.table({"image": [None, BROKEN, b""]}), tmp_path / "0.parquet")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.txt", b"x"), ("b.png", encoded(0) * 20)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:2000])
    for source, reasons in {
        "p": ["not on disk", "empty", "no such image"],
        "0.parquet": ["no bytes", "not an image", "no bytes"],
        "cut.tar": ["no image among txt", "ends inside", "not a complete"],
    }.items():
        rows = list(embed(tmp_path / source, plan=PLAN, batch=4, **MODEL))
        assert len(rows) >= 2
        for row, said in zip(rows, reasons, strict=False):
            assert said in row["error"], (source, row["error"])


def test_sources_that_are_none(tmp_path, folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with pytest.raises(FileNotFoundError, match="no such source"):
        find_items(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image; give a folder"):
        find_items(tmp_path / "empty")
    with pytest.raises(ValueError, match="leave it out"):
        find_items(folder, column="image")
    parquet.write_table(arrow.table({"x": [b"1"], "y": [b"2"], "n": [1]}), tmp_path / "empty" / "0.parquet")
    with pytest.raises(ValueError, match=r"several columns .*x, y.*--column"):
        find_items(tmp_path / "empty")
    with pytest.raises(ValueError, match="'n' .* is of type int64"):
        find_items(tmp_path / "empty", column="n")
    assert len(find_items(tmp_path / "empty", column="y")) == 1
    (tmp_path / "empty" / "a.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match="several kinds"):
        find_items(tmp_path / "empty")


# -- continuing -------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
import saint
from saint.lab.kinds.features import Features
from saint.lab.embed import embed
real = Features.__call__
def slow(self, inputs):
    time.sleep(0.2)
    return real(self, inputs)
Features.__call__ = slow
import torch
embed(sys.argv[1], "timm:test_vit", saint.Saint(threshold=0.5), pretrained=False, device="cpu", output=sys.argv[2],
      batch=2, rows=3)
"""


def test_a_killed_run_continues_and_writes_each_row_once(folder, tmp_path):
    whole = by_key(embed(folder, plan=PLAN, output=tmp_path / "whole", batch=2, rows=3, **MODEL))
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(out)])
    deadline = time.monotonic() + 60
    while not (out.exists() and files(out)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(OutputError, match="in use by another run"):
        embed(folder, plan=PLAN, output=out, batch=2, rows=3, **MODEL)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = sum(1 for _ in Rows.of(out))
    assert 0 < there < 10
    assert json.loads((out / "manifest.json").read_text())["complete"] is False
    (out / ".part-000007.parquet.abc").write_bytes(b"half")  # what a kill inside of a write leaves
    counted = []
    rows = embed(folder, plan=PLAN, output=out, batch=2, rows=3, tick=counted.append, **MODEL)
    assert rows.resumed == there == counted[0]
    assert sum(counted) == 10
    assert by_key(rows) == whole  # bit for bit: batches do not depend on where the run stopped
    assert not list(out.glob(".part*"))


def test_a_finished_run_loads_no_model(folder, tmp_path, monkeypatch):
    embed(folder, plan=PLAN, output=tmp_path / "out", **MODEL)
    monkeypatch.setattr("saint.lab.embed.run.Worker", None)
    assert embed(folder, plan=PLAN, output=tmp_path / "out", **MODEL).resumed == 10


def test_another_run_is_refused_and_told_why(folder, tmp_path):
    out = tmp_path / "out"
    embed(folder, plan=PLAN, output=out, **MODEL)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    again = {**MODEL, "plan": PLAN, "output": out}
    with pytest.raises(OutputError, match=r"plan\.vision\[0\]\.method\.threshold: 0.5 there, 0.6 now"):
        embed(folder, **{**again, "plan": saint.Saint(threshold=0.6)})
    with pytest.raises(OutputError, match=r"model: \"timm:test_vit\" there, \"timm:test_vit2\" now"):
        embed(folder, **{**again, "model": "timm:test_vit2"})
    with pytest.raises(OutputError, match=r"batch: 32 there, 8 now"):
        embed(folder, batch=8, **again)
    (folder / "new.png").write_bytes(encoded(11))
    with pytest.raises(OutputError, match=r"source.images: 10 there, 11 now"):
        embed(folder, **again)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_other_weights_under_the_same_name_are_refused(folder, tmp_path):
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    embed(folder, loaded, PLAN, output=tmp_path / "out", rows=4)
    files(tmp_path / "out")[0].unlink()
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    with pytest.raises(OutputError, match="weights"):
        embed(folder, loaded, PLAN, output=tmp_path / "out", rows=4)


def test_outputs_that_are_none(folder, tmp_path):
    with pytest.raises(ValueError, match="lies inside the source"):
        embed(folder, plan=PLAN, output=folder / "out", **MODEL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"holds thesis.tex and no manifest.json"):
        embed(folder, plan=PLAN, output=tmp_path / "mine", **MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        embed(folder, plan=PLAN, output=tmp_path / "file", **MODEL)
    out = tmp_path / "out"
    embed(folder, plan=PLAN, output=out, rows=3, **MODEL)
    files(out)[1].write_bytes(b"damaged")
    with pytest.raises(OutputError, match=r"part-000001.parquet is damaged .*delete the file"):
        embed(folder, plan=PLAN, output=out, rows=3, **MODEL)
    files(out)[1].unlink()
    assert len(by_key(embed(folder, plan=PLAN, output=out, rows=3, **MODEL))) == 10


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    with Parts(tmp_path / "out", {}) as parts, pytest.raises(OutputError, match="'a' came twice"):
        parts.add(arrow.table({"key": ["a", "b", "a"]}))


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_command(run, folder, tmp_path):
    line = ["embed", folder, "-o", tmp_path / "out", "--model", "timm:test_vit", "--no-pretrained", "--device", "cpu"]
    line += ["--threads", 1, "--plan", "vit/published", "--batch", 4, "--json", tmp_path / "record.json"]
    code, out, err = run(*line)
    assert code == 1, err
    assert "10 rows" in out
    assert "1 image(s) could not be embedded" in err
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["images"], record["errors"], record["resumed"]) == (10, 1, 0)
    _, out, _ = run(*line)
    assert "10 of them from an earlier run" in " ".join(out.split())
    code, _, err = run(*line, "--batch", 5)
    assert code == 2
    one_line(err, "batch: 4 there, 5 now")
    code, _, err = run(*line, "--workers", 2)
    assert code == 2
    one_line(err, "--ray")


def test_the_command_asks(run, folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engines")
    import checkpoints

    checkpoints.llava(tmp_path / "model")
    plan = saint.Plan(connector=saint.methods.DivPrune(keep=0.25))
    plan.save(tmp_path / "plan.json")
    line = ["embed", folder, "-o", tmp_path / "out", "--model", f"hf:{tmp_path / 'model'}", "--device", "cpu"]
    line += [
        "--plan",
        tmp_path / "plan.json",
        "--question",
        "w5 w6",
        "--max-new-tokens",
        3,
        "--json",
        tmp_path / "record.json",
    ]
    code, out, err = run(*line)
    assert code == 1, err
    assert "10 rows" in out
    assert "1 image(s) could not be asked about" in err
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["question"], record["batch"], record["errors"]) == ("w5 w6", 1, 1)
    said = by_key(Rows.of(tmp_path / "out"))
    want = by_key(embed(folder, line[5], plan, question="w5 w6", max_new_tokens=3, device="cpu"))
    assert said == want
    code, _, err = run(*line, "--size", 48)
    assert code == 2
    one_line(err, "size")


# -- models, columns, interruptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "number"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_model_has_the_precision_that_is_asked_for(dtype, number):
    loaded = Job("timm:test_vit", PLAN, pretrained=False, dtype=dtype).load("cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {number}


def tiny_model():
    return Encoder.load("timm:test_vit", pretrained=False)


def test_a_model_may_be_a_function_that_makes_it():
    job = Job(tiny_model, PLAN)
    assert job.facts()["model"] == "tiny_model"
    assert job.load("cpu").spec == "timm:test_vit"
    loaded = tiny_model()
    assert Job(loaded, PLAN).load("cpu") is loaded
    with pytest.raises(TypeError, match="embeddings need a subject.*got a int"):
        Job(lambda: 3, PLAN).load("cpu")


def test_paths_are_read_from_the_column_that_is_named(folder):
    from pyarrow import parquet, table

    names = [f"{'ab'[i % 2]}/{i}.png" for i in (0, 1, 2)]
    parquet.write_table(table({"aside": ["x.png", "y.png", "z.png"], "picture": names}), folder / "list.parquet")
    rows = by_key(embed(folder / "list.parquet", plan=PLAN, column="picture", **MODEL))
    assert len(rows) == 3
    assert all(row["error"] is None for row in rows.values()), rows


def test_an_interrupted_run_keeps_what_was_computed_and_is_not_complete(folder, tmp_path):
    from pyarrow import parquet

    def interrupt(count):
        if count:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        embed(folder, plan=PLAN, output=out, batch=2, tick=interrupt, **MODEL)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["complete"]) == ("embed", False)
    held = [key for file in out.glob("*.parquet") for key in parquet.read_table(file).column("key").to_pylist()]
    assert len(held) == 2
    embed(folder, plan=PLAN, output=out, batch=2, **MODEL)
    assert json.loads((out / "manifest.json").read_text())["complete"] is True


def test_a_model_that_fails_behind_its_first_success_gives_rows_with_errors(tmp_path, monkeypatch):
    from saint.lab.kinds.features import Features

    for number in range(8):
        Image.effect_noise((40, 40), 50 + number).convert("RGB").save(tmp_path / f"{number}.png")
    real, calls = Features.__call__, []

    def once(self, inputs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return real(self, inputs)

    monkeypatch.setattr(Features, "__call__", once)
    rows = by_key(embed(tmp_path, plan=PLAN, batch=1, **MODEL))
    assert [row["error"] is None for row in rows.values()] == [True, *[False] * 7]


@pytest.mark.parametrize(("height", "width"), [(28, 28), (28, 70), (70, 28), (9, 40)])
def test_patches_for_sameness_are_squares_of_the_shorter_side(height, width, monkeypatch):
    seen = []
    real = work.vote
    monkeypatch.setattr(work, "vote", lambda patches, at: seen.append((patches, at)) or real(patches, at))
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    work.sameness(pixels)
    side = max(1, min(height, width) // 14)
    ((patches, at),) = seen
    assert patches.shape == (1, (height // side) * (width // side), 3 * side * side)
    assert at == 0.95
    assert torch.equal(patches[0, 1], pixels[:, :side, side : 2 * side].flatten())


def test_a_plan_that_differs_in_many_settings_is_named_and_not_dumped():
    facts = {"batch": 4, "plan": saint.plan("vit/published").to_dict(), "size": None}
    other = facts | {"plan": saint.plan("vit/match").to_dict()}
    assert in_words(facts, facts) == ""
    assert in_words(facts, other) == "another plan"
    assert in_words(facts, other | {"batch": 8}) == "batch: 4 there, 8 now; another plan"
