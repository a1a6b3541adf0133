"""`saint compare` on a tiny encoder and a tiny vision-language model, and what `saint bench` says of many pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab import bench
from saint.lab.bench.forward import OverPictures, PictureCount, representative
from saint.lab.report.reading import Record
from saint.lab.report.sheets import sheet_of
from support import records as made
from support.command_line import TINY, one_line
from support.models import build

VOTES = saint.Plan(vision=saint.Saint(threshold=0.9))
FIXED = saint.Plan(vision=saint.Stage(saint.methods.Match(keep=0.5), layers=[1]))


def counted(*kept: int) -> list[PictureCount]:
    return [PictureCount(36, k, 1000, 400 + 10 * k) for k in kept]


def smooth(seed: int) -> dict:
    """Pictures of blots, which keep different numbers of tokens under votes."""
    draw = np.random.default_rng(seed)
    grid = draw.integers(0, 256, (2 + 5 * seed, 2 + 5 * seed, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(grid).resize((96, 96), Image.Resampling.BILINEAR), dtype=np.float32)
    return {"x": torch.from_numpy(picture).permute(2, 0, 1)[None] / 128 - 1}


def test_what_each_picture_keeps_is_that_of_its_own_forward():
    vit = build("timm/vit-augreg")
    pictures = [smooth(seed) for seed in range(3)]
    counts = bench.count_pictures(vit, VOTES, pictures)
    assert saint.status(vit) is None
    for picture, count in zip(pictures, counts, strict=True):
        alone = bench.bench_forward(vit, VOTES, picture, repeats=1, warmup=0, extras=False)
        assert (count.tokens, count.kept) == (36, round(alone.layers[-1].tokens_out))
        assert (count.base, count.pruned) == (alone.costs["base"].flops, alone.costs["pruned"].flops)
    assert len({count.kept for count in counts}) > 1
    assert OverPictures.of(counts, [0]).fixed is False
    assert OverPictures.of(bench.count_pictures(vit, FIXED, pictures), [0]).fixed is True


def test_several_forwards_are_timed_as_their_mean():
    vit = build("timm/vit-augreg")
    pictures = [smooth(seed) for seed in range(3)]
    alone = [bench.bench_forward(vit, VOTES, one, repeats=1, warmup=0, extras=False) for one in pictures]
    result = bench.bench_forward(vit, VOTES, pictures, repeats=2, warmup=0)
    assert result.costs["pruned"].flops == pytest.approx(np.mean([one.costs["pruned"].flops for one in alone]))
    assert result.bound == pytest.approx(
        sum(one.costs["base"].flops for one in alone) / sum(one.costs["pruned"].flops for one in alone)
    )
    assert result.layers[-1].tokens_out == pytest.approx(np.mean([one.layers[-1].tokens_out for one in alone]))
    assert result.conditions["forwards"] == 3
    assert result.images_per_second["base"] == pytest.approx(1e3 / result.base.median)
    with pytest.raises(ValueError, match="got none"):
        bench.bench_forward(vit, VOTES, [])


def test_the_pictures_that_are_timed_stand_for_all():
    assert representative(counted(5, 5, 5)) == [0]
    assert representative(counted(9, 3, 7)) == [0, 1, 2]
    many = counted(*range(40))
    chosen = representative(many)
    assert len(chosen) == 8
    assert np.mean([many[i].kept for i in chosen]) == pytest.approx(np.mean(range(40)), abs=1)


def told(**more) -> str:
    data = {**made.bench(), "plan_name": "plan", **more}
    texts = [block.text for block in sheet_of(Record("r", None, data)).blocks if hasattr(block, "text")]
    return " ".join(texts)


def over(*kept: int, timed: list[int]) -> dict:
    counts = counted(*kept)
    found = OverPictures.of(counts, timed)
    return {"counts": [vars(one) for one in counts], "kept": vars(found.kept), "flops": vars(found.flops),
            "fixed": found.fixed, "timed": timed}  # fmt: skip


def test_padding_that_eats_the_gain_is_told_with_what_to_do():
    costs = {"base": {"flops": 8000.0, "memory": 1.0}, "pruned": {"flops": 7600.0, "memory": 1.0}}
    batch = {**made.bench()["conditions"], "batch": 8}
    pictures = over(*range(8), 36, timed=list(range(8)))
    said = told(pictures=pictures, costs=costs, conditions=batch)
    assert "Padding eats the gain" in said
    assert "95 % of the work is left, where its pictures alone would have 43.5 %" in said
    assert "--keep 0.5" in said
    close = {**costs, "pruned": {"flops": 8 * 440.0, "memory": 1.0}}
    assert "Padding" not in told(pictures=pictures, costs=close, conditions=batch)
    assert "Padding" not in told(pictures=pictures, costs=costs)  # batch 1


def test_pictures_are_counted_and_those_timed_are_named():
    said = told(pictures=over(9, 9, timed=[0]))
    assert "2 pictures, each alone: 25 % of the tokens are kept, and 49 % of the work (FLOPs) is left." in said
    assert "Every picture keeps the same number, so one was timed (a)." in said
    said = told(pictures=over(9, 27, timed=[0, 1]), images=["a", "b"])
    assert "50 % of the tokens are kept (25 to 75), and 58 % of the work (FLOPs) is left (49 to 67)." in said
    assert "Timed: 2 (a, b), which stand for all of them." in said


def test_a_speed_up_above_its_bound_is_called_noise():
    assert "noise" not in told()
    assert "1.09 (more than the work went down by: noise" in told(efficiency=1.087)


def test_plans_of_an_encoder_in_one_table(run, folder, tmp_path):
    file = tmp_path / "c.json"
    (tmp_path / "half.json").write_text(json.dumps(FIXED.to_dict()))
    code, said, err = run(
        "compare", *TINY, "--images", folder, "--plans", f"{tmp_path / 'half.json'},vit/published,0.7", "--repeats", 1,
        "--json", file,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(file.read_text())
    assert list(record["plans"]) == list(record["speeds"]) == ["half.json", "vit/published", "keep 0.7"]
    assert record["plans"]["keep 0.7"]["vision"][0]["method"]["method"] == "match"
    half = record["speeds"]["half.json"]
    assert half["kept"] == 0.5
    assert half["bound"] == pytest.approx(1 / half["flops"])
    assert record["speeds"]["keep 0.7"]["flops"] == pytest.approx(0.7, abs=0.03)
    assert record["agreement"]["half.json"]["cosine"]["mean"] < 1
    assert record["scores"] == {"half.json": {}, "vit/published": {}, "keep 0.7": {}}
    assert said.count("speed-up [p20, p80]") == 1
    for words in ("FLOPs left", "cosine [95 %]", "No other is both faster and closer than"):
        assert words in " ".join(said.split())
    page = tmp_path / "page.html"
    assert run("report", file, "-o", page)[0] == 0
    assert "Plans compared: timm:test_vit" in page.read_text()


def test_plans_of_a_vision_language_model(run, spec, picture, tmp_path):
    file = tmp_path / "c.json"
    code, said, err = run(
        "compare", spec, "--images", picture, "--prompt", "what", "--plans", "0.8,0.6", "--repeats", 1, "--warmup", 0,
        "--new-tokens", 2, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(file.read_text())
    less, more = (record["speeds"][name] for name in ("keep 0.6", "keep 0.8"))
    assert less["flops"] < more["flops"] < 1
    assert less["timed"] == [picture.name]
    assert {"same_answer", "kl"} <= record["agreement"]["keep 0.6"].keys()
    assert "same answer" in " ".join(said.split())


def test_bad_input_is_told_before_a_model_is_loaded(run, folder):
    for plans, words in (
        (",", "at least one plan"), ("vit/match,vit/match", "given twice"), ("1.5", "(0, 1]"), ("vit/mtch", "vit/match"),
    ):  # fmt: skip
        code, _, err = run("compare", "timm:no_such_model", "--images", folder, "--plans", plans)
        assert code == 2
        one_line(err, words)
    one_line(
        run("compare", *TINY, "--images", folder, "--plans", "0.5", "--questions", "q.jsonl")[2],
        "--questions does not fit",
    )
