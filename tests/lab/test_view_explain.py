"""Pictures that say why patches were dropped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import saint
from saint import graph
from saint.lab.cli import main
from saint.lab.view import explain


def flat(size=(448, 448), colour=(90, 90, 90)):
    return Image.new("RGB", size, colour)


def step(layer, index, keys, stays, into):
    as_tensor = torch.tensor
    return explain.Step(layer, as_tensor(index), as_tensor(keys), as_tensor(stays), as_tensor(into))


@pytest.fixture
def two_steps():
    """2 x 2 patches: 1 leaves behind layer 0 for 0, and 0 behind layer 3 for 2."""
    keys = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]
    first = step(0, [0, 1, 2, 3], keys, [True, False, True, True], [0, 0, 2, 3])
    second = step(3, [0, 2, 3], [keys[0], keys[2], keys[3]], [False, True, True], [2, 2, 3])
    return [first, second]


def colour_at(image, row, column, grid=(2, 2)):
    box = image.width // grid[1], image.height // grid[0]
    patch = np.asarray(image)[row * box[1] : (row + 1) * box[1], column * box[0] : (column + 1) * box[0]]
    return np.median(patch.reshape(-1, 3), 0)


def test_patches_that_left_have_the_colour_of_their_layer(two_steps):
    picture = explain.dropped(flat(), (2, 2), two_steps, lines=False)

    colours = explain.layer_colours([0, 3])
    for place, layer in (((0, 1), 0), ((0, 0), 3)):
        expected = 0.28 * 90 + 0.72 * np.array(colours[layer])
        assert np.abs(colour_at(picture, *place) - expected).max() <= 2
    assert np.array_equal(colour_at(picture, 1, 0), [90, 90, 90])
    assert np.array_equal(colour_at(picture, 1, 1), [90, 90, 90])


def test_lines_end_at_the_last_survivor_of_a_chain(two_steps):
    picture = np.asarray(explain.dropped(flat(), (2, 2), two_steps))
    plain = np.asarray(explain.dropped(flat(), (2, 2), two_steps, lines=False))
    changed = (picture != plain).any(-1)

    half = picture.shape[0] // 2  # the line of 1 touches the middle
    assert changed[half:, :half].any()  # 1 stood for by 0, which 2 stands for
    assert not changed[half + 4 :, half + 4 :].any()  # nothing became part of 3


def test_degrees_are_counts_of_neighbours():
    keys = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.05]]  # source 0 has two neighbours, source 2 none
    seen = step(0, [0, 1, 2, 3], keys, [True] * 4, [0, 1, 2, 3])
    picture = explain.degrees(flat(), (2, 2), seen, 0.9, 2)

    votes, none = colour_at(picture, 0, 0), colour_at(picture, 1, 0)
    assert votes.sum() > none.sum() + 200
    grey = colour_at(picture, 0, 1)
    assert grey.max() - grey.min() <= 1
    size = picture.width // 2
    assert picture.getpixel((2, 2)) == (255, 255, 255)  # the frame of a vote
    assert picture.getpixel((2, size + 2)) != (255, 255, 255)


def test_degrees_of_a_method_that_centres_are_of_centred_keys():
    keys = [[9.0, 1.0], [9.0, 0.9], [9.0, -1.0], [9.0, -0.9]]  # alike until their mean is subtracted
    seen = step(0, [0, 1, 2, 3], keys, [True] * 4, [0, 1, 2, 3])
    framed = [
        explain.degrees(flat(), (2, 2), seen, 0.9, 2, center=c).getpixel((2, 2)) == (255,) * 3 for c in (False, True)
    ]
    assert framed == [True, False]


def test_the_graph_around_a_patch():
    keys = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.7, 0.7]]
    seen = step(2, [0, 1, 2, 3], keys, [True] * 4, [0, 1, 2, 3])
    picture = explain.around(flat(), (2, 2), seen, (0, 0), 0.9)

    assert colour_at(picture, 0, 1).sum() > colour_at(picture, 1, 1).sum() > colour_at(picture, 1, 0).sum()
    middle = picture.width // 4
    assert picture.getpixel((2 * middle, middle)) == (255, 255, 255)  # an edge to the patch on the right
    assert picture.getpixel((middle, 2 * middle)) != (255, 255, 255)
    with pytest.raises(ValueError, match="not on the grid of 2 rows"):
        explain.around(flat(), (2, 2), seen, (2, 0), 0.9)
    with pytest.raises(ValueError, match="was dropped in front of layer 2"):
        explain.around(flat(), (2, 2), replace(seen, index=torch.tensor([1, 2, 3, 4])), (0, 0), 0.9)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=4).eval()


@pytest.mark.parametrize(
    "method", [saint.Saint(threshold=0.4), saint.methods.ToMe(r=12), saint.methods.PPT(r=12, threshold=0.0)]
)
def test_a_witness_agrees_with_the_trace(vit, method):
    witness = explain.Witness()
    with saint.apply(vit, saint.Plan(vision=saint.Stage(method, layers=[0, 2])), observers=[witness]) as session:
        vit(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3)))
        trace = session.trace
    steps = witness.take()

    assert [s.layer for s in steps] == [0, 2]
    assert witness.take() == []
    for found, told in zip(steps, trace, strict=True):
        assert torch.equal(found.index[found.stays], told.kept[0])
        assert set(found.into.tolist()) <= set(told.kept[0].tolist())
        assert torch.equal(found.into[found.stays], told.kept[0])
    if isinstance(method, saint.methods.ToMe) and trace[0].into[0].min() >= 0:
        before = {n: m for s in steps[:1] for n, m in zip(s.index.tolist(), s.into.tolist(), strict=True)}
        after = dict(zip(steps[1].index.tolist(), steps[1].into.tolist(), strict=True))
        assert [after[before[n]] for n in range(196)] == trace[1].into[0].tolist()
    else:  # what stands for a patch is the survivor with the most similar key
        first = steps[0]
        points = graph.metric(first.keys[None])[0]
        for n in (~first.stays).nonzero().flatten().tolist():
            nearest = max(first.stays.nonzero().flatten().tolist(), key=lambda m: float(points[n] @ points[m]))
            assert float(points[n] @ points[nearest]) - float(points[n] @ points[int(first.into[n])]) < 1e-6


def test_the_published_split_compares_columns_of_even_grids():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(196, 3, generator=generator)
    seen = explain.Step(0, torch.arange(196), keys, torch.ones(196, dtype=torch.bool), torch.arange(196))
    method = saint.Saint(threshold=0.8, neighbors=5)

    published, board = (explain.split(seen, (14, 14), method, board=b) for b in (False, True))

    gone = (~published.stays).nonzero().flatten()
    assert len(gone) > 20
    assert (gone % 14 % 2 == 0).all()  # whole columns can lose nothing
    other = (~board.stays).nonzero().flatten()
    assert len(other) == len(gone)
    assert ((other // 14 + other % 14) % 2 == 0).all()
    assert 0.3 < (other % 14 % 2).float().mean() < 0.7
    ballot = graph.vote(keys[None], 0.8, 5)
    assert sorted(graph.drop_order(ballot)[0, : int(ballot.votes)].tolist()) == gone.tolist()
    with pytest.raises(ValueError, match="whole grid"):
        explain.split(replace(seen, index=torch.arange(100)), (14, 14), method, board=True)


def test_the_command_counts_degrees_as_the_method_does(tmp_path, monkeypatch):
    counted = []
    true = explain.degrees
    monkeypatch.setattr(explain, "degrees", lambda *given, **more: counted.append(more) or true(*given, **more))
    Image.effect_noise((90, 70), 60).save(tmp_path / "noise.png")
    plan = saint.Plan(vision=saint.Stage(saint.Saint(threshold=0.3, center=True), layers=[0]))
    rest = [
        "--no-pretrained",
        "--device",
        "cpu",
        "--images",
        str(tmp_path / "noise.png"),
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["view", "timm:test_vit", *rest, "--plan", json.dumps(plan.to_dict()), "--why"])
    assert not ended.value.code
    assert counted == [{"center": True}]
