"""Pictures of what was kept."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from saint.lab.view import Cell, heatmap, overlay, save_png, sheet


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (96, 144, 3), dtype=np.uint8))


def tile(picture: Image.Image, patch: int, columns: int = 6, side: int = 24) -> np.ndarray:
    rows, across = divmod(patch, columns)
    return np.asarray(picture)[rows * side : (rows + 1) * side, across * side : (across + 1) * side].astype(int)


def test_kept_patches_are_untouched_and_dropped_ones_are_darkened_and_hatched(photo):
    kept = [0, 4, 5, 23]

    out = overlay(photo, torch.tensor(kept), (4, 6))

    assert out.size == photo.size
    for patch in range(24):
        before, after = tile(photo, patch), tile(out, patch)
        if patch in kept:
            assert (after == before).all(), patch
        else:
            inside, was = after[2:-2, 2:-2], before[2:-2, 2:-2]
            plain = (inside == np.round(was * 0.35)).all(-1)
            assert 0.6 < plain.mean() < 0.9, patch  # the rest is stripes
    assert (np.asarray(out)[:24, 24] == (255, 196, 0)).all()  # the line is right of patch 0, inside patch 1


@pytest.mark.parametrize("shade", [0, 30, 90, 128, 200, 255])
def test_dropped_patches_can_be_told_on_any_flat_picture(shade):
    flat = Image.new("RGB", (144, 96), (shade,) * 3)
    out = overlay(flat, [0, 1, 6], (4, 6))
    kept, dropped = tile(out, 0), tile(out, 16)
    assert np.ptp(kept) == 0
    assert np.ptp(dropped) > 40  # stripes: whatever is flat was kept
    assert np.abs(dropped - kept).mean() > 15


def test_whole_and_empty_selections(photo):
    assert overlay(photo, list(range(24)), (4, 6)).tobytes() == photo.tobytes()
    assert np.asarray(overlay(photo, [], (4, 6))).mean() < 0.7 * np.asarray(photo).mean()


def test_an_uneven_grid_covers_the_picture(photo):
    out = np.asarray(overlay(photo, [0], (5, 7)))  # neither 96 / 5 nor 144 / 7 is whole
    assert (out[:20, :21] == np.asarray(photo)[:20, :21]).all()
    assert out.shape == (96, 144, 3)


def test_patches_beyond_the_grid_are_refused(photo):
    with pytest.raises(ValueError, match=r"0\.\.23 of the 4 x 6 grid"):
        overlay(photo, [24], (4, 6))


def test_a_sheet_holds_every_picture_unscaled(photo):
    square = photo.resize((224, 224))
    cells = [Cell(square, "first", "note"), Cell(square, "second")]

    one, two = sheet([cells], "title"), sheet([cells, cells[:1]], "title", "legend")

    assert two.height > one.height + 224
    page = np.asarray(one)
    margin, head = 224 // 9, np.flatnonzero((page == np.asarray(square)[0, 0]).all(-1).any(1))[0]
    assert (page[head : head + 224, margin : margin + 224] == np.asarray(square)).all()


def test_heatmap_runs_from_dark_to_light():
    ramp = np.asarray(heatmap(torch.linspace(0, 1, 64).repeat(4, 1), (64, 4)).convert("L")).astype(int)
    assert (np.diff(ramp[0]) >= -2).all()
    assert ramp[0, 0] < 10
    assert ramp[0, -1] > 230


def test_png_stays_below_the_limit(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8))
    save_png(noise, tmp_path / "new" / "small.png", limit=100_000)
    assert (tmp_path / "new" / "small.png").stat().st_size <= 100_000
    save_png(noise, tmp_path / "whole.png")
    assert Image.open(tmp_path / "whole.png").size == (400, 400)


def test_a_full_disk_leaves_the_old_picture_and_no_half_one(tmp_path, monkeypatch):
    picture = Image.effect_noise((300, 300), 90).convert("RGB")
    save_png(picture, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    full_disk(monkeypatch)
    for name in ("a.png", "b.png"):
        with pytest.raises(OSError, match="No space left on device") as raised:
            save_png(picture.transpose(Image.Transpose.ROTATE_90), tmp_path / name)
        assert raised.value.errno == errno.ENOSPC
        assert name in str(raised.value)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    from saint.lab.records import write_json

    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device.*r\.json"):
        write_json(tmp_path / "r.json", {"much": ["x" * 100] * 100})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def full_disk(monkeypatch):
    """A disk on which 1000 bytes are left, for whoever opens a file."""
    real = os.fdopen

    def opened(handle, mode="r", *args, **kwargs):
        file = real(handle, mode, *args, **kwargs)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[:1000])
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", opened)
