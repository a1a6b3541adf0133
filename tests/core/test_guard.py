"""The guard: a picture full of fine detail keeps a share of its tokens, whatever the budget."""

import math

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import saint
from saint import testing
from saint.methods import Grid, Match, Random, ToMe
from saint.vision.guard import detail, min_keep, shares
from support.families import FAMILIES
from support.models import build
from support.padded import SHAPES, with_padding
from support.patchified import SIDE, as_rows

GUARD = 0.7
METHODS = [
    saint.Saint(keep=0.3),
    saint.Saint(threshold=0.01, neighbors=1, floor=0.0),
    saint.Saint(threshold=0.01, neighbors=1, floor=0.0, budget="batch"),
    saint.SaintFullGraph(keep=0.3),
    Match(keep=0.3),
    Match(threshold=-0.9, fate="weigh", floor=0.0),
    Match(keep=0.3, fate="merge", beta=1.0),
    ToMe(r=40),
    ToMe(keep=0.3),
    Random(keep=0.3),
    Grid(keep=0.3),
]


def pictures(side):
    """A slope, noise, and stripes of three pixels that no ramp reaches the end of."""
    row = torch.linspace(-1, 1, side)
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
    waves = torch.sin(torch.arange(side) * 0.55)  # slope over contrast: 0.24 each way where both differ
    return torch.stack([row.expand(3, side, side), noise, (waves[:, None] + waves[None]).expand(3, side, side)])


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", num_classes=0).eval()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_detail_keeps_its_share_and_plain_pictures_follow_the_budget(vit, method):
    x, layers = pictures(160), [0, 1, 2]
    with saint.pruned(vit, saint.Plan(vision=saint.Stage(method, layers=layers))) as session:
        vit(x)
        free = [entry.tokens_out.tolist() for entry in session.trace]
    with saint.pruned(vit, saint.Plan(vision=saint.Stage(method, layers=layers, guard=GUARD))) as session:
        vit(x)
        kept = [entry.tokens_out.tolist() for entry in session.trace]
    bounds = min_keep(shares(x, GUARD), (100, 100, 100))
    assert bounds[0] == 0
    assert bounds[1] == 70
    assert 0 < bounds[2] < 70
    assert free[-1][1] < 70, "the budget alone would go below it, or this tests nothing"
    assert free[-1][2] < bounds[2]
    assert kept[-1][1:] == [70, bounds[2]]
    if method not in METHODS[2:3]:  # of a batch of votes the mean is shared
        assert [row[0] for row in kept] == [row[0] for row in free]


def test_several_stages_count_from_the_first_candidates(vit):
    stages = [saint.Stage(Match(keep=0.6), layers=[layer], guard=0.5) for layer in (0, 1, 2)]
    with saint.pruned(vit, saint.Plan(vision=stages)) as session:
        vit(pictures(160)[1:2])
        assert [int(entry.tokens_out) for entry in session.trace] == [60, 50, 50]


@pytest.mark.parametrize("fate", ["drop", "weigh", "merge"])
def test_a_guarded_forward_equals_its_oracle_alone_and_in_a_batch(vit, fate):
    plan = saint.Plan(vision=Match(keep=0.4, fate=fate)).guarded(GUARD)
    inputs = {"x": pictures(160)}
    testing.check_oracle(vit, plan, inputs)
    testing.check_batch(vit, plan, inputs)


@pytest.mark.parametrize(
    "name",
    [
        "timm/vit-augreg", "timm/eva02", "timm/beit", "transformers/vit", "transformers/clip", "transformers/siglip",
        "transformers/dinov2", "transformers/dinov3", "open_clip/vit", "open_clip/coca",
    ],
)  # fmt: skip
def test_it_sees_the_pixels_of_every_library(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    argument = next(key for key, value in inputs.items() if value.ndim == 4)
    inputs[argument] = torch.randn_like(inputs[argument])
    with saint.pruned(model, saint.Plan(vision=saint.Stage(Random(keep=0.3), layers=[0, 1], guard=1.0))) as session:
        testing.run(model, inputs)
        assert all(torch.equal(entry.tokens_in, entry.tokens_out) for entry in session.trace)


@pytest.mark.parametrize("name", ["naflex-avg", "naflex-axial", "transformers/siglip2"])
def test_it_sees_pictures_that_arrive_as_rows_each_of_its_own_shape(name):
    model, _ = with_padding(name)
    generator = torch.Generator().manual_seed(0)
    shown = [torch.randn(3, rows * SIDE, columns * SIDE, generator=generator) for rows, columns in SHAPES]
    coarse = torch.nn.functional.avg_pool2d(shown[0], 7, 1, 3)
    shown[0], shown[2] = coarse, torch.full_like(shown[2], 0.5)
    kept = [share for one in shown for share in shares(one[None], GUARD)]
    assert 0.3 < kept[0] < kept[1] == GUARD
    assert kept[2] == 0
    plan, inputs = saint.Plan(vision=saint.Stage(Random(keep=0.3), layers=[0, 1], guard=GUARD)), as_rows(name, shown)
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        want = [max(math.ceil(share * n), round(0.3 * n)) for share, n in zip(kept, (36, 20, 18), strict=True)]
        assert session.trace[-1].tokens_out.tolist() == want
    with saint.pruned(model, plan.resized(0.5)) as session:  # to 16, 12 and 8, fewer than the first two are to keep
        testing.run(model, inputs)
        *guarded, plain = session.trace[-1].tokens_out.tolist()
        assert guarded == [16, 12]
        assert plain < 8


def test_neither_contrast_nor_brightness_counts():
    x = pictures(64)
    assert torch.allclose(detail(x), detail(3 * x + 5), atol=1e-6)
    assert torch.equal(detail(torch.full((1, 3, 8, 8), 0.3)), torch.zeros(1))
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 3, 16, 16)
    assert detail(stripes).item() == pytest.approx(1.0)  # a step of two deviations in one of two directions


def test_shares_rise_with_detail():
    waves = torch.sin(torch.arange(64) * torch.linspace(0.05, 1.5, 30)[:, None])  # [30, 64]
    found = shares((waves[:, :, None] + waves[:, None]).unsqueeze(1), 0.8)
    assert found[0] == 0
    assert found[-1] == 0.8
    assert list(found) == sorted(found)
    assert len({share for share in found if 0 < share < 0.8}) > 3
    assert min_keep((0.0, 0.501), (100, 100)) == (0, 51)


@pytest.mark.parametrize("guard", [-0.1, 1.1, math.nan, True, "0.5"])
def test_other_guards_are_refused(guard):
    with pytest.raises(ValueError, match="guard must be a number in"):
        saint.Stage(saint.Saint(), guard=guard)


def test_a_guard_where_no_pixels_are_seen_is_refused(vit):
    with pytest.raises(ValueError, match="vision stage only"):
        saint.Plan(language=saint.Stage(saint.Saint(), layers=[1], guard=0.5))
    with pytest.raises(ValueError, match="this plan has none"):
        saint.Plan(connector=saint.methods.DivPrune()).guarded(0.5)
    with saint.pruned(vit, saint.Plan(vision=Random()).guarded(0.5)), pytest.raises(ValueError, match="got shape"):
        vit.patch_embed.proj(torch.randn(3, 160, 160))
    packed = FAMILIES["qwen2.5-vl"].build()
    before = testing.snapshot(packed)
    with pytest.raises(ValueError, match="is given patches: leave guard out"):
        saint.apply(packed, saint.Plan(vision=Random()).guarded(0.5))
    assert testing.snapshot(packed) == before
    with pytest.raises(ValueError, match="give all its stages the same"):
        saint.Plan(vision=[saint.Stage(Random(), layers=[0], guard=0.5), saint.Stage(Random(), layers=[1])])


def test_a_guard_is_written_and_read():
    plan = saint.Plan(vision=saint.Saint()).guarded(0.5)
    data = plan.to_dict()
    assert data["vision"][0]["guard"] == 0.5
    assert saint.Plan.from_dict(data) == plan != plan.guarded(0.0)


def test_it_cannot_be_exported(vit):
    with (
        saint.pruned(vit, saint.Plan(vision=Random(keep=0.5)).guarded(0.5)),
        pytest.raises(ValueError, match="exported graph"),
    ):
        torch.export.export(vit, (pictures(160)[:1],))


def test_pictures_of_one_colour_have_no_detail():
    assert detail(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.full((3, 8, 8), -0.3)])).tolist() == [
        0,
        0,
        0,
    ]


def test_a_patch_embedding_that_is_given_no_picture_is_told(vit):
    with saint.pruned(vit, saint.Plan(vision=saint.Saint()).guarded(0.5)):
        with pytest.raises(ValueError, match=r"guard looks at pictures \[B, C, H, W\].*got nothing"):
            vit.patch_embed.proj()
        with pytest.raises(ValueError, match=r"got shape \(3, 160, 160\)"):
            vit.patch_embed.proj(torch.zeros(3, 160, 160))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_run_again_for_its_gradients_keeps_its_guard(vit, reentrant):
    x = pictures(160).requires_grad_()
    with saint.pruned(vit, saint.Plan(vision=saint.Stage(Random(keep=0.3), layers=[0, 1], guard=GUARD))) as session:
        (want,) = torch.autograd.grad(vit(x).square().sum(), x)
        kept = [entry.tokens_out.tolist() for entry in session.trace]
        again = x.detach().requires_grad_()
        checkpoint(vit, again, use_reentrant=reentrant).square().sum().backward()
        assert [entry.tokens_out.tolist() for entry in session.trace] == kept
    assert len(set(kept[-1])) > 1
    assert torch.allclose(again.grad, want, atol=1e-6)
