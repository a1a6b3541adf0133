"""Every command finds the same pictures, and tells what it leaves out; pictures and names at the edges."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saint.lab.cli import main
from saint.lab.embed.sources import find_items, located
from saint.lab.images import read_image
from saint.lab.kinds import Encoder, Given
from saint.lab.loading.plans import changed_plan
from saint.lab.report.reading import behind, mark_of, place
from saint.lab.sources.listing import left_facts
from saint.lab.sources.photos import load_images
from saint.lab.sources.questions import read_questions
from saint.lab.sources.samples import find_samples
from saint.methods import get
from saint.plans import Plan, Stage


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "PNG")
    return path


def embed_names(folder: Path) -> set[str]:
    return {item.key for item in find_items(folder)}


def eval_names(folder: Path) -> set[str]:
    found = find_samples(str(folder))
    return {sample.id for sample in found.items} | {failure.id for failure in found.unreadable}


def asked_names(folder: Path) -> set[str]:
    return {item.where for item in Encoder.items(Given(folder), None, {})[0]}


def photo_names(folder: Path) -> set[str]:
    good, bad = load_images(folder)
    return {f"{photo.name}.png" for photo in good} | {name for name, _ in bad}


@pytest.mark.parametrize("listing", [embed_names, eval_names, asked_names, photo_names])
@pytest.mark.filterwarnings("always")
def test_every_listing_takes_the_same_and_tells_the_rest(tmp_path, listing):
    root = tmp_path / "photos"
    for name in ("loose.png", "a/one.png", "a/.hidden/no.png", "a/.no.png"):
        picture(root / name)
    picture(root / "a/none.png").rename(root / "a/none")
    picture(tmp_path / "disk2/linked.png")
    (root / "b").symlink_to(tmp_path / "disk2")
    (root / "a/loop").symlink_to(root)
    (root / "a/gone.png").symlink_to("nowhere.png")
    (root / "a/phone.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(50))
    (root / "a/notes.csv").write_text("a,b")
    with pytest.warns(UserWarning, match="left out") as told:
        found = {Path(name).stem for name in listing(root)}
    assert found == {"loose", "one", "none", "linked", "gone", "phone"}
    said = " ".join(str(warning.message) for warning in told)
    for name in ("a/.hidden", "a/.no.png", "a/loop", "notes.csv"):
        assert name in said


def test_splits_are_no_classes(tmp_path):
    for name in ("train/cat/1.png", "val/cat/1.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match="splits .train, val., not classes"):
        find_samples(str(tmp_path))
    assert len(find_samples(str(tmp_path), labels=False).items) == 2
    assert find_samples(str(tmp_path), classes=["train", "val"]).classes == ["train", "val"]


def test_one_picture_beside_folders_is_one_picture(tmp_path):
    picture(tmp_path / "sub/other.png")
    assert [item.where for item in Encoder.items(Given(picture(tmp_path / "one.png")), None, {})[0]] == ["one.png"]


@pytest.mark.parametrize("top", [1.0, 255, 256, 4095, 65535, 1_000_000])
def test_greys_of_any_range_are_the_same_picture(tmp_path, top):
    ramp = np.linspace(0, top, 1024).reshape(32, 32)
    values = ramp.astype("float32" if top in (1.0, 1_000_000) else "uint16")
    Image.fromarray(values).save(tmp_path / "x.tif")
    got = np.asarray(read_image(tmp_path / "x.tif"))[..., 0]
    assert np.abs(got - ramp / top * 255).max() <= 1.5


def test_greys_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], dtype="float32")).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="not finite"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, IndexError, KeyError, EOFError, SyntaxError])
def test_what_decoders_raise_is_an_error_of_that_picture(tmp_path, monkeypatch, error):
    def broken(*_given):
        raise error("x" * 5000)

    file = picture(tmp_path / "a.png")
    monkeypatch.setattr("saint.lab.images.as_rgb", broken)
    with pytest.raises(ValueError, match="xxx") as told:
        read_image(file)
    assert len(str(told.value)) < 400


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    folder = os.fsencode(tmp_path)
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    os.mkdir(folder + b"/\xe9")
    for name in (b"/\xe9/caf\xe9.png", b"/\xe9/ok.png"):
        with open(folder + name, "wb") as file:
            file.write(data.getvalue())
    for listing in (embed_names, eval_names, asked_names, photo_names):
        names = listing(tmp_path)
        assert len(names) == 2
        assert any("caf\\xe9" in name for name in names)
        json.dumps(sorted(names), ensure_ascii=False).encode()


@pytest.mark.parametrize("value", ["//[scan/b.png", "data:image/png;base64,AAAA", "iVBOR" * 2000])
def test_text_that_is_no_path_is_an_error_of_its_row(tmp_path, value):
    item = located("0", value, tmp_path)
    assert item.error
    assert len(item.error) < 400


def test_keys_of_questions_are_known(tmp_path):
    line = {"image": "a.png", "question": "What?", "category": None}
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"answers": ["red"]}))
    good, bad = read_questions(file, tmp_path)
    assert [question.category for question in good] == [""]
    assert "answers" in bad[0].reason
    assert "answer, category" in bad[0].reason


def test_options_on_a_plan_with_two_vision_stages_are_refused():
    one = Stage(get("saint")(), layers=[0])
    plan = Plan(vision=(one, Stage(get("saint")(), layers=[1])))
    for options in ((0.5, None), (None, "0-1")):
        with pytest.raises(ValueError, match="this plan has 2"):
            changed_plan(plan, *options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_consoles_of_other_encodings_take_every_text(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("saint.lab.cli.app", lambda **_named: print("█ caf\udce9"))
    main([])
    stream.flush()
    assert b"caf" in stream.buffer.getvalue()


def test_the_input_is_no_layer():
    steps = [{"layer": 0, "placement": "input"}, {"layer": 0, "placement": "post"}, {"layer": 3}]
    assert [place(step) for step in steps] == [-1, 0, 3]
    assert [mark_of(step) for step in steps] == ["in", "0", "3"]
    assert behind(steps[0]) == "in front of the layers"


def shard(file: Path, **members: bytes) -> Path:
    """A tar file; "-" in a name stands for ".", "+" for a byte that is no UTF-8."""
    with tarfile.open(file, "w", errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("-", ".").replace("+", "\udce9"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


@pytest.mark.parametrize("listing", [embed_names, eval_names])
@pytest.mark.filterwarnings("always")
def test_shards_tell_the_same_and_hold_every_kind_of_picture(tmp_path, listing):
    data = picture(tmp_path / "x.png").read_bytes()
    root = tmp_path / "shards"
    root.mkdir()
    names = ["a-png", "b-gif", "c-HEIC", "caf+-png", "-_a-png", "README", "d-txt"]
    shard(root / "one.tar", **dict.fromkeys(names, data))
    shard(root / "two.TAR", **{"a-png": data})
    (root / "notes.csv").write_text("a,b")
    with pytest.warns(UserWarning, match="left out") as told:
        found = listing(root)
    assert found == {*(f"one.tar/{key}" for key in ("a", "b", "c", "caf\\xe9", "d")), "two.TAR/a"}
    assert [item.key for item in find_items(root) if item.error] == ["one.tar/d"]  # the only one without a picture
    assert [failure.id for failure in find_samples(str(root)).unreadable] == ["one.tar/d"]
    said = " ".join(str(warning.message) for warning in told)
    for name in ("one.tar/._a.png", "one.tar/README", "notes.csv"):
        assert name in said


@pytest.mark.parametrize("listing", [embed_names, eval_names, asked_names])
def test_pictures_beside_shards_are_refused(tmp_path, listing):
    data = picture(tmp_path / "x.png").read_bytes()
    shard(tmp_path / "x.tar", **{"a-png": data})
    with pytest.raises(ValueError, match=r"several kinds \(.tar, image\)"):
        listing(tmp_path)


@pytest.mark.filterwarnings("always")
def test_what_lies_beside_a_saved_data_set_is_told(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = picture(tmp_path / "x.png").read_bytes()
    columns = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=columns).save_to_disk(
        tmp_path / "set"
    )
    picture(tmp_path / "set/more/loose.png")
    with pytest.warns(UserWarning, match=r"beside a saved data set\): more/loose.png"):
        found = find_samples(str(tmp_path / "set"))
    assert len(found.items) == 1
    assert found.left_out == {"beside a saved data set": ["more/loose.png"]}
    assert left_facts(found.left_out) == [
        {"reason": "beside a saved data set", "count": 1, "names": ["more/loose.png"]}
    ]


def test_a_record_names_a_hundred_and_counts_all():
    (fact,) = left_facts({"hidden": [str(n) for n in range(250)]})
    assert (fact["reason"], fact["count"], len(fact["names"])) == ("hidden", 250, 100)
