"""The command line on tiny random models: results, records, and readable errors."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

import saint
from saint import extras
from saint.lab.cli import COMMANDS, app, main
from saint.lab.kinds import Encoder
from saint.lab.loading import DownloadError
from saint.lab.loading.plans import changed_plan
from saint.lab.sources.photos import load_images, names_of
from saint.plans import Plan
from support.command_line import TINY, one_line


@pytest.fixture
def broken(folder):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


# -- commands ---------------------------------------------------------------------------------------------------------


def test_help_is_fast_and_loads_no_torch():
    code = (
        "import sys, saint.lab.cli\n"
        "try: saint.lab.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'timm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_demo_writes_pictures_and_a_record(run, folder, tmp_path):
    out = tmp_path / "out"
    plan = saint.Plan(vision=saint.Saint(keep=0.5))
    code, said, _ = run(
        "demo", *TINY, "--images", folder, "--output", out, "--repeats", 1, "--plan", json.dumps(plan.to_dict()),
        "--json", tmp_path / "copy.json",
    )  # fmt: skip

    assert code == 0
    assert "With the plan the model runs" in said
    assert "FLOPs bound" in said
    assert {f.name for f in out.iterdir()} == {"overview.png", "kept_sky.png", "kept_noise.png", "record.json"}
    assert all(f.stat().st_size < 1_000_000 for f in out.iterdir())
    record = json.loads((out / "record.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text())["photos"] == record["photos"]
    assert Plan.from_dict(record["plan"]) == plan
    assert record["flops_bound"] > 1
    assert [p["name"] for p in record["photos"]] == ["noise", "sky"]
    last = record["photos"][0]["layers"][-1]
    assert last["tokens_out"] == len(last["kept"]) == 50
    assert record["agreement"]["measure"] == "cosine"
    assert record["agreement"]["mean"] < 1
    assert str(tmp_path) not in (out / "record.json").read_text()


def test_bench_writes_a_record(run, folder, tmp_path):
    code, said, _ = run(
        "bench", *TINY, "--images", folder, "--batch", 3, "--repeats", 2, "--warmup", 0,
        "--threshold", "0.9", "--layers", "0-1", "--json", tmp_path / "r.json",
    )  # fmt: skip

    assert code == 0
    assert "Efficiency" in said
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["images"] == ["noise", "sky", "noise"]
    assert record["conditions"]["batch"] == 3
    assert record["conditions"]["threads"] == 1
    (stage,) = record["plan"]["vision"]
    assert (stage["method"]["threshold"], stage["layers"]) == (0.9, [0, 1])
    assert record["environment"]["torch"].startswith(torch.__version__.partition("+")[0])


def test_view_draws_and_records(run, folder, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run("view", *TINY, "--images", folder / "sky.png", "--output", out, "--json", tmp_path / "v.json")
    assert code == 0
    assert "kept_sky.png" in said
    assert [f.name for f in out.iterdir()] == ["kept_sky.png"]
    assert json.loads((tmp_path / "v.json").read_text())["grid"] == [10, 10]


def test_view_says_why_patches_leave(run, folder, tmp_path):
    out, sky = tmp_path / "out", folder / "sky.png"
    code, said, err = run(
        "view", *TINY, "--images", sky, "--threshold", 0.5, "--why", "--patch", "3,4", "--output", out
    )

    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {"kept_sky.png", "why_sky.png"}
    assert "why_sky.png" in said
    plain = Image.open(out / "why_sky.png")
    run("view", *TINY, "--images", sky, "--threshold", 0.5, "--why", "--output", out)
    assert Image.open(out / "why_sky.png").tobytes() != plain.tobytes()  # without the graph around a patch
    for patch, words in (("3", "ROW,COLUMN"), ("a,b", "ROW,COLUMN"), ("99,0", "not on the grid")):
        one_line(run("view", *TINY, "--images", sky, "--why", "--patch", patch, "--output", out)[2], words)
    one_line(run("view", *TINY, "--images", sky, "--patch", "3,4", "--output", out)[2], "--why")


def test_a_prompt_is_for_vision_language_models(run, folder, tmp_path):
    code, _, err = run("view", *TINY, "--images", folder / "sky.png", "--prompt", "what", "--output", tmp_path / "out")
    assert code == 2
    one_line(err, "--prompt does not fit", "vision-language models")


def test_a_picture_alone_is_no_model(run, folder):
    code, _, err = run("view", folder / "sky.png")
    assert code == 2
    one_line(err, "sky.png", "timm:NAME", "--images")


def test_a_busy_machine_is_told(run, folder, tmp_path, monkeypatch):
    from saint.lab.bench import Spread, forward
    from saint.lab.bench.timing import disturbances

    quiet = {"unpruned": Spread(100, 95, 110, 20), "pruned": Spread(50, 48, 55, 20)}
    assert disturbances(0.0, quiet) == disturbances(None, quiet) == []
    (said,) = disturbances(1000.0, quiet)
    assert "load average 1000.0" in said
    (said,) = disturbances(None, {**quiet, "pruned": Spread(50, 45, 90, 20)})
    assert "pruned: 45.0 to 90.0 ms around 50.0" in said
    assert disturbances(None, {"one": Spread(50, 20, 90, 2)}) == []  # two values have no spread to speak of

    monkeypatch.setattr(forward, "load_average", lambda: 1000.0)
    rest = ["--images", folder / "sky.png", "--repeats", 1]
    for args in (["bench", *TINY, *rest, "--warmup", 0], ["demo", *TINY, *rest, "--output", tmp_path / "out"]):
        code, _, err = run(*args)
        assert code == 0, err
        assert "load average 1000.0" in " ".join(err.split())
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["photos"][0]["bench"]["conditions"]["load_average"] == 1000.0


def test_torchaos_two_lines_are_silenced_in_the_command_only(run, caplog, monkeypatch):
    import logging

    from saint.lab.cli import tables

    logger = logging.getLogger("torch.utils._pytree")
    line = "<enum 'X'> is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated"

    def speak(*_, **__):
        logger.warning(line)
        logger.warning("something else")

    monkeypatch.setattr(tables, "_first_line", lambda method: speak() or "")
    with caplog.at_level(logging.WARNING, logger="torch.utils._pytree"):
        logger.propagate, before = True, logger.propagate
        try:
            assert run("list")[0] == 0
            said = {record.getMessage() for record in caplog.records}
            assert said == {"something else"}
            logger.warning(line)
            assert line in {record.getMessage() for record in caplog.records}
        finally:
            logger.propagate = before


def test_list_and_env(run, tmp_path):
    assert run("list", "--json", tmp_path / "l.json")[0] == 0
    assert run("env", "--json", tmp_path / "e.json")[0] == 0
    listed = json.loads((tmp_path / "l.json").read_text())
    assert {row["library"] for row in listed["encoders"]} == {"timm", "transformers", "open_clip"}
    families = {family["models"]: family["stages"] for family in listed["families"]}
    assert families["LLaVA-1.5"] == ["vision", "connector", "language"]
    assert families["LLaVA-OneVision"] == ["connector", "language"]
    assert "timm.models.cait.Cait" in listed["refused"]
    assert {"saint", "saint_full_graph"} <= set(listed["methods"])
    assert set(listed["recipes"]) == set(saint.recipes())
    assert set(listed["demo"]) == {"clip-b16", "dinov2-s", "small-llava", "smollm2-135m"}
    assert "Llama" in {row["models"] for row in listed["texts"]}
    assert json.loads((tmp_path / "e.json").read_text())["environment"]["torch"]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "view"])
def test_an_unreadable_image_is_skipped_and_the_status_says_so(run, broken, tmp_path, command):
    more = ["--repeats", 1] if command == "demo" else []
    code, _, err = run(
        command, *TINY, "--images", broken, *more, "--output", tmp_path / "out", "--json", tmp_path / "r.json"
    )

    assert code == 1
    assert "broken.jpg" in err
    assert "1 image(s) could not be read" in err
    record = json.loads((tmp_path / "r.json").read_text())
    assert [p["name"] for p in record["photos"]] == ["noise", "sky"]
    assert record["skipped"][0][0] == "broken.jpg"


def test_missing_empty_and_wholly_unreadable_inputs(run, tmp_path, broken):
    code, _, err = run("demo", *TINY, "--images", tmp_path / "nowhere.png")
    assert code == 2
    one_line(err, "no such image", "nowhere.png")
    (tmp_path / "empty").mkdir()
    code, _, err = run("view", *TINY, "--images", tmp_path / "empty")
    assert code == 2
    one_line(err, "no images in the folder")
    code, _, err = run("view", *TINY, "--images", broken / "broken.jpg")
    assert code == 2
    one_line(err, "broken.jpg", "none of the 1 image", "not an image that Pillow can read")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["timm"], ["timm:NAME", "demo:NAME"]),
        (["tim:vit"], ["did you mean timm:vit"]),
        (["timm:vit_bas_patch16_224"], ["did you mean", "vit_base_patch16_224"]),
        (["timm:eva02_lrg"], ["did you mean", "eva02_large_patch14_224"]),
        (["open_clip:ViT-B-32/nonsense"], ["openai", "none"]),
        (["demo:small-lava"], ["demo:clip-b16"]),
        (["demo:nothing"], ["demo:clip-b16", "demo:dinov2-s"]),
        (["timm:test_vit", "--threshold", "nan"], ["(-1, 1]", "nan"]),
        (["timm:test_vit", "--threshold", "1.5"], ["(-1, 1]", "1.5"]),
        (["timm:test_vit", "--layers", "0-99"], ["99"]),
        (["timm:test_vit", "--layers", "x"], ["0-based", "'x'"]),
        (["timm:test_vit", "--plan", "vit/publishd"], ["vit/published"]),
        (["timm:test_vit", "--plan", "{oops"], ["JSON"]),
        (["timm:test_vit", "--plan", "[1,2]"], ["a plan is an object", "[1, 2]"]),
        (["timm:test_vit", "--plan", "nowhere.json"], ["nowhere.json"]),
        (["timm:test_vit", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["timm:test_vit", "--device", "toaster"], ["toaster"]),
        (["timm:test_vit", "--dtype", "int8"], ["float32", "int8"]),
        (["timm:resnet18"], ["ResNet", "saint list"]),
    ],
)
def test_bad_options_end_in_one_line_and_status_2(run, folder, args, words):
    code, _, err = run("bench", "--no-pretrained", "--repeats", 1, "--images", folder, *args)
    assert code == 2
    one_line(err, *words)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SAINT_DEBUG", "1")
    with pytest.raises(ValueError, match="a model is"):
        main(["bench", "nonsense"])
    monkeypatch.setenv("SAINT_DEBUG", "0")
    with pytest.raises(SystemExit):
        main(["bench", "nonsense"])


def test_threshold_needs_a_method_that_has_one():
    plan = Plan(vision=saint.SaintFullGraph(keep=0.5))
    with pytest.raises(ValueError, match="saint_full_graph"):
        changed_plan(plan, 0.5, None)


def test_layers_are_text_as_stages_take_it():
    plan = Plan(vision=saint.Saint())
    assert changed_plan(plan, None, "0-2, 5").vision[0].layers == (0, 1, 2, 5)
    with pytest.raises(ValueError, match=r'"0-5" or "0,2,4".*0-99999999999'):
        changed_plan(plan, None, "0-99999999999")


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_failed_download_says_what_works_offline(monkeypatch):
    import timm

    class ConnectError(Exception):
        pass

    def fail(*_args, **_kwargs):
        try:
            raise ConnectError("Name or service not known")
        except ConnectError as error:
            raise RuntimeError("weights not found") from error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(DownloadError, match="demo:clip-b16 works offline"):
        Encoder.load("timm:test_vit")


def test_a_missing_library_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    for spec, extra in (("timm:x", "timm"), ("hf:x", "transformers"), ("open_clip:x/none", "open-clip")):
        with pytest.raises(ImportError, match=rf'pip install "\.\[{extra}\]"'):
            Encoder.load(spec)


def test_random_weights_are_always_the_same_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first = Encoder.load("timm:test_vit", pretrained=False).model
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = Encoder.load("timm:test_vit", pretrained=False).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_open_clip_tower_and_its_own_preprocessing():
    loaded = Encoder.load("open_clip:ViT-S-32/none")
    picture = Image.effect_noise((300, 250), 60).convert("RGB")
    assert loaded.preprocess(picture).shape == (3, 224, 224)
    assert loaded.grid == (7, 7)
    assert loaded.picture(picture).size == (448, 448)
    assert bool(torch.isfinite(loaded.model(**loaded.pixels([picture]))).all())


def test_hf_folder_with_its_own_preprocessing(tmp_path):
    import transformers

    from support.models import build

    build("transformers/vit").save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    loaded = Encoder.load(f"hf:{tmp_path}")
    picture = Image.effect_noise((120, 110), 60).convert("RGB")

    assert type(loaded.model).__name__ == "ViTForImageClassification"
    assert (loaded.image_size, loaded.grid) == ((96, 96), (6, 6))
    assert loaded.model(**loaded.pixels([picture])).logits.shape == (1, 7)
    larger = Encoder.load(f"hf:{tmp_path}", size=128)
    assert larger.model(**larger.pixels([picture])).logits.shape == (1, 7)
    assert larger.grid == (8, 8)


def test_images_are_read_upright_opaque_and_by_name(folder):
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    clear.save(folder / "clear.png")
    good, bad = load_images(folder)
    assert [photo.name for photo in good] == ["clear", "noise", "sky"]
    assert bad == []
    assert good[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert [photo.name for photo in load_images(folder, limit=1)[0]] == ["clear"]


def test_files_that_share_a_name_get_pictures_of_their_own(tmp_path, run):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("photo.jpg", "red"), ("photo.png", "blue"), ("other.png", "green")):
        Image.new("RGB", (64, 64), colour).save(photos / name)
    assert [photo.name for photo in load_images(photos)[0]] == ["other", "photo.jpg", "photo.png"]
    out = tmp_path / "out"
    code, said, err = run("demo", *TINY, "--images", photos, "--output", out, "--repeats", 1)
    assert code == 0, err
    assert "wrote 4 pictures" in " ".join(said.split())
    pictures = {f.name: f.read_bytes() for f in out.glob("*.png")}
    assert set(pictures) == {"overview.png", "kept_other.png", "kept_photo.jpg.png", "kept_photo.png.png"}
    assert len(set(pictures.values())) == 4
    files = json.loads((out / "record.json").read_text())["files"]
    assert sorted(files) == sorted(pictures)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg", "a.png", "b"]),
        (["A.jpg", "a.png"], ["A.jpg", "a.png"]),  # the same file where case does not count
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
    ],
)
def test_names_of_photographs(files, names):
    assert names_of([Path(f) for f in files]) == names


def test_a_pickle_that_runs_code_is_refused_in_one_line(run, tmp_path, folder):
    import transformers

    from support.models import build

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    model = build("transformers/vit")
    model.config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "evil": Evil()}, tmp_path / "pytorch_model.bin")
    code, _, err = run("bench", f"hf:{tmp_path}", "--images", folder)
    assert code == 2
    one_line(err, "pickle", "not loaded", "safetensors")
    assert not (tmp_path / "ran").exists()


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_prints_every_contract_and_writes_them(run, tmp_path):
    from saint.testing import CONTRACTS

    file = tmp_path / "check.json"
    code, out, _ = run("check", "timm:test_vit", "--no-pretrained", "--json", file)
    assert code == 0, out
    record = json.loads(file.read_text())
    assert [r["contract"] for r in record["results"]] == list(CONTRACTS)
    assert {r["outcome"] for r in record["results"]} == {"passed"}
    assert all(name in out for name in CONTRACTS)


def test_check_fails_when_a_contract_fails(run, monkeypatch):
    from saint.runtime import deciding as layer

    real = layer.gather_tokens
    monkeypatch.setattr(layer, "gather_tokens", lambda x, slots, prefix: real(x, slots.roll(1, 1), prefix))
    code, out, _ = run("check", "timm:test_vit", "--no-pretrained")
    assert code == 1
    assert "failed" in out


def test_check_of_a_dense_head_falls_back_to_the_encoder(run, monkeypatch):
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            import timm

            self.encoder = timm.create_model("test_vit").eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.encoder.forward_features(x)[:, 1:]
            if tokens.shape[1] != 100:
                raise ValueError("needs all 100 patches")
            return tokens.unflatten(1, (10, 10))

    loaded = Encoder.load("timm:test_vit", pretrained=False)
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: dataclasses.replace(loaded, model=Head().eval()))
    code, out, err = run("check", "timm:test_vit")
    assert code == 0, out + err
    assert "encoder alone" in out


def test_check_of_an_unsupported_model(run):
    code, _, err = run("check", "timm:convnext_atto", "--no-pretrained")
    assert code == 2
    one_line(err, "ConvNeXt", "no tokens")


@pytest.mark.parametrize("plan", ["llava-1.5/vit", "llava-1.5/divprune-64"])
def test_serve_looks_at_the_tower_of_a_plan_that_prunes_there_alone(monkeypatch, plan):
    from saint.backends.vllm import budget, names

    seen = {}
    for name in ("verify", "check_allowed"):
        monkeypatch.setattr(names, name, lambda *_: None)
    monkeypatch.setattr(budget, "of_plan", lambda _: None)
    monkeypatch.setattr(extras, "import_module", lambda _: None)
    monkeypatch.setattr(names, "check_model", lambda model, vision: seen.update(model=model, vision=vision))
    monkeypatch.setattr(names, "server", lambda model: [])
    monkeypatch.setattr("os.execve", lambda *_: None)
    with contextlib.suppress(SystemExit):
        main(["serve", "hf:some/model", "--plan", plan])
    assert seen == {"model": "some/model", "vision": plan == "llava-1.5/vit"}


def test_options_stand_in_groups_and_commands_in_order():
    """The same option has the same group, and nearly all of them have one."""
    found: dict[str, set[str]] = {}
    group = typer.main.get_command(app)
    assert group.list_commands(None) == list(COMMANDS)
    commands = list(group.commands.values())
    for command in [*commands, *(c for g in commands for c in getattr(g, "commands", {}).values())]:
        for option in command.params:
            if option.param_type_name == "option" and hasattr(option, "rich_help_panel"):
                found.setdefault(option.name, set()).add(option.rich_help_panel)
    assert found["images"] == {"Data"}
    assert found["plan"] == {"Plan"}
    assert found["output"] == {"Results"}
    assert {name for name, panels in found.items() if len(panels - {None}) > 1} == set()
    assert "image" not in found
