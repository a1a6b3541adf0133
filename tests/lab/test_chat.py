"""`saint chat` and `saint bench` of a vision-language model, through a checkpoint and a processor on disk."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import saint
from saint.lab.kinds import VLM
from saint.lab.kinds.tiles import Tile, _laid, placed, tiles
from saint.plans import Stage
from saint.vlm.prompts import visual_places
from support.checkpoints import PLAN, save
from support.command_line import one_line
from support.families import FAMILIES, IMAGE, prompts


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("plain"), None)


def test_prompts_follow_the_template_or_the_image_token(spec, plain, picture):
    for name, first in ((spec, 127), (plain, IMAGE)):
        loaded = VLM.load(name)
        inputs = loaded.prompted(["what", "what w5 w6"], [Image.open(picture).convert("RGB")] * 2)
        ids = inputs["input_ids"]
        assert ((ids == IMAGE).sum(1) == 36).all()
        assert inputs["pixel_values"].shape == (2, 3, 24, 24)
        assert ids[1, 0] == first
        assert (inputs["attention_mask"][0] == 0).sum() == 2  # padded on the left
        assert not inputs["attention_mask"][0, :2].any()
        assert ids[0, -1] == (126 if name == plain else 1)


def test_chat(run, spec, picture, tmp_path):
    file = tmp_path / "chat.json"
    code, out, err = run(
        "chat", spec, "--images", picture, "--prompt", "what", "--plan", PLAN, "--max-new-tokens", 5, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    assert all(word in out for word in ("unpruned", "\npruned", "saint_full_graph"))
    record = json.loads(file.read_text())
    loaded = VLM.load(spec)
    inputs = loaded.prompted(["what"], [Image.open(picture)])
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answers = record["answers"]
    assert answers["unpruned"]["text"] == loaded.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert answers["pruned"]["new_tokens"] == answers["unpruned"]["new_tokens"] == 5
    assert answers["unpruned"]["kv_bytes"] - answers["pruned"]["kv_bytes"] == 27 * 5 * 2 * 2 * 12 * 4
    assert record["plan"]["connector"][0]["method"]["keep"] == 9


def test_bench_per_mode(run, spec, tmp_path):
    file = tmp_path / "bench.json"
    code, out, err = run("bench", spec, "--repeats", 1, "--warmup", 0, "--new-tokens", 2, "--batch", 2, "--json", file)
    assert code == 0, err
    record = json.loads(file.read_text())
    assert record["kind"] == "bench/generation"
    assert list(record["plans"]) == ["keep 0.5", "connector", "language", "vision", "hybrid"]
    assert all(name in out for name in ("unpruned", *record["plans"], "efficiency"))
    assert record["conditions"]["batch"] == 2
    assert record["conditions"]["new_tokens"] == 2
    assert all(gain["kv"] < 1 < gain["bound"] for gain in record["gains"].values())

    code, _, err = run("bench", spec, "--plan", PLAN, "--repeats", 1, "--warmup", 0, "--new-tokens", 1, "--json", file)
    assert code == 0, err
    assert list(json.loads(file.read_text())["plans"]) == ["plan"]


def test_encoders_are_no_vlm(spec, tmp_path):
    hf.CLIPConfig().save_pretrained(tmp_path)
    assert VLM.named(spec)
    assert not VLM.named(f"hf:{tmp_path}")
    assert not VLM.named("timm:test_vit")


def test_errors(run, spec, picture, tmp_path):
    ask = ["chat", "--images", picture]
    one_line(run(*ask, "timm:test_vit")[2], "hf:NAME_OR_PATH")
    one_line(run(*ask, spec, "--plan", "llava-1.5/vti")[2], "unknown recipe")
    one_line(run(*ask, spec, "--plan", "llava-1.5/vit")[2], "out of range")
    one_line(run(*ask, spec, "--dtype", "int8")[2], "float32")
    one_line(run("chat", spec, "--images", tmp_path / "none.png")[2], "no such image")
    one_line(run("chat", spec, "--images", picture.parent)[2], "one picture", "is a folder")
    one_line(run("view", spec, "--images", picture, "--size", 64)[2], "--size does not fit")
    one_line(run("view", "demo:small-llava", "--images", picture, "--no-pretrained")[2], "a demo model is its weights")
    one_line(run("demo", "demo:small-llava", "--images", picture)[2], "vision-language model", "saint chat, view")
    one_line(run("bench", spec, "--threshold", 0.5)[2], "--threshold does not fit")
    hf.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path / "clip")
    one_line(run(*ask, f"hf:{tmp_path / 'clip'}")[2], "does not answer")


def test_view_draws_what_each_stage_keeps(run, spec, picture, tmp_path):
    out, file = tmp_path / "out", tmp_path / "v.json"
    plan = saint.Plan(
        vision=Stage(saint.SaintFullGraph(keep=20), layers=[0]),
        language=Stage(saint.SaintFullGraph(keep=7), layers=[1]),
    )
    code, said, err = run(
        "view", spec, "--images", picture, "--prompt", "what", "--plan", json.dumps(plan.to_dict()), "-o", out, "--json", file
    )  # fmt: skip
    assert code == 0, err
    assert "kept_noise.png" in said.replace("\n", "")
    assert [f.name for f in out.iterdir()] == ["kept_noise.png"]
    record = json.loads(file.read_text())
    assert (record["kind"], record["prompt"], record["model"]) == ("view", "what", spec)
    (photo,) = record["photos"]
    assert (photo["visual_tokens"], photo["tiles"]) == (36, [[6, 6]])
    vision, language = photo["layers"]
    assert (vision["stage"], vision["tokens_in"], vision["tokens_out"]) == ("vision", 36, 20)
    assert (language["stage"], language["tokens_in"], language["tokens_out"]) == ("language", 20, 7)
    assert set(language["kept"]) < set(vision["kept"])

    loaded = VLM.load(spec)
    inputs = loaded.prompted(["what"], [Image.open(picture)])
    (tile,) = tiles(loaded.model, loaded.processor, inputs)
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (loaded.processor.image_processor.image_mean, loaded.processor.image_processor.image_std)
    )
    pixels = ((inputs["pixel_values"][0] * std + mean) * 255).round().byte().permute(1, 2, 0)
    small = tile.picture.resize((24, 24), Image.Resampling.BOX)
    assert (torch.tensor(np.asarray(small)).float() - pixels.float()).abs().mean() < 12


def test_view_of_a_model_with_a_default_plan(run, spec, picture, tmp_path):
    code, _, err = run("view", spec, "--images", picture, "--output", tmp_path, "--json", tmp_path / "v.json")
    assert code == 0, err
    stages = {step["stage"] for step in json.loads((tmp_path / "v.json").read_text())["photos"][0]["layers"]}
    assert stages == set(saint.plan_for(VLM.load(spec).model, 0.5).slots)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava-onevision"])
def test_tiles_of_every_family_have_the_grid_that_its_trace_counts(name):
    family = FAMILIES[name]
    model = family.build()
    images = ["0", "1"] if name.startswith("qwen") else ["1"]  # of LLaVA-NeXT, one whose tiles are not padded
    inputs = prompts(family, model, [[3, *images, 2]])
    seen = tiles(model, object(), inputs)
    with (
        saint.pruned(model, saint.Plan(vision=Stage(saint.SaintFullGraph(keep=0.5), layers=[0]))) as session,
        torch.no_grad(),
    ):
        model(**inputs)
        (step,) = session.trace
    counts = [rows * columns for rows, columns in (tile.grid for tile in seen)]
    assert step.tokens_in.tolist()[: len(counts)] == counts
    if "image_grid_thw" in inputs:
        assert [tile.grid for tile in seen] == [(4, 6), (4, 4)]
        assert all(tile.picture.width * tile.grid[0] == tile.picture.height * tile.grid[1] for tile in seen)
    (total,) = visual_places(model, inputs).sum(1).tolist()
    found = placed(seen, torch.arange(total), total)
    assert (found is None) == (name == "llava-next")  # it unpads and adds newlines
    if found is not None:
        assert [len(kept) for kept in found] == counts


def test_tokens_are_placed_on_their_tiles():
    seen = [Tile(Image.new("RGB", (8, 8)), (2, 3)), Tile(Image.new("RGB", (8, 8)), (2, 2))]
    first, second = placed(seen, torch.tensor([0, 5, 6, 9]), 10)
    assert (first.tolist(), second.tolist()) == ([0, 5], [0, 3])
    assert placed(seen, torch.tensor([0]), 12) is None  # newlines: the grids do not say which


def test_patches_that_arrive_flattened_are_laid_out():
    """As Qwen's processors flatten them: square by square, each patch channel by frame by row by column."""
    for rows, columns, side, patch in ((6, 3, 1, 4), (6, 4, 2, 3)):
        picture = torch.arange(rows * patch * columns * patch * 3).float().view(rows * patch, columns * patch, 3)
        flat = []
        for row in range(0, rows, side):
            for column in range(0, columns, side):
                for r in range(row, row + side):
                    for c in range(column, column + side):
                        one = picture[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].permute(2, 0, 1)
                        flat.append(torch.stack([one, one + 0.5], 1).flatten())  # two frames
        assert torch.equal(_laid(torch.stack(flat), (1, rows, columns), side, patch), picture)
