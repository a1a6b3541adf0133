"""Resolution and pruning as levers: found by `saint tune`, tried by `saint advise`, given by `--pixels`."""

import base64
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import saint
from saint import Plan, Stage, grids, testing
from saint.lab.images import read_untrusted
from saint.lab.kinds import around
from saint.lab.loading.plans import Choice, choose, read_pixels
from saint.lab.report import Record
from saint.lab.report.kept import pictures_of
from saint.lab.report.sheets import sheet_of
from saint.lab.tuning import Target, search
from saint.lab.tuning.advice import BOTH, DUPLICATES, PRUNING, SMALLER, SOFTER, advise
from saint.lab.tuning.layout import Drop, Space
from saint.lab.tuning.search import Search
from saint.lab.tuning.work import Table
from saint.methods import Duplicates, Match, Resize
from support.command_line import TINY
from support.families import FAMILIES, prompts
from support.models import build, share_of, without_pixels

MODEL = "timm/vit-augreg"


@pytest.fixture
def vit():
    return build(MODEL)


def smooth(count: int, side: int = 96) -> torch.Tensor:
    """Pictures of coarse spots: a smaller one shows nearly all of them."""
    coarse = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")


def sharp(count: int, side: int = 96) -> torch.Tensor:
    """Pictures of which most is of one colour, and the rest noise as fine as pixels."""
    out = torch.zeros(count, 3, side, side)
    out[:, :, : side // 3, : side // 2] = torch.randn(
        count, 3, side // 3, side // 2, generator=torch.Generator().manual_seed(2)
    )
    return out


# -- tune ---------------------------------------------------------------------------------------------------------------


def test_a_smaller_picture_is_found_where_it_loses_least_and_the_target_is_met(vit):
    images = smooth(18)
    before = testing.snapshot(vit)
    found = search(around(vit), images, Target(flops=0.4), chosen=["random", "resize"])
    assert testing.snapshot(vit) == before
    assert found.plan.pixels is not None
    assert found.plan.pixels < 1
    assert share_of(vit, found.plan, images[0]) <= 0.4
    record = found.record
    assert record["lever"] in ("smaller pictures", "smaller pictures and pruning")
    assert record["layers"][0]["method"] == "resize"
    edge = math.isqrt(record["tokens"])
    assert record["layers"][0]["left"] == math.prod(grids.smaller(edge, edge, found.plan.pixels))
    alone = {rival["name"]: rival for rival in record["against"]}["pruning alone"]
    assert alone["loss"]["mean"] > record["reached"]["loss"]["mean"]
    assert alone["work"] == pytest.approx(share_of(vit, found.plan, images[0]), rel=0.05)


def test_pictures_stay_as_they_are_where_that_is_asked_for(vit):
    plan = saint.tune(vit, smooth(18), target_flops=0.6, methods=["saint"])
    assert plan.pixels is None
    record = search(around(vit), smooth(18), Target(flops=0.6), chosen=["saint"]).record
    assert record["lever"] == "pruning"
    assert not {"pruning alone", "smaller pictures alone"} & {rival["name"] for rival in record["against"]}


def test_one_size_alone_is_tried(vit):
    found = search(around(vit), smooth(18), Target(flops=0.4), chosen=["saint"], pixels=16)
    assert found.plan.pixels in (None, 16)
    closed = without_pixels()
    one = [{name: value[:1] for name, value in testing.example_inputs(closed).items()}] * 12
    with pytest.raises(saint.UnsupportedModelError, match="does not show the pixels"):
        search(around(closed), one, Target(flops=0.6), chosen=["saint"], pixels=0.5)


def test_a_model_whose_pictures_cannot_shrink_is_tuned_without(vit):
    closed = without_pixels()
    inputs = testing.example_inputs(closed)
    one = [{name: value[:1] for name, value in inputs.items()}] * 12
    assert saint.tune(closed, one, target_flops=0.7, methods=["saint", "resize"]).pixels is None


def test_softness_is_of_every_stage_and_told(vit, monkeypatch):
    """Even layouts are looked at with each softness; the one that is taken stands in every stage and in the record."""
    monkeypatch.setattr(Search, "_look", lambda self, _layout: abs(self.space.logn - 0.75))
    monkeypatch.setattr(sys.modules["saint.lab.tuning.search"], "gains", lambda *_: False)
    found = search(around(vit), smooth(18), Target(flops=0.6), chosen=["saint", "resize"])
    assert {stage.logn for stage in found.plan.vision} == {found.record["logn"]} == {0.75}


def test_a_layout_of_a_smaller_picture_is_a_plan():
    space = Space("vision", True, True, 6, 100, logn=0.5, pixels=0.51)
    method = Match(fate="weigh")
    plan = space.plan((Drop(0, method, 90), Drop(3, method, 45)))
    assert plan == Plan(
        pixels=0.51,
        vision=[
            Stage(method.keeping(0.9), placement="input", logn=0.5),
            Stage(method.keeping(0.5), layers=[2], logn=0.5),
        ],
    )
    assert space.plan(()) == Plan(vision=Stage(Resize(0.51), logn=0.5))


def test_a_table_over_fewer_tokens_says_the_same():
    counts = torch.arange(196, 10, -3).numpy()
    table = Table("flops", counts, 0.0005 * counts + 1e-6 * counts**2.0, 0.001 * counts, 6, 0.02)
    fewer = table.over(counts[10:])
    assert fewer.total([100] * 6, [90] * 6, True) == pytest.approx(table.total([100] * 6, [90] * 6, True))
    assert fewer.counts[0] == counts[10]


class Dense(torch.nn.Module):
    """A head that wants every patch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        backbone.global_pool, backbone.head = "", torch.nn.Identity()  # it gives its tokens

    def forward(self, x):
        tokens = self.backbone(x)
        if tokens.shape[1] != 37:
            raise ValueError(f"36 patches are expected, got {tokens.shape[1] - 1}")
        return tokens[:, 1:].mean(2).view(-1, 1, 6, 6)


@pytest.mark.parametrize("output", ["similar", "nearest"])
def test_maps_of_full_length_come_of_smaller_pictures(vit, output):
    suits = Plan(vision=Stage(saint.Saint(), output=output))
    dense = Dense(vit)
    found = search(around(dense), smooth(18), Target(flops=0.4), chosen=["random", "resize"], plan=suits)
    plan = found.plan
    assert {stage.output for stage in plan.vision} == {"carried" if output == "similar" else output}
    tried = {rival["name"] for rival in found.record["against"]}
    assert plan.pixels is not None or "smaller pictures alone" in tried
    with torch.no_grad(), saint.pruned(dense, plan):
        assert dense(smooth(2)).shape == (2, 1, 6, 6)


# -- advise -------------------------------------------------------------------------------------------------------------


def _advised(found: dict) -> Record:
    about = {"model": "m", "set": None, "skipped": [], "left_out": {}, "pretrained": False, "environment": {}}
    return Record("advise.json", Path(), {"kind": "advise", **found, **about})


def test_every_lever_is_tried_at_one_share_of_the_work(vit):
    images, before = smooth(8), testing.snapshot(vit)
    found = advise(around(vit), images, 0.5)
    assert testing.snapshot(vit) == before
    levers = {lever["name"]: lever for lever in found["levers"]}
    assert list(levers) == [DUPLICATES, SMALLER, PRUNING, BOTH, SOFTER]
    for name, lever in levers.items():
        plan = Plan.from_dict(lever["plan"])
        assert lever["flops"] == pytest.approx(share_of(vit, plan, images[0]), abs=0.02)
        assert (plan.pixels is not None) == (name in (SMALLER, BOTH, SOFTER))
        assert any(stage.logn for stage in plan.vision) == (name == SOFTER)
        if name != DUPLICATES:
            assert lever["flops"] <= 0.5 * 1.02
        with torch.no_grad():
            want = vit(images)
            with saint.pruned(vit, plan):
                got = vit(images)
        mean = float(torch.nn.functional.cosine_similarity(want.double(), got.double()).mean())
        assert lever["agreement"]["mean"] == pytest.approx(mean, abs=1e-5)
    within = [lever for lever in levers.values() if lever["flops"] <= 0.51]
    best = min(within, key=lambda lever: lever["loss"]["mean"])
    assert found["advice"] == best["name"]
    assert found["plan"] == best["plan"]


def test_copies_are_counted_and_come_first_where_they_are_many(vit):
    found = advise(around(vit), sharp(6), 0.5)
    seen = found["pictures"]
    with saint.pruned(vit, Duplicates()) as session:
        vit(sharp(6))
        (entry,) = session.trace
    assert seen["copies"] == pytest.approx(1 - float(entry.tokens_out.sum() / entry.tokens_in.sum()))
    assert seen["tokens"] == 36
    assert 0 < seen["flat"] < seen["copies"]
    assert found["copies"] in (True, False)
    sheet = sheet_of(_advised(found))
    assert "of the FLOPs are left" in sheet.verdict
    assert ("Drop copies first" in sheet.verdict) == (found["copies"] and found["advice"] != DUPLICATES)


def test_what_a_model_cannot_do_is_said(vit):
    closed = without_pixels()
    inputs = testing.example_inputs(closed)
    one = [{name: value[:1] for name, value in inputs.items()}] * 4
    found = advise(around(closed), one, 0.6)
    levers = {lever["name"]: lever for lever in found["levers"]}
    assert levers[SMALLER]["plan"] is None
    assert "does not show the pixels" in levers[SMALLER]["why"]
    assert levers[PRUNING]["plan"] is not None
    assert found["advice"] == PRUNING
    assert found["pictures"]["copies"] is None


def test_a_vision_language_model_is_advised_too():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[2, "0", 3], [4, "1", 5, 6]])
    one = {name: value[:1] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    found = advise(around(model), [one] * 4, 0.7)
    assert found["measure"] != "1 - cosine"
    assert {lever["name"]: lever["plan"] is not None for lever in found["levers"]}[PRUNING]
    assert all("agreement" not in lever for lever in found["levers"])


def test_a_target_that_no_lever_reaches_is_said(vit):
    found = advise(around(vit), smooth(4), 0.001)
    levers = {lever["name"]: lever for lever in found["levers"]}
    assert levers[SMALLER]["why"] == "no smaller picture leaves 0.001 of the FLOPs"
    known = [lever for lever in levers.values() if lever["plan"] is not None]
    assert found["advice"] == min(known, key=lambda lever: lever["flops"])["name"]
    assert not found["reached"]
    assert "No lever leaves 0.1 %" in sheet_of(_advised(found)).verdict


@pytest.mark.parametrize("target", [0.75, 0.6, 0.45])
def test_pruning_comes_near_the_target_whatever_else_the_model_does(vit, target):
    """A head whose work no plan makes less, and pictures of another size."""

    class Headed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = vit
            self.head = torch.nn.Linear(vit.num_features, 20_000)

        def forward(self, x):
            return self.head(self.backbone(x))

    vit.head = torch.nn.Identity()
    model = Headed()
    found = advise(around(model), smooth(4), target)
    levers = {lever["name"]: lever for lever in found["levers"]}
    for name in (PRUNING, BOTH):
        assert 0.93 * target <= levers[name]["flops"] <= 1.02 * target


@pytest.mark.parametrize("target", [0.0, 1.0, -1, 2])
def test_a_wrong_target_is_told(vit, target):
    with pytest.raises(ValueError, match="target must be the share"):
        advise(around(vit), smooth(4), target)


def test_too_few_pictures_and_a_plan_on_the_model_are_told(vit):
    with pytest.raises(ValueError, match="at least 4 pictures"):
        advise(around(vit), smooth(3), 0.5)
    with saint.pruned(vit, Duplicates()), pytest.raises(saint.AlreadyAppliedError, match="carries a plan"):
        advise(around(vit), smooth(4), 0.5)


# -- commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pages"
    path.mkdir()
    for number in range(5):
        page = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(page).text((8, 8 + 5 * number), "some words " * 3, fill="black")
        page.save(path / f"{number}.png")
    return path


def test_the_command_advises_and_the_page_shows_it(command, folder, tmp_path):
    record = tmp_path / "advise.json"
    code, said, err = command("advise", *TINY, "--images", folder, "--target", "0.6", "--json", record)
    assert code == 0, err
    assert "Take " in said
    assert "exact copies of others" in " ".join(said.split())
    assert f"next: saint tune {TINY[0]} --images {folder} --keep 0.6" in said.replace("\n", "")
    made = json.loads(record.read_text())
    assert made["kind"] == "advise"
    assert made["target"] == 0.6
    assert made["pictures"]["copies"] > 0.4
    plan = Plan.from_dict(made["plan"])
    assert Plan.from_dict(plan.to_dict()) == plan
    page = tmp_path / "page.html"
    code, _, err = command("report", record, "-o", page)
    assert code == 0, err
    assert "take this" in page.read_text()


def test_pixels_are_of_every_command_that_takes_a_plan(command, folder, tmp_path):
    record = tmp_path / "bench.json"
    code, _, err = command(
        "bench", *TINY, "--images", folder, "--pixels", "0.5", "--repeats", "1", "--warmup", "0", "--json", record
    )
    assert code == 0, err
    made = json.loads(record.read_text())
    assert made["plan_name"] == "pixels 0.5"
    assert Plan.from_dict(made["plan"]).pixels == 0.5
    code, _, err = command("view", *TINY, "--images", folder, "--pixels", "30", "-o", tmp_path / "seen")
    assert code == 0, err
    record = tmp_path / "view.json"  # a second stage in front of the layers
    plan = json.dumps(Plan(vision=Stage(saint.methods.Random(keep=12), placement="input")).to_dict())
    code, said, err = command(
        "view", *TINY, "--images", folder, "--pixels", "25", "--plan", plan, "-o", tmp_path / "both", "--json", record
    )
    assert code == 0, err
    assert "kept 12 of 100, 12%" in said
    assert "12 % of the tokens are kept behind the last drop point" in " ".join(
        sheet_of(Record("view.json", tmp_path, json.loads(record.read_text()))).verdict.split()
    )
    code, _, err = command("bench", *TINY, "--pixels", "big")
    assert code == 2
    assert "--pixels is the share" in err


def test_a_smaller_picture_is_drawn_as_one(vit):
    """Every cell of it is there, as coarse as the model sees it, and what leaves of it is a cell of its own grid."""
    from saint.lab.kinds.tiles import Tile
    from saint.lab.view.strips import dimmed

    photo = Image.effect_noise((96, 96), 90).convert("RGB")
    tile = Tile(photo, (6, 6))
    with saint.pruned(vit, Plan(pixels=0.5)) as session:
        vit(smooth(1))
        trace = session.trace
    small = photo.resize((64, 64)).resize((96, 96), Image.Resampling.NEAREST)
    assert np.array_equal(dimmed(tile, trace), small)
    with saint.pruned(vit, Plan(pixels=0.5, vision=Stage(saint.methods.Random(keep=15), layers=[1]))) as session:
        vit(smooth(1))
        picture = dimmed(tile, session.trace)
    (gone,) = set(session.trace[0].kept[0].tolist()) - set(session.trace[-1].kept[0].tolist())
    row, column = grids.at(6, 4).index(gone // 6), grids.at(6, 4).index(gone % 6)
    changed = (np.asarray(picture) != np.asarray(small)).any(-1).nonzero()
    assert len(changed[0])
    assert {(y // 24, x // 24) for y, x in zip(*changed, strict=True)} == {(row, column)}


def test_what_merges_in_front_of_the_layers_is_no_smaller_picture(vit):
    """Every other column stays, as of a picture of half the width, but not for the column beside it."""
    from saint.lab.kinds.tiles import Tile
    from saint.lab.view.overlay import overlay
    from saint.lab.view.strips import dimmed

    photo = Image.effect_noise((96, 96), 90).convert("RGB")
    with saint.pruned(vit, Plan(vision=Stage(saint.methods.ToMe(r=18, beta=0), placement="input"))) as session:
        vit(smooth(1))
        trace = session.trace
    assert trace[0].kept[0].tolist() == list(range(1, 36, 2))
    want = overlay(photo, trace[0].kept[0], (6, 6))
    assert np.array_equal(dimmed(Tile(photo, (6, 6)), trace), want)


def test_a_page_draws_a_smaller_picture_as_one(command, folder, tmp_path):
    """Its patches are the cells, as coarse as the model sees them; shares count the patches that there were."""
    record, page = tmp_path / "view.json", tmp_path / "view.html"
    plan = json.dumps(Plan(vision=Stage(saint.methods.Random(keep=20), layers=[1])).to_dict())
    given = ["view", *TINY, "--images", folder, "--limit", 1, "--pixels", "25", "--plan", plan]
    code, _, err = command(*given, "-o", tmp_path / "seen", "--json", record)
    assert code == 0, err
    made = json.loads(record.read_text())
    (photo,), (rows, columns) = made["photos"], made["grid"]
    assert len(photo["layers"][0]["into"]) == rows * columns == 100
    (figure,) = pictures_of(photo, made["grid"])
    assert (tuple(figure.grid), list(figure.whole), len(figure.steps)) == ((5, 5), [rows, columns], 1)
    stand = photo["layers"][0]["kept"]  # row by row
    assert [stand[n] for n in figure.steps[0].kept] == photo["layers"][1]["kept"]
    assert [stand[n] for n in figure.steps[0].why.gone] == sorted(set(stand) - set(photo["layers"][1]["kept"]))
    code, _, err = command("report", record, "-o", page)
    assert code == 0, err
    text = page.read_text()
    assert re.findall('data-label="([^"]*)"', text) == [
        "smaller picture, 5 x 5 patches: 25 of 100 kept (25%)",
        "after layer 1: 20 of 100 kept (20%)",
    ]
    drawn = re.search('<image href="([^"]*)"[^>]*image-rendering="pixelated"', text)
    whole, small = (read_untrusted(base64.b64decode(uri.partition(",")[2])) for uri in (photo["picture"], drawn[1]))
    assert small.size == tuple(n // 2 for n in whole.size)


@pytest.mark.parametrize(
    ("text", "want"), [("0.6", 0.6), ("1.0", 1.0), ("256", 256), ("1e-1", 0.1), (None, None), ("1", 1)]
)
def test_pixels_are_a_share_or_a_number(text, want):
    found = read_pixels(text)
    assert found == want
    assert type(found) is type(want)


@pytest.mark.parametrize("text", ["0", "1.5", "-3", "half", "", "nan", "0.0"])
def test_wrong_pixels_are_told(text):
    with pytest.raises(ValueError, match="--pixels is the share"):
        read_pixels(text)


def test_pixels_go_in_front_of_a_plan_or_a_share(vit):
    assert choose(None, None, "0.5") == Choice("pixels 0.5", pixels=0.5)
    assert around(vit).planned(choose(None, None, "0.5")) == Plan(pixels=0.5)
    given = choose('{"version": 1, "vision": {"method": {"method": "random", "keep": 0.5}, "layers": [1]}}', None, "64")
    assert given.plan.pixels == 64
    assert len(given.plan.vision) == 2
    share = choose(None, 0.5, "0.6")
    assert share == Choice("keep 0.5, pixels 0.6", keep=0.5, pixels=0.6)
    plan = around(vit).planned(share)
    assert plan.pixels == 0.6
    assert dataclasses.replace(plan, vision=plan.vision[1:]) == saint.plan_for(vit, 0.5)
