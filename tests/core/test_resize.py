"""Smaller pictures in front of an encoder, and attention that is softer where tokens are missing."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import saint
from saint import Plan, Stage, grids, testing
from saint.methods import Duplicates, Match, Resize, SaintFullGraph, ToMe
from saint.testing import vlm as vlm_contracts
from saint.tokens import Candidates, Facts, TokenMap
from support.families import FAMILIES, maker
from support.models import NAMES, build, prepared
from support.padded import SHAPES, naflex, with_padding
from support.patchified import SIDE, as_rows

PICTURED = [name for name in NAMES if name != "transformers/siglip2"]  # given pictures
ROWS = ("naflex-avg", "naflex-map", "naflex-token", "naflex-axial", "transformers/siglip2")  # given rows of patches
PACKED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


# -- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 40))
def test_cells_stand_where_their_centres_lie(count):
    for fewer in range(1, count + 1):
        at, under = grids.at(count, fewer), grids.under(count, fewer)
        assert len(at) == fewer
        assert len(under) == count
        assert at == sorted(set(at))
        assert [under[place] for place in at] == list(range(fewer))
        for cell, place in enumerate(at):
            assert place <= (cell + 0.5) * count / fewer < place + 1
        for place, cell in enumerate(under):
            assert cell <= (place + 0.5) * fewer / count < cell + 1


@pytest.mark.parametrize(
    ("grid", "keep", "want"),
    [
        ((14, 14), 0.5, (10, 10)),
        ((14, 14), 100, (10, 10)),
        ((14, 14), 99, (9, 9)),
        ((14, 14), 196, (14, 14)),
        ((14, 14), 10**6, (14, 14)),
        ((10, 20), 100, (7, 14)),
        ((3, 50), 10, (1, 10)),
        ((6, 6), 0.001, (1, 1)),
        ((6, 6), 1.0, (6, 6)),
        ((1, 9), 2, (1, 2)),
    ],
)
def test_a_smaller_picture_has_about_the_same_shape(grid, keep, want):
    assert grids.smaller(*grid, keep) == want


@pytest.mark.parametrize("keep", range(1, 60))
def test_a_number_of_patches_is_never_exceeded(keep):
    for rows in range(1, 9):
        for columns in range(1, 9):
            fewer = grids.smaller(rows, columns, keep)
            assert 1 <= fewer[0] <= rows
            assert 1 <= fewer[1] <= columns
            assert math.prod(fewer) <= keep


def test_patches_that_leave_become_part_of_the_one_that_shows_them():
    nothing = torch.zeros(2, 12, 1)
    tokens = TokenMap(
        torch.arange(12).expand(2, 12), (12, 6), (12, 6), 12, torch.arange(12) < torch.tensor([[12], [6]])
    )
    shown = Candidates(nothing, nothing, tokens, 0, 1, facts=Facts(grids=((3, 4), (2, 3))))
    chosen = Resize(0.25).select(shown)
    assert chosen.lengths == (4, 2)
    assert chosen.slots[0].tolist() == [1, 3, 9, 11]
    for sample, (rows, columns) in enumerate([(3, 4), (2, 3)]):
        down, right = grids.smaller(rows, columns, 0.25)
        for place in range(rows * columns):
            row, column = place // columns, place % columns
            cell = (row * 2 + 1) * down // (2 * rows) * right + (column * 2 + 1) * right // (2 * columns)
            assert int(chosen.owner[sample, place]) == cell
    assert Resize(1.0).select(shown) is None
    with pytest.raises(ValueError, match="needs the grid"):
        Resize(0.5).select(Candidates(nothing, nothing, tokens, 0, 1))


# -- encoders ---------------------------------------------------------------------------------------------------------


def with_logn(plan: Plan, logn: float) -> Plan:
    return Plan(vision=[dataclasses.replace(stage, logn=logn) for stage in plan.vision])


@pytest.mark.parametrize("name", PICTURED)
def test_smaller_pictures_hold_the_contracts(name):
    model, plan, inputs = prepared(name)
    small = Plan(pixels=0.5)
    outcome = {}
    for check in (testing.check_oracle, testing.check_batch, testing.check_undo, testing.check_on):
        outcome[check.__name__] = check(model, small, inputs)
    with saint.pruned(model, small) as session:
        testing.run(model, inputs)
        (entry,) = session.trace
    edge = math.isqrt(int(entry.tokens_in[0]))
    assert entry.placement == "input"
    assert entry.tokens_out.tolist() == [math.prod(grids.smaller(edge, edge, 0.5))] * len(entry.kept)
    both = Plan(pixels=0.6, vision=plan.vision)
    testing.check_oracle(model, both, inputs)
    testing.check_batch(model, both, inputs)


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/clip", "timm/dinov2", "timm/eva"])
@pytest.mark.parametrize(
    "method", [Match(keep=0.6, fate="weigh"), ToMe(keep=0.6), Match(keep=0.6, fate="merge", beta=0.5)]
)
def test_merging_behind_smaller_pictures_is_the_merged_oracle(name, method):
    model, _, inputs = prepared(name)
    plan = Plan(pixels=0.7, vision=Stage(method, layers=[0, 2]))
    testing.check_oracle(model, plan, inputs)
    testing.check_oracle(model, with_logn(plan, 0.7), inputs)
    testing.check_batch(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        first, *rest = session.trace
    assert [entry.group for entry in session.trace] == [0, 1, 1]
    for entry in (first, *rest):
        for into, kept, total in zip(entry.into, entry.kept, entry.tokens_in * 0 + first.tokens_in, strict=True):
            assert len(into) == int(total)
            assert into.unique().tolist() == kept.tolist()


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/dinov2"])
def test_what_enters_the_first_block_is_the_smaller_picture_at_its_places(name):
    model, _, inputs = prepared(name)
    key = next(key for key, value in inputs.items() if value.ndim == 4)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    blocks = next(m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == 4)
    side, seen = conv.kernel_size[0], []
    first = next(m for m in blocks[0].modules() if isinstance(m, nn.LayerNorm))
    rows = inputs[key].shape[2] // side
    fewer, _ = grids.smaller(rows, rows, 0.5)
    with torch.no_grad():
        hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**inputs)
        with saint.pruned(model, Plan(pixels=0.5)):
            model(**inputs)
        hook.remove()
        small = torch.nn.functional.interpolate(inputs[key], (fewer * side,) * 2, mode="bicubic", antialias=True)
        tokens, own = conv(small).flatten(2).mT, conv(inputs[key]).flatten(2).mT
    full, short = seen
    prefix = full.shape[1] - rows**2
    places = [row * rows + column for row in grids.at(rows, fewer) for column in grids.at(rows, fewer)]
    positions = (full[:, prefix:] - own)[:, places]
    assert torch.allclose(short[:, prefix:], tokens + positions, atol=1e-5)
    assert torch.equal(short[:, :prefix], full[:, :prefix])


# -- pictures that arrive as rows of patches, each of its own shape ----------------------------------------------------


def photographs(shapes=SHAPES) -> list[torch.Tensor]:
    """Pictures [C, H, W] of shapes in patches, in which no pixel is like its neighbour in another channel."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, rows * SIDE, columns * SIDE, generator=generator) for rows, columns in shapes]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("keep", [0.5, 0.3, 12])
def test_pictures_of_several_shapes_get_smaller_each_for_itself(name, keep):
    model, _ = with_padding(name)
    inputs, plan = as_rows(name, photographs()), Plan(pixels=keep)
    for check in (testing.check_oracle, testing.check_batch, testing.check_undo, testing.check_on):
        check(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        (entry,) = session.trace
    assert entry.tokens_in.tolist() == [rows * columns for rows, columns in SHAPES]
    for (rows, columns), kept in zip(SHAPES, entry.kept, strict=True):
        down, right = grids.smaller(rows, columns, keep)
        assert kept.tolist() == [a * columns + b for a in grids.at(rows, down) for b in grids.at(columns, right)]
    for behind in (
        [Duplicates(), Stage(SaintFullGraph(keep=0.6), layers=[1])],
        Match(keep=0.6, fate="weigh", beta=0.5),
    ):
        testing.check_oracle(model, Plan(pixels=0.6, vision=behind), inputs)
        testing.check_batch(model, Plan(pixels=0.6, vision=behind), inputs)


@pytest.mark.parametrize("name", ["naflex-avg", "transformers/siglip2"])
def test_what_enters_the_first_block_is_the_smaller_picture_of_each(name):
    """The library cuts the smaller pictures into rows; positions are those of the full ones."""
    model, _ = with_padding(name)
    timm = name.startswith("naflex")
    pictures, seen = photographs(), []
    inputs = as_rows(name, pictures)
    linear = model.embeds.proj if timm else model.embeddings.patch_embedding
    first = model.blocks[0].norm1 if timm else model.encoder.layers[0].layer_norm1
    prefix = model.num_prefix_tokens if timm else 0
    with torch.no_grad():
        hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, prefix:]))
        model(**inputs)
        with saint.pruned(model, Plan(pixels=0.5)) as session:
            model(**inputs)
        hook.remove()
        full, short = seen
        positions = full - linear(next(iter(inputs.values())))
        for sample, (picture, kept) in enumerate(zip(pictures, session.trace[0].kept, strict=True)):
            down, right = (side * SIDE for side in grids.smaller(*SHAPES[sample], 0.5))
            small = torch.nn.functional.interpolate(picture[None], (down, right), mode="bicubic", antialias=True)
            rows = next(iter(as_rows(name, [small[0]]).values()))
            want = linear(rows)[0] + positions[sample, kept]
            assert torch.allclose(short[sample, : len(kept)], want, atol=1e-5)


def test_rows_that_do_not_get_smaller_change_nothing():
    for name in ("naflex-avg", "transformers/siglip2"):
        model, _ = with_padding(name)
        inputs = as_rows(name, photographs())
        want = testing.run(model, inputs)
        with saint.pruned(model, Plan(pixels=1.0)):
            got = testing.run(model, inputs)
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_patches_of_another_size_than_the_layer_takes_are_told():
    """timm can resize the weights of the layer to patches of any size: the layer itself does not run then."""
    model = naflex("avg", enable_patch_interpolator=True)
    inputs = as_rows("naflex", photographs())
    inputs["x"] = inputs["x"].unflatten(2, (SIDE, SIDE, 3))[:, :, :8, :8]
    with (
        saint.pruned(model, Plan(pixels=0.5)),
        pytest.raises(ValueError, match="in front of the Linear .* did not run"),
    ):
        model(**inputs)
    with (
        saint.pruned(model, Duplicates()),
        pytest.raises(ValueError, match="in front of its Linear, which did not run"),
    ):
        model(**inputs)


@pytest.mark.parametrize("pixels", [1.0, 10**6])
def test_pictures_that_do_not_get_smaller_change_nothing(pixels):
    model, _, inputs = prepared("timm/vit-augreg")
    with torch.no_grad():
        want = model(**inputs)
        with saint.pruned(model, Plan(pixels=pixels)) as session:
            assert torch.equal(model(**inputs), want)
            assert session.trace[0].tokens_out.tolist() == session.trace[0].tokens_in.tolist()


def test_copies_are_looked_for_in_the_smaller_picture():
    model, _, inputs = prepared("timm/vit-augreg")
    key = next(key for key, value in inputs.items() if value.ndim == 4)
    plain = torch.zeros_like(inputs[key])
    plain[1, :, : plain.shape[2] // 2] = 1.0
    plan = Plan(pixels=0.5, vision=Duplicates())
    testing.check_oracle(model, plan, {key: plain})
    with saint.pruned(model, plan) as session:
        testing.run(model, {key: plain})
        counts = [entry.tokens_out.tolist() for entry in session.trace]
    assert counts[0] == [16] * 3
    assert counts[1][0] == 1
    assert 1 < counts[1][1] < 16


def test_low_precision_and_gradients_of_rows():
    model, half = build("transformers/siglip2"), build("transformers/siglip2").to(torch.bfloat16)
    inputs = as_rows("transformers/siglip2", photographs())
    plan = Plan(pixels=0.5)
    with torch.no_grad(), saint.pruned(half, plan), saint.pruned(model, plan):
        low = half(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).pooler_output
        near = torch.nn.functional.cosine_similarity(low.float(), model(**inputs).pooler_output)
    assert float(near.min()) > 0.99
    rows = inputs["pixel_values"].requires_grad_()
    with saint.pruned(model, plan):
        model(**inputs).pooler_output.sum().backward()
    assert bool(rows.grad.isfinite().all())
    real = inputs["pixel_attention_mask"].bool()
    assert bool((rows.grad[real].abs().sum(-1) > 0).all())
    assert not rows.grad[~real].any()


def test_low_precision_and_gradients():
    model, _, inputs = prepared("timm/vit-augreg")
    key = next(key for key, value in inputs.items() if value.ndim == 4)
    half = build("timm/vit-augreg").to(torch.bfloat16)
    plan = with_logn(Plan(pixels=0.5), 0.5)
    with torch.no_grad(), saint.pruned(half, plan), saint.pruned(model, plan):
        near = torch.nn.functional.cosine_similarity(half(inputs[key].bfloat16()).float(), model(inputs[key]))
    assert float(near.min()) > 0.99
    pixels = inputs[key].clone().requires_grad_()
    with saint.pruned(model, plan):
        model(pixels).sum().backward()
    assert bool(pixels.grad.isfinite().all())
    assert float(pixels.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/naflex"])
def test_one_graph_compiled_and_exported_for_any_number_of_pictures(name):
    model, _, inputs = prepared(name)
    pixels = next(value for value in inputs.values() if value.ndim == 4)
    plan = with_logn(Plan(pixels=0.5, vision=Stage(Match(keep=0.5, fate="weigh"), layers=[1, 3])), 0.5)
    with torch.no_grad(), saint.pruned(model, plan):
        want = model(pixels)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(pixels), want, atol=1e-6)
        program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.cat([pixels, pixels.flip(0)])
        assert torch.allclose(program.module()(more), model(more), atol=1e-6)


# -- softer attention ---------------------------------------------------------------------------------------------------

# attention that makes its keys from a weight, which no module shows
HARD = ("timm/beit", "timm/beit-shared", "open_clip/vit", "open_clip/vit-tokens", "open_clip/vit-avg", "open_clip/coca")


@pytest.mark.parametrize("name", NAMES)
def test_softer_attention_is_that_of_the_oracle_or_refused(name):
    model, plan, inputs = prepared(name)
    soft = with_logn(plan, 0.6)
    if name in HARD:
        before = testing.snapshot(model)
        with pytest.raises(saint.UnsupportedModelError, match="logn=0.6 scales keys"):
            saint.apply(model, soft)
        assert testing.snapshot(model) == before
        return
    with saint.pruned(model, soft):
        got = testing.run(model, inputs)
    testing.check_oracle(model, soft, inputs)
    testing.check_batch(model, soft, inputs)
    testing.check_undo(model, soft, inputs)
    with saint.pruned(model, plan):
        hard = testing.run(model, inputs)
    assert any(not torch.equal(got[key], hard[key]) for key in got)


def test_a_ragged_batch_is_softened_by_sample_where_attention_takes_no_mask():
    model, plan, inputs = prepared("transformers/clip")
    soft = with_logn(plan, 0.8)
    model.set_attn_implementation("eager")
    try:
        testing.check_batch(model, soft, inputs)
    finally:
        model.set_attn_implementation("sdpa")


# -- towers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "internvl", "idefics3"])
def test_smaller_pictures_in_a_tower(name):
    family = FAMILIES[name]
    model = family.build()
    make = maker(family, model)
    plan = Plan(pixels=0.5)
    vlm_contracts.check_oracle(model, plan, make)
    vlm_contracts.check_undo(model, plan, make([0, 1]))
    if name != "idefics3":  # whose processor pads pictures to those beside them
        vlm_contracts.check_batch(model, plan, make)
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**make([0, 1]))
        entry = session.trace[0]
    assert entry.stage == "vision"
    assert all(0 < int(out) < int(came) for came, out in zip(entry.tokens_in, entry.tokens_out, strict=True))


def pictures_of(rows, frames, high, wide, side, square):
    """Pictures [frames, inner, H, W] from patches one by one, placed one after another."""
    inner = rows.shape[1] // side**2
    out = torch.zeros(frames, inner, high * side, wide * side)
    number = 0
    for frame in range(frames):
        for top in range(0, high, square):
            for left in range(0, wide, square):
                for row in range(top, top + square):
                    for column in range(left, left + square):
                        patch = rows[number].view(inner, side, side)
                        out[frame, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
                        number += 1
    return out


@pytest.mark.parametrize("name", PACKED)
def test_packed_pictures_get_smaller_each_for_itself(name):
    """What comes of the convolution is that of the smaller picture, patch by patch."""
    family = FAMILIES[name]
    model = family.build()
    inputs = maker(family, model)([0, 1])
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv3d))
    side, square = conv.kernel_size[-1], family.merge_size
    seen = []
    with torch.no_grad(), saint.pruned(model, Plan(pixels=0.5)) as session:
        hook = conv.register_forward_hook(lambda _, args, out: seen.append(out.flatten(1)))
        model(**inputs)
        hook.remove()
        entry = session.trace[0]
        (laid,), start, picture = seen, 0, 0
        sizes = inputs["image_grid_thw"].tolist()
        small_ones = []
        for frames, high, wide in sizes:
            count = frames * high * wide
            rows = inputs["pixel_values"][start : start + count]
            down, right = (n * square for n in grids.smaller(high // square, wide // square, 0.5))
            whole = pictures_of(rows, frames, high, wide, side, square)
            small = torch.nn.functional.interpolate(whole, (down * side, right * side), mode="bicubic", antialias=True)
            small_ones.append((small, down, right))
            start += count
    start = 0
    for (frames, high, wide), (small, down, right) in zip(sizes, small_ones, strict=True):
        tables = [grids.under(n // square, k // square) for n, k in ((high, down), (wide, right))]
        for frame in range(frames):
            kept = entry.kept[picture].tolist()
            want_kept = [
                a * (wide // square) + b
                for a in grids.at(high // square, down // square)
                for b in grids.at(wide // square, right // square)
            ]
            assert kept == want_kept
            picture += 1
            for group in range(high * wide // square**2):
                for inside in range(square**2):
                    unit_row, unit_column = divmod(group, wide // square)
                    row = tables[0][unit_row] * square + inside // square
                    column = tables[1][unit_column] * square + inside % square
                    patch = small[frame, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                    want = conv(patch.reshape(1, conv.in_channels, *conv.kernel_size)).flatten()
                    assert torch.allclose(laid[start + group * square**2 + inside], want, atol=1e-4)
            start += high * wide
    vlm_contracts.check_undo(model, Plan(pixels=0.5), inputs)


# -- plans --------------------------------------------------------------------------------------------------------------


def test_pixels_are_the_first_vision_stage():
    plan = Plan(
        pixels=0.6, vision=Stage(Match(keep=0.5, fate="weigh"), layers=[1], logn=0.5), language=SaintFullGraph(keep=9)
    )
    assert plan.pixels == 0.6
    assert plan.vision[0] == Stage(Resize(0.6), logn=0.5)
    assert plan == Plan(vision=[Stage(Resize(0.6), logn=0.5), *plan.vision[1:]], language=plan.language)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan(language=SaintFullGraph(keep=9)).pixels is None
    assert Plan().pixels is None
    assert Plan(pixels=64).vision == (Stage(Resize(64)),)
    assert Plan(pixels=64).vision[0].placement == "input"


def test_wrong_pixels_are_told():
    with pytest.raises(ValueError, match="keep must be an int >= 1"):
        Plan(pixels=0.0)
    with pytest.raises(ValueError, match="get smaller in this plan already, to 0.5"):
        Plan(pixels=0.5).resized(0.4)
    with pytest.raises(ValueError, match="gets smaller in front of everything, once: make Resize the first"):
        Plan(vision=[Stage(SaintFullGraph(keep=0.5), placement="input"), Resize(0.5)])
    with pytest.raises(ValueError, match="works on pixels, in front of block 0"):
        Stage(Resize(0.5), placement="post")
    with pytest.raises(ValueError, match="not defined for the connector stage"):
        Plan(connector=Resize(0.5))
    with pytest.raises(ValueError, match="in front of every layer: put stage 2"):
        Plan(vision=[Stage(SaintFullGraph(keep=0.5), layers=[1]), Stage(SaintFullGraph(keep=0.5), placement="input")])
    with pytest.raises(ValueError, match=r"logn must be a number in \[0, 2\]"):
        Stage(Resize(0.5), logn=-1)
    with pytest.raises(ValueError, match="logn=0.5 is for the vision stage only"):
        Plan(language=Stage(SaintFullGraph(keep=9), logn=0.5))
