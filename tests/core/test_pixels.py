"""Methods that look at pixels in front of block 0: which patches leave, in encoders and in towers whose mergers join patches."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import saint
from saint import Plan, Stage, copies, testing
from saint.frames import NONE
from saint.methods import Duplicates, Flat
from saint.testing import vlm as vlm_contracts
from saint.tokens import Candidates, Facts, TokenMap
from saint.upstream import registry
from saint.upstream.specs import RowLayout
from saint.vision.locate import find
from saint.vision.pixels import Patcher, patches
from support.families import FAMILIES, maker
from support.models import NAMES, build, prepared
from support.padded import SHAPES, naflex, with_padding
from support.patchified import SIDE, as_rows

PICTURED = [name for name in NAMES if name != "transformers/siglip2"]  # given pictures
ROWS = ("naflex-avg", "naflex-map", "naflex-token", "naflex-axial", "transformers/siglip2")  # given rows of patches
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


def without_flat(picture: torch.Tensor, side: int, blocks: int) -> list[int]:
    """Squares of a picture without all but the first of each block of so many a side that is of one colour."""
    columns, squares = picture.shape[2] // side, squares_of(picture, side)
    kept = []
    for number, one in enumerate(squares):
        row, column = divmod(number, columns)
        top, left = row // blocks * blocks, column // blocks * blocks
        block = [
            squares[r * columns + c]
            for r in range(top, min(top + blocks, len(squares) // columns))
            for c in range(left, min(left + blocks, columns))
        ]
        colour = one[:, :1, :1]
        if (row, column) == (top, left) or not all(bool((other == colour).all()) for other in block):
            kept.append(number)
    return kept


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
    valid[2, [0, 4]] = False  # padding in front of others,
    rows[2, 0] = rows[2, 6]  # one of which is no copy of it
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
    side = next((m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d)), SIDE)
    return model, {**inputs, key: page(inputs[key], side)}, key, side


def held(model, plan, inputs):
    """What left at the one drop point of a plan that holds the contracts."""
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    testing.check_undo(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        (entry,) = session.trace
    return entry


@pytest.mark.parametrize("name", PICTURED)
def test_copies_leave_an_encoder(name):
    model, inputs, key, side = pages(name)
    plan = Plan(vision=Duplicates())
    entry = held(model, plan, inputs)
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


# -- encoders that are given rows of patches ----------------------------------------------------------------------------


def some_pages(shapes=SHAPES) -> list[torch.Tensor]:
    """Pages of several shapes in patches, of which one has a black patch: what padding looks like."""
    pictures = [page(torch.empty(1, 3, r * SIDE, c * SIDE), SIDE, seed)[0] for seed, (r, c) in enumerate(shapes)]
    pictures[1][:, :SIDE, -SIDE:] = 0
    return pictures


@pytest.mark.parametrize(
    ("channels_last", "name"), [(True, "transformers/siglip2"), (True, "naflex"), (False, "naflex")]
)
def test_rows_are_the_pictures_that_the_library_cut(name, channels_last):
    (picture,) = some_pages(SHAPES[1:2] * 2)[:1]
    rows = next(iter(as_rows(name, [picture], channels_last).values()))
    patcher = Patcher(nn.Linear(1, 1), RowLayout(3, SIDE, SIDE, channels_last))
    assert torch.equal(patcher.opened(rows)[0], torch.stack(squares_of(picture, SIDE)))
    assert torch.equal(patcher.closed(patcher.opened(rows)), rows)
    assert torch.equal(patcher.patches(rows), patches(picture[None], (SIDE, SIDE)))
    assert not torch.equal(patcher.opened(rows), rows.view(1, -1, 3, SIDE, SIDE)) or not channels_last


@pytest.mark.parametrize("photo", ["rocket", "coffee"])
def test_the_layout_of_siglip2_is_that_of_its_processor(photo):
    """A photograph through the processor that ships with the encoder."""
    from transformers import Siglip2ImageProcessor

    model = build("transformers/siglip2")
    (image,) = saint.demo.pictures(photo)
    image = image.convert("RGB").resize((5 * SIDE, 4 * SIDE))
    given = Siglip2ImageProcessor(do_resize=False, max_num_patches=36, patch_size=SIDE)(image, return_tensors="pt")
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
    layout = registry.encoders()[find(model)[0][2].encoder].rows.layout(
        model.embeddings, model.embeddings.patch_embedding
    )
    shown = Patcher(model.embeddings.patch_embedding, layout).opened(given["pixel_values"])
    assert given["spatial_shapes"].tolist() == [[4, 5]]
    assert torch.allclose(shown[0, :20], torch.stack(squares_of(picture, SIDE)), atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", [Duplicates(), Duplicates(tau=1e-4), Flat(), Flat(side=3)])
def test_copies_leave_rows_and_padding_is_none(name, method):
    model, _ = with_padding(name)
    pictures = some_pages()
    inputs, plan = as_rows(name, pictures), Plan(vision=method)
    entry = held(model, plan, inputs)
    assert entry.tokens_in.tolist() == [rows * columns for rows, columns in SHAPES]
    for picture, kept in zip(pictures, entry.kept, strict=True):
        flat = isinstance(method, Flat)
        assert kept.tolist() == (
            without_flat(picture, SIDE, method.side) if flat else first_of_each(squares_of(picture, SIDE))
        )
    assert any(
        int(out) < int(came) for came, out in zip(entry.tokens_in, entry.tokens_out, strict=True)
    ) or method == Flat(3)


@pytest.mark.parametrize("plan", [Plan(vision=Duplicates()), Plan(vision=Flat()), Plan(pixels=0.5), Plan(pixels=12)])
def test_rows_and_a_convolution_of_the_same_weights_give_the_same(plan):
    """SigLIP of transformers, given pictures, and SigLIP 2, given their patches; pictures of one size, as SigLIP takes."""
    convolved, linear = build("transformers/siglip"), build("transformers/siglip2")
    weights = {name: value.clone() for name, value in convolved.state_dict().items()}
    kernel = weights["embeddings.patch_embedding.weight"]
    weights["embeddings.patch_embedding.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
    linear.load_state_dict(weights, strict=False)
    assert set(dict(linear.named_parameters())) <= set(weights)
    pictures = some_pages([(6, 6)] * 3)
    same_as_convolved(convolved, linear, torch.stack(pictures), plan, "transformers/siglip2")


@pytest.mark.parametrize("plan", [Plan(vision=Duplicates()), Plan(vision=Flat()), Plan(pixels=0.5), Plan(pixels=12)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_naflex_with_rows_and_with_a_convolution_gives_the_same(plan, channels_last):
    convolved = naflex("map", embed_proj_type="conv")
    linear = naflex("map", patchify_channels_last=channels_last)
    weights = {name: value.clone() for name, value in convolved.state_dict().items()}
    kernel = weights["embeds.proj.weight"]
    weights["embeds.proj.weight"] = (kernel.permute(0, 2, 3, 1) if channels_last else kernel).flatten(1)
    linear.load_state_dict(weights)
    pictures = torch.stack(some_pages([(5, 4)] * 3))
    same_as_convolved(convolved, linear, pictures, plan, "naflex", channels_last)
    with (
        torch.no_grad(),
        saint.pruned(convolved, plan),
        saint.pruned(linear, plan),
    ):  # the linear one takes pictures, too
        assert torch.allclose(convolved(pictures), linear(pictures), atol=1e-5)


def same_as_convolved(convolved, linear, pictures, plan, name, channels_last=True):
    with saint.pruned(convolved, plan) as one, saint.pruned(linear, plan) as other, torch.no_grad():
        want = convolved(pictures)
        got = linear(**as_rows(name, list(pictures), channels_last))
        want, got = (out if isinstance(out, torch.Tensor) else out.pooler_output for out in (want, got))
        assert [a.tolist() for a in one.trace[0].kept] == [b.tolist() for b in other.trace[0].kept]
    assert torch.allclose(got, want, atol=1e-5)
    assert any(int(out) < int(came) for came, out in zip(one.trace[0].tokens_in, one.trace[0].tokens_out, strict=True))


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


@pytest.mark.parametrize("plan", [Plan(vision=Flat()), Plan(pixels=0.5)])
def test_an_encoder_whose_rows_have_no_known_layout_shows_copies_alone(plan):
    model = naflex("avg")
    model.embeds.norm_input = nn.LayerNorm(3 * SIDE**2)  # the layer behind it is given rows that are no pixels any more
    before = testing.snapshot(model)
    with pytest.raises(
        saint.UnsupportedModelError, match="by channel: .* whose layout or grid is not known; use Duplicates"
    ):
        saint.apply(model, plan)
    assert testing.snapshot(model) == before
    inputs = as_rows("naflex", some_pages())
    testing.check_oracle(model, Plan(vision=Duplicates()), inputs)
    with saint.pruned(model, Duplicates()) as session:
        testing.run(model, inputs)
    assert all(
        int(out) < int(came) for came, out in zip(session.trace[0].tokens_in, session.trace[0].tokens_out, strict=True)
    )


@pytest.mark.parametrize("plan", [Plan(vision=Flat()), Plan(pixels=0.5)])
def test_patches_that_are_not_laid_row_by_row_have_no_grid(plan):
    model, inputs = naflex("avg"), as_rows("naflex", some_pages())
    inputs["patch_coord"] = inputs["patch_coord"].flip(-1)
    with saint.pruned(model, plan), pytest.raises(ValueError, match="patch_coord does not lay the patches"):
        testing.run(model, inputs)
    with saint.pruned(model, Duplicates()):  # which needs none
        testing.run(model, inputs)


@pytest.mark.parametrize("plan", [Plan(vision=Flat()), Plan(pixels=0.5)])
@pytest.mark.parametrize("name", ["naflex-avg", "transformers/siglip2"])
def test_a_mask_of_other_patches_than_are_announced_is_refused(name, plan):
    model, _ = with_padding(name)
    inputs = as_rows(name, some_pages())
    inputs["patch_valid" if "naflex" in name else "pixel_attention_mask"][1, 19] = 0
    with (
        saint.pruned(model, plan),
        pytest.raises(ValueError, match=r"pictures of \[36, 20, 18\] patches .* \[36, 19, 18\] rows are no padding"),
    ):
        testing.run(model, inputs)


def test_padding_in_front_of_patches_is_no_grid_and_no_copy():
    model, _ = with_padding("transformers/siglip2")
    inputs = as_rows("transformers/siglip2", some_pages())
    mask, rows = inputs["pixel_attention_mask"], inputs["pixel_values"]
    rows[1, :20], mask[1, :20] = rows[1, :20].flip(0), 1
    rows[1, 16:36], mask[1, 16:36] = rows[1, :20].clone(), 1  # the black patch is the last but four
    rows[1, :16], mask[1, :16] = 0, 0
    with saint.pruned(model, Duplicates()) as session:
        testing.run(model, inputs)
        assert session.trace[0].tokens_in.tolist() == [36, 20, 18]
        assert 16 + 20 - 1 - 4 in session.trace[0].kept[1].tolist()
    with saint.pruned(model, Plan(pixels=0.5)), pytest.raises(ValueError, match="padding behind them"):
        testing.run(model, inputs)


def test_more_patches_than_there_are_rows_are_refused():
    model, _ = with_padding("transformers/siglip2")
    inputs = as_rows("transformers/siglip2", some_pages())
    inputs["spatial_shapes"][1] = torch.tensor([7, 6])
    with (
        saint.pruned(model, Plan(pixels=0.5)),
        pytest.raises(ValueError, match="42 patches is announced, and there are 36"),
    ):
        testing.run(model, inputs)


def test_an_encoder_whose_patches_overlap_is_refused():
    model = build("timm/vit-augreg")
    model.patch_embed.proj.stride = (8, 8)
    with pytest.raises(saint.UnsupportedModelError, match="patches overlap"):
        saint.apply(model, Duplicates())
