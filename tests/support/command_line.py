"""The command line in this process: its exit status and what it prints; two photographs for it."""

import pytest
import torch
from PIL import Image

from saint.lab.cli import main

TINY = ["timm:test_vit", "--no-pretrained", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def run(capsys):
    """Runs a command: exit status, what it printed, and what it said on the error stream."""

    def call(*args: object) -> tuple[int, str, str]:
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(a) for a in args])
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def folder(tmp_path):
    """Two photographs."""
    path = tmp_path / "photos"
    path.mkdir()
    sky = Image.linear_gradient("L").resize((200, 170)).convert("RGB")
    sky.save(path / "sky.png")
    Image.effect_noise((180, 220), 80).convert("RGB").save(path / "noise.jpg")
    (path / "readme.txt").write_text("not a picture, and not meant to be")
    return path


@pytest.fixture
def command(run):
    """The same, for files in which ``run`` is a module."""
    return run


def one_line(err: str, *words: str) -> None:
    """A command ended in one line of error that has these words, and in no traceback."""
    errors = (line for line in err.splitlines() if not line.startswith("saint: note: "))
    lines = [line for line in errors if line.startswith("saint: ")]
    assert len(lines) == 1, err
    assert all(word in lines[0] for word in words), err
    assert "Traceback" not in err
