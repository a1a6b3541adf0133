"""Pictures of what was kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from saint.view import Cell, heatmap, overlay, save_png, sheet


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (96, 144, 3), dtype=np.uint8))


def test_kept_patches_are_untouched_and_dropped_ones_are_faded(photo):
    kept = torch.tensor([0, 4, 5, 23])

    out = np.asarray(overlay(photo, kept, (4, 6)))

    before = np.asarray(photo)
    assert out.shape == before.shape
    for patch in range(24):
        rows = slice(patch // 6 * 24, patch // 6 * 24 + 24)
        columns = slice(patch % 6 * 24, patch % 6 * 24 + 24)
        if patch in kept.tolist():
            assert (out[rows, columns] == before[rows, columns]).all(), patch
        else:
            inside = out[rows, columns][2:-2, 2:-2]
            assert inside.min() > 200, patch  # faded: nothing of the photograph is that light
    assert (out[:24, 24] == (24, 28, 36)).all()  # the line is right of patch 0, inside patch 1


def test_whole_and_empty_selections(photo):
    assert overlay(photo, list(range(24)), (4, 6)).tobytes() == photo.tobytes()
    assert np.asarray(overlay(photo, [], (4, 6))).min() > 200


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
