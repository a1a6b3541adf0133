"""Methods that look at pixels in front of block 0: which patches leave, in encoders and in towers whose mergers join patches."""

import copy
import itertools

import pytest
import torch
from torch import nn

import saint
from saint import Plan, Stage, copies, testing
from saint.frames import NONE
from saint.methods import Duplicates, Flat
from saint.testing import vlm as vlm_contracts
from saint.tokens import Candidates, Facts, TokenMap
from saint.vision.pixels import patches
from support.families import FAMILIES, maker
from support.models import NAMES, build, prepared

ROWS = ("timm/naflex", "timm/naflex-map", "transformers/siglip2")  # patches arrive as rows of a linear layer
CONVOLVED = [name for name in NAMES if name not in ROWS]
PACKED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def page(like: torch.Tensor, side: int, seed: int = 0) -> torch.Tensor:
    """Pictures of the shape of ``like`` [B, C, H, W] whose squares are drawn from a few, two of them of one colour."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(4, like.shape[1], side, side, generator=generator)
    pool[:2] = pool[:2, :, :1, :1]
    out = torch.randn(like.shape, generator=generator)
    for row, column in itertools.product(range(like.shape[2] // side), range(like.shape[3] // side)):
        for picture in out:
            which = int(torch.randint(0, 6, (), generator=generator))
            if which < 4:
                picture[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = pool[which]
    out[0, :, : 4 * side, : 2 * side] = 0.5  # blocks of one colour
    return out


def squares_of(picture: torch.Tensor, side: int) -> list[torch.Tensor]:
    """The squares of a picture [C, H, W], row by row."""
    rows, columns = picture.shape[1] // side, picture.shape[2] // side
    return [
        picture[:, r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(columns)
    ]


def first_of_each(shown: list[torch.Tensor]) -> list[int]:
    return [i for i, one in enumerate(shown) if not any(torch.equal(one, earlier) for earlier in shown[:i])]


# -- the rules, one patch at a time -----------------------------------------------------------------------------------


def some_rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of few values with distances of 0.25 and more between them, places in the frame before, and padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 4, (3, 11, 2), generator=generator) * 0.25
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.5, rows, -rows)  # with zeros of both signs
    before = torch.arange(33).view(3, 11) - 11
    before[torch.rand(3, 11, generator=generator) < 0.3] = NONE
    before[0] = NONE
    valid = torch.arange(11) < torch.tensor([11, 9, 11]).unsqueeze(1)
    before[2, 9:] = NONE  # what padding would be the place of
    return rows, before, valid


def leaving(rows: torch.Tensor, tau: float, before: torch.Tensor, valid: torch.Tensor) -> list[list[bool]]:
    """Rows in their order, one by one, each against what stands for the others."""
    stands: dict[int, torch.Tensor] = {}
    out = []
    for sample, (own, past, real) in enumerate(zip(rows.tolist(), before.tolist(), valid.tolist(), strict=True)):
        gone = []
        for slot, (row, frame, ok) in enumerate(zip(own, past, real, strict=True)):
            here = sample * len(own) + slot
            known = [stands[frame]] if frame != NONE else []
            known += [stands[sample * len(own) + i] for i in range(slot) if real[i]]
            near = [one for one in known if max(abs(a - b) for a, b in zip(row, one, strict=True)) <= tau]
            stands[here] = near[0] if near else row
            gone.append(bool(near) and ok)
        out.append(gone)
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.6])
@pytest.mark.parametrize(("block", "some", "dense"), [(4, 12, 8), (256, 12, 8), (256, 1, 0)])
def test_copies_leave_one_by_one(seed, tau, block, some, dense, monkeypatch):
    monkeypatch.setattr(copies, "_BLOCK", block)
    monkeypatch.setattr(copies, "_SOME", some)  # values by which most pairs differ
    monkeypatch.setattr(copies, "_DENSE", dense)
    rows, before, valid = some_rows(seed)
    want = leaving(rows, tau, before, valid)
    assert any(map(any, want))
    assert not all(map(all, want))
    assert copies.close(rows, tau, before, valid).tolist() == want
    plain = leaving(rows, tau, torch.full_like(before, NONE), torch.ones_like(valid))
    assert copies.close(rows, tau).tolist() == plain
    if tau == 0:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert copies.repeated(rows.to(dtype), before, valid).tolist() == want
            assert copies.repeated(rows.to(dtype)).tolist() == plain


def test_rows_that_share_a_hash_are_no_copies(monkeypatch):
    monkeypatch.setattr(copies, "_hashes", lambda rows: rows.new_zeros(rows.shape[:2], dtype=torch.long))
    rows = torch.tensor([[[1.0], [1.0], [2.0], [2.0], [3.0], [1.0]]])
    assert copies.repeated(rows).tolist() == [[False, True, False, True, False, False]]  # the last is not found


@pytest.mark.parametrize("side", [2, 3, 4])
def test_of_a_block_of_one_colour_the_first_stays(side):
    generator = torch.Generator().manual_seed(side)
    counts, columns = [30, 28], [6, 4]  # the second is padded
    marked = torch.rand(2, 30, generator=generator) < 0.9
    colours = (torch.rand(2, 30, 3, generator=generator) < 0.05).float()
    colours[1] = colours[1, :, :1]
    index = torch.arange(30).repeat(2, 1)
    index[1, 28:] = 0
    valid = torch.arange(30) < torch.tensor(counts).unsqueeze(1)
    marked &= valid
    got = copies.in_blocks(marked, colours, index, torch.tensor(columns), side, valid)
    gone = []
    for sample, (count, width) in enumerate(zip(counts, columns, strict=True)):
        out = [False] * 30
        for top, left in itertools.product(range(0, count // width, side), range(0, width, side)):
            block = [
                r * width + c
                for r in range(top, min(top + side, count // width))
                for c in range(left, min(left + side, width))
            ]
            alike = all(torch.equal(colours[sample, i], colours[sample, block[0]]) for i in block)
            if alike and all(bool(marked[sample, i]) for i in block):
                for i in block[1:]:
                    out[i] = True
        gone.append(out)
    assert any(map(any, gone))
    assert got.tolist() == gone


@pytest.mark.parametrize(("size", "kernel"), [((17, 12), (4, 3)), ((2, 4, 4), (2, 4, 4)), ((5, 9, 4), (2, 4, 2))])
def test_patches_are_what_the_convolution_sees(size, kernel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator)
    convolution = (nn.Conv2d if len(size) == 2 else nn.Conv3d)(3, 5, kernel, kernel)
    want = convolution(x).flatten(2).mT
    got = patches(x, kernel).flatten(2) @ convolution.weight.flatten(1).mT + convolution.bias
    assert torch.allclose(got, want, atol=1e-5)


def shown(pixels: torch.Tensor, **facts) -> Candidates:
    tokens = TokenMap.full(*pixels.shape[:2], torch.device("cpu"))
    return Candidates(pixels.flatten(2), pixels.flatten(2), tokens, 0, 1, facts=Facts(pixels=pixels, **facts))


def test_one_token_of_every_frame_stays_and_as_many_as_a_guard_says():
    pixels = torch.zeros(3, 4, 1, 2)
    cells = torch.arange(4).repeat(3, 1)
    assert Duplicates().select(shown(pixels, cells=cells)).lengths == (1, 1, 1)
    assert Duplicates(tau=0.1).select(shown(pixels, cells=cells)).lengths == (1, 1, 1)
    kept = Duplicates().select(shown(pixels, min_keep=(2, 4, 1)))
    assert kept.lengths == (2, 4, 1)
    assert kept.slots[0, :2].tolist() == [0, 3]


def test_nothing_leaves_of_pictures_without_copies():
    pixels = torch.randn(2, 9, 3, 4)
    assert Duplicates().select(shown(pixels)) is None
    assert Flat().select(shown(pixels, grids=((3, 3), (3, 3)))) is None


# -- encoders ---------------------------------------------------------------------------------------------------------


def pages(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], str, int]:
    """A model, its inputs with pages in place of pictures, the name of that input, and the side of a patch."""
    model, _, inputs = prepared(name)
    key = next(key for key, value in inputs.items() if value.ndim == 4)
    side = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).kernel_size[0]
    return model, {**inputs, key: page(inputs[key], side)}, key, side


@pytest.mark.parametrize("name", CONVOLVED)
def test_copies_leave_an_encoder(name):
    model, inputs, key, side = pages(name)
    plan = Plan(vision=Duplicates())
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    testing.check_undo(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        (entry,) = session.trace
    assert (entry.stage, entry.layer, entry.placement) == ("vision", 0, "input")
    for picture, kept in zip(inputs[key], entry.kept, strict=True):
        assert kept.tolist() == first_of_each(squares_of(picture, side))
    assert len(set(entry.tokens_out.tolist())) > 1


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/clip", "open_clip/vit", "transformers/dinov3"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_flat_blocks_leave_an_encoder(name, blocks):
    model, inputs, key, side = pages(name)
    plan = Plan(vision=[Flat(side=blocks), Stage(saint.SaintFullGraph(keep=0.5), layers=[1])])
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        kept = session.trace[0].kept[0].tolist()
    columns = inputs[key].shape[3] // side
    gone = set(range(columns * (inputs[key].shape[2] // side))) - set(kept)
    patch = squares_of(inputs[key][0], side)
    assert gone if blocks == 2 else not gone, "what is of one colour is two patches wide"
    for one in gone:
        top, left = one // columns // blocks * blocks, one % columns // blocks * blocks
        assert one != top * columns + left
        assert torch.equal(patch[one], patch[top * columns + left])
        assert bool((patch[one] == patch[one][:, :1, :1]).all())


def test_close_patches_leave_an_encoder_and_others_stay():
    model, inputs, key, _ = pages("timm/vit-augreg")
    step = torch.randint(0, 2, inputs[key].shape, generator=torch.Generator().manual_seed(1)) * 0.01
    inputs = {key: inputs[key] + step}
    counts = []
    for tau in (0.0, 0.005, 0.02):
        testing.check_oracle(model, Plan(vision=Duplicates(tau=tau)), inputs)
        with saint.pruned(model, Duplicates(tau=tau)) as session:
            testing.run(model, inputs)
            counts.append(session.trace[0].tokens_out.tolist())
    assert counts[0] == counts[1] == [36] * 3
    assert all(n < 36 for n in counts[2])


def test_copies_of_a_model_and_forwards_without_the_plan_keep_nothing_of_it():
    model, inputs, _, _ = pages("timm/vit-augreg")
    with torch.no_grad():
        clean = model(**inputs)
        with saint.pruned(model, Duplicates()) as session:
            pruned = model(**inputs)
            with session.disabled():
                assert torch.equal(model(**inputs), clean)
            assert torch.equal(copy.deepcopy(model)(**inputs), clean)
            assert torch.equal(model(**inputs), pruned)
    assert not torch.equal(pruned, clean)


# -- towers whose mergers join patches ----------------------------------------------------------------------------------


def paged(family, model):
    """Inputs as ``maker`` makes them, with pages for pictures; and the squares that the candidates of each picture show."""
    make = maker(family, model)
    patch = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)).kernel_size[-1]
    side = family.merge_size or 1

    def make_pages(which):
        inputs = make(which)
        pixels = inputs["pixel_values"]
        if family.name in PACKED:
            groups = pixels.view(-1, side**2, pixels.shape[-1])
            for group in range(len(groups)):  # what a sample shows does not depend on those beside it
                if group % 3:
                    groups[group] = groups[group % 2]
                if group % 7 == 1:
                    groups[group, 1] += 1  # three patches are copies, and the square is none
            inputs["pixel_values"] = groups.flatten(0, 1)
        else:
            inputs["pixel_values"] = torch.cat([page(one[None], side * patch) for one in pixels.flatten(0, -4)]).view(
                pixels.shape
            )
        return inputs

    def squares(inputs):
        pixels = inputs["pixel_values"]
        if family.name not in PACKED:
            return [squares_of(picture, side * patch) for picture in pixels.flatten(0, -4)]
        counts = [int(grid.prod()) // side**2 for grid in inputs["image_grid_thw"]]
        return [list(one) for one in pixels.view(-1, side**2, pixels.shape[-1]).split(counts)]

    return make_pages, squares


@pytest.mark.parametrize("name", [*PACKED, "gemma3", "llava-llama", "internvl", "idefics3"])
def test_copies_leave_a_tower(name):
    if name not in FAMILIES:
        pytest.skip(f"known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    model = family.build()
    make, squares = paged(family, model)
    plan = Plan(vision=Duplicates())
    vlm_contracts.check_oracle(model, plan, make)
    vlm_contracts.check_undo(model, plan, make([0, 1]))
    inputs = make([0, 1])
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**inputs)
        entry = session.trace[0]
    want = [first_of_each(shown) for shown in squares(inputs)]
    assert [kept.tolist() for kept in entry.kept] == want
    assert all(len(kept) < len(shown) for kept, shown in zip(want, squares(inputs), strict=True))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_the_place_is_in_front_of_block_0():
    assert Plan(vision=Duplicates()).vision[0].placement == "input"
    assert Plan(vision=Stage(Flat(), placement="input")) == Plan(vision=Flat())
    assert Plan.from_dict(Plan(vision=Duplicates(tau=0.1)).to_dict()) == Plan(vision=Duplicates(tau=0.1))
    with pytest.raises(ValueError, match="Duplicates works on pixels.*give \"input\"; got 'mid'"):
        Stage(Duplicates(), placement="mid")
    with pytest.raises(ValueError, match="in front of layer 0 only: leave layers out"):
        Stage(Flat(), layers=[3])
    with pytest.raises(ValueError, match="not defined for the language stage"):
        Plan(language=Duplicates())


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf"), True, "0"])
def test_a_wrong_tau(tau):
    with pytest.raises(ValueError, match=r"^tau must be a number in \[0, "):
        Duplicates(tau=tau)


@pytest.mark.parametrize("side", [1, 0, 2.0, True, None])
def test_a_wrong_side(side):
    with pytest.raises(ValueError, match="^side must be an integer >= 2"):
        Flat(side=side)


@pytest.mark.parametrize("name", ["timm/naflex", "transformers/siglip2"])
def test_an_encoder_that_is_given_rows_is_refused_and_left_alone(name):
    model = build(name)
    before = testing.snapshot(model)
    with pytest.raises(saint.UnsupportedModelError, match="does not show the pixels.*layout is not known"):
        saint.apply(model, Duplicates())
    assert testing.snapshot(model) == before


def test_an_encoder_whose_patches_overlap_is_refused():
    model = build("timm/vit-augreg")
    model.patch_embed.proj.stride = (8, 8)
    with pytest.raises(saint.UnsupportedModelError, match="patches overlap"):
        saint.apply(model, Duplicates())
