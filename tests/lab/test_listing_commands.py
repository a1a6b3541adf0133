"""Every command that takes pictures: damaged ones, names that are no UTF-8, consoles of other encodings, what is left out."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import saint
from saint.lab.cli import main

TINY = ["timm:test_vit", "--no-pretrained", "--threads", "1", "--device", "cpu"]
PLAN = json.dumps(saint.Plan(vision=saint.Stage(saint.methods.Random(keep=0.5), layers=[1])).to_dict())
CONNECTOR = json.dumps(saint.Plan(connector=saint.methods.DivPrune(keep=0.25)).to_dict())

# arguments by command; VLM, PHOTOS, ONE, QUESTIONS, OUT and JSON are put in
COMMANDS = {
    "view": ["view", *TINY, "--images", "PHOTOS", "--output", "OUT", "--json", "JSON"],
    "demo": [
        "demo", *TINY, "--images", "PHOTOS", "--plan", "vit/published", "--repeats", 1, "--limit", 20, "--output", "OUT",
        "--json", "JSON",
    ],
    "bench": ["bench", *TINY, "--images", "PHOTOS", "--batch", 20, "--repeats", 1, "--warmup", 0, "--json", "JSON"],
    "eval images": ["eval", "images", *TINY, "PHOTOS", "--plan", PLAN, "--json", "JSON"],
    "analyze": ["analyze", *TINY, "--images", "PHOTOS", "--causal", 0, "--json", "JSON"],
    "tune": ["tune", *TINY, "--images", "PHOTOS", "--target-flops", 0.7, "-o", "OUT/plan.json", "--json", "JSON"],
    "export": ["export", *TINY[:-2], "--images", "PHOTOS", "--plan", PLAN, "-o", "OUT/m.pt2", "--json", "JSON"],
    "embed": ["embed", "PHOTOS", "--model", *TINY, "--plan", PLAN, "-o", "OUT", "--json", "JSON"],
    "view, tiles": ["view", "VLM", "--images", "PHOTOS", "--plan", CONNECTOR, "--output", "OUT", "--json", "JSON"],
    "bench, answers": [
        "bench", "VLM", "--images", "PHOTOS", "--plan", CONNECTOR, "--batch", 20, "--repeats", 1, "--warmup", 0,
        "--new-tokens", 1, "--json", "JSON",
    ],
    "eval vqa": ["eval", "vqa", "VLM", "QUESTIONS", "--images", "PHOTOS", "--plan", CONNECTOR, "--json", "JSON"],
    "embed, answers": [
        "embed", "PHOTOS", "--model", "VLM", "--plan", CONNECTOR, "--question", "w5", "--max-new-tokens", 1, "-o", "OUT",
        "--json", "JSON",
    ],
}  # fmt: skip
BAD = "broken\\xe9.png"  # as it is told


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Thirteen good pictures in two folders, names that are no UTF-8, a damaged picture, other files."""
    folder = tmp_path_factory.mktemp("listed") / os.fsdecode(b"photos\xe9")
    inside = folder / os.fsdecode(b"caf\xe9")
    for number in range(13):
        file = (folder / "bar" / f"{number}.png", inside / f"{number}.png", inside / os.fsdecode(b"\xe9.png"))[
            number // 6
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((9, 7), 40 + 5 * number).convert("RGB").resize((90, 70)).save(file)
    (inside / os.fsdecode(b"broken\xe9.png")).write_bytes(b"\x89PNG no picture")
    (folder / "notes.csv").write_text("a,b")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    """The folder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "engines")
        import checkpoints

        checkpoints.llava(folder)
    return f"hf:{folder}"


@pytest.fixture
def line(photos, vlm, tmp_path):
    """The arguments of a command."""
    files = [file.relative_to(photos) for file in sorted(photos.glob("*/*.png"))]
    lines = [{"image": str(file), "question": "w5"} for file in files]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(entry) for entry in lines))
    given = {"PHOTOS": photos, "VLM": vlm, "OUT": tmp_path / "out", "JSON": tmp_path / "record.json",
             "QUESTIONS": tmp_path / "questions.jsonl", "OUT/plan.json": tmp_path / "plan.json",
             "OUT/m.pt2": tmp_path / "m.pt2"}  # fmt: skip

    def make(name: str) -> list[str]:
        return [str(given.get(str(word), word)) for word in COMMANDS[name]]

    return make


@pytest.fixture
def console(monkeypatch):
    """Run a command on a console of an encoding; gives the exit status and what it wrote."""

    def call(args: list[str], encoding: str) -> tuple[int, str]:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding=encoding, write_through=True))
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as ended:
                main(args)
        finally:
            torch.set_num_threads(threads)
        return ended.value.code or 0, written.getvalue().decode(encoding)

    return call


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_picture_and_odd_names_on_every_console(line, console, tmp_path, name, encoding):
    code, said = console(line(name), encoding)
    assert code == 1, said
    assert "Traceback" not in said
    text = (tmp_path / "record.json").read_text()
    record = json.loads(text)
    assert "\\ud" not in text  # half a character, which other programs refuse
    if name.startswith("embed"):
        import pyarrow.parquet

        rows = [
            row for part in (tmp_path / "out").glob("*.parquet") for row in pyarrow.parquet.read_table(part).to_pylist()
        ]
        assert [row["key"] for row in rows if row["error"]] == [f"caf\\xe9/{BAD}"]
    elif name == "eval vqa":
        assert "not evaluated" in said
        assert [failure["reason"] for failure in record["failures"]] == ["not an image that Pillow can read"]
    else:
        assert BAD in said
    if name != "eval vqa":
        assert {entry["reason"]: entry["names"] for entry in record["left_out"]} == {
            "hidden": [".hidden.png"], "the ending .csv is no picture's": ["notes.csv"],
        }  # fmt: skip
        assert "notes.csv" in said


def test_an_evaluation_continues_over_odd_names(line, console, tmp_path):
    args = [*line("eval images"), "--journal", str(tmp_path / "j.sqlite"), "--batch", "4"]
    first, again = console(args, "utf-8"), console(args, "utf-8")
    assert first[0] == again[0] == 1
    assert "13 of 14 evaluated, 13 of them from" in " ".join(again[1].split())
    assert BAD in first[1]
    assert BAD in again[1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_process_on_another_console(line, photos, tmp_path, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "saint", *line("eval images")]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert b"Traceback" not in done.stderr
    assert BAD.encode() in done.stderr
    assert (tmp_path / "record.json").exists()
