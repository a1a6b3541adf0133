"""What every command writes and prints on tiny models, figure by figure, and the outputs of the measured plans, bit by bit.

``make golden`` writes ``tests/golden`` anew; what changed is read in the diff. Times come from a clock that every look winds on, so that
figures made of times are held too.
"""

import functools
import hashlib
import json
import platform
import re
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image

import saint
from saint.bench import encoder, generation, timing
from saint.cli import COMMANDS, common
from saint.records import cpu_name
from saint.report import make_report
from saint.runtime import observe
from saint.upstream.tiny import make, text_config, tower_config
from support import golden
from support import records as made
from support.checkpoints import TEMPLATE, save
from support.families import IMAGE
from support.text import WORDS, save_text

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TINY = ["timm:test_vit", "--no-pretrained", "--threads", "1", "--device", "cpu"]
HERE = ["--threads", "1", "--device", "cpu"]
SAINT = json.dumps(saint.Plan(vision=saint.Stage(saint.Saint(threshold=0.7), layers=[0, 2])).to_dict())
HALF = json.dumps(saint.Plan(vision=saint.Stage(saint.methods.Match(budget=0.5), layers=[1])).to_dict())
HYBRID = json.dumps(
    saint.Plan(
        vision=saint.Stage(saint.methods.Grid(keep=0.7), layers=[1]),
        connector=saint.methods.DivPrune(keep=0.6),
        language=saint.Stage(saint.Saint(budget=0.5), layers=[2]),
    ).to_dict()
)

# what is run, by name: the arguments, in which words of capitals are put in
RUNS = {
    "demo": ["demo", *TINY, "--image", "PHOTOS", "--plan", SAINT, "--repeats", 3, "--out", "OUT"],
    "check": ["check", *TINY[:2]],
    "check-vlm": ["check", "VLM"],
    "bench": ["bench", *TINY, "--image", "PHOTOS", "--plan", SAINT, "--batch", 2, "--repeats", 5, "--warmup", 1],
    "bench-vlm": [
        "bench", "VLM", *HERE, "--image", "PHOTOS", "--plan", HYBRID, "--batch", 2, "--repeats", 3, "--warmup", 1,
        "--new-tokens", 3,
    ],
    "chat": ["chat", "VLM", *HERE, "--image", "PHOTO", "--prompt", "what w5", "--plan", HYBRID, "--max-new-tokens", 4],
    "view": ["view", *TINY, "--image", "PHOTOS", "--plan", SAINT, "--out", "OUT"],
    "view-why": ["view", *TINY, "--image", "PHOTO", "--plan", SAINT, "--why", "--patch", "3,4", "--out", "OUT"],
    "view-vlm": ["view", "VLM", *HERE, "--image", "PHOTOS", "--plan", HYBRID, "--prompt", "what", "--out", "OUT"],
    "analyze": ["analyze", *TINY, "--images", "CLASSES", "--causal", 2],
    "analyze-vlm": ["analyze", "VLM", *HERE, "--images", "PHOTOS", "--questions", "QUESTIONS", "--causal", 1],
    "analyze-text": ["analyze", "TEXT", *HERE, "--prompts", "PROMPTS", "--causal", 1],
    "tune": ["tune", *TINY, "--images", "SOME", "--target-flops", 0.7, "-o", "OUT/plan.json", "--frontier", "OUT/curve.json"],
    "tune-vlm": [
        "tune", "VLM", *HERE, "--images", "PHOTOS", "--questions", "QUESTIONS", "--target-flops", 0.9, "-o", "OUT/plan.json",
    ],
    "export": ["export", *TINY[:-2], "--images", "PHOTOS", "--plan", HALF, "-o", "OUT/m.pt2"],
    "embed": ["embed", "PHOTOS", "--model", *TINY, "--plan", SAINT, "--batch", 2, "-o", "OUT"],
    "embed-answers": [
        "embed", "PHOTOS", "--model", "VLM", *HERE, "--plan", HYBRID, "--question", "w5", "--max-new-tokens", 2, "-o", "OUT",
    ],
    "eval-images": ["eval", "images", *TINY, "CLASSES", "--score", "knn", "--score", "linear", "--plan", SAINT, "--plan", HALF],
    "eval-vqa": ["eval", "vqa", "VLM", "QUESTIONS", *HERE, "--images", "PHOTOS", "--plan", HYBRID, "--max-new-tokens", 2],
    "list": ["list"],
}  # fmt: skip
# commands without a golden record, and why
NONE = {
    "env": "facts of the machine alone",
    "report": "its page is made of the records below",
    "serve": "starts another program",
    "ui": "answers requests until it is stopped",
}


class Clock:
    """Goes on by another step at every look: variants get times of their own, the same in every run."""

    def __init__(self) -> None:
        self.looks, self.now = 0, 0.0

    def __call__(self) -> float:
        self.looks += 1
        self.now += 1e-3 * (2 + (self.looks * 7919 % 97) / 97)
        return self.now


def smooth(seed: int, side: tuple[int, int]) -> Image.Image:
    """Blots of a few scales: tokens that resemble each other and tokens that do not."""
    draw = np.random.default_rng(seed)
    picture = np.zeros((96, 96, 3))
    for scale in (3, 6, 24):
        grid = draw.integers(0, 256, (scale, scale, 3)).astype(np.uint8)
        picture += np.asarray(Image.fromarray(grid).resize((96, 96), Image.Resampling.BILINEAR), dtype=float) / 3
    return Image.fromarray(picture.astype(np.uint8)).resize(side)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("golden")
    photos, classes, some = root / "photos", root / "classes", root / "some"
    for number in range(3):
        photos.mkdir(exist_ok=True)
        smooth(number, (160, 120 + 20 * number)).save(photos / f"{number}.png")
    for number in range(18):
        folder = classes / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = smooth(100 + number // 2, (96, 96))
        (picture if number % 2 else picture.convert("L").convert("RGB")).save(folder / f"{number:02}.png")
    for number in range(12):
        some.mkdir(exist_ok=True)
        smooth(200 + number, (96, 96)).save(some / f"{number:02}.png")
    questions = [{"image": f"{n % 3}.png", "question": f"what w{n}", "answer": f"w{n}"} for n in range(5, 17)]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (root / "prompts.txt").write_text("\n\n".join(" ".join(WORDS[n : n + 12]) for n in range(9)) + "\n")
    return {
        "PHOTOS": str(photos), "PHOTO": str(photos / "1.png"), "CLASSES": str(classes), "SOME": str(some),
        "QUESTIONS": str(root / "questions.jsonl"), "PROMPTS": str(root / "prompts.txt"),
        "VLM": save(root / "vlm", TEMPLATE), "TEXT": save_text(root / "text"), "ROOT": str(root),
    }  # fmt: skip


@pytest.fixture
def fixed(monkeypatch):
    """A clock, a load and a console that are the same everywhere."""
    clock = Clock()
    for module in (timing, generation, observe):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock))
    for module in (encoder, generation):
        monkeypatch.setattr(module, "load_average", lambda: 0.25)
    for console in (common.out, common.err):
        monkeypatch.setattr(console, "_width", 110)
        monkeypatch.setattr(console, "_force_terminal", False)
    monkeypatch.delenv("SAINT_DEBUG", raising=False)


def plain(text: str, given: dict[str, str], out: Path) -> str:
    """Without the names of folders of this run."""
    for folder, word in ((str(out), "OUT"), *((path, name) for name, path in given.items())):
        text = text.replace(folder, word)
    return text


def compare(name: str, got, request) -> None:
    got = json.loads(json.dumps(got))
    if request.config.getoption("write_golden"):
        golden.write(name, got)
        return
    found = golden.differences(golden.read(name), got)
    assert not found, "\n".join([f"tests/golden/{name}.json: `make golden` writes it anew", *found[:20]])


@pytest.mark.parametrize("name", RUNS)
def test_a_command(name, given, fixed, run, tmp_path, request):
    out, record = tmp_path / "out", tmp_path / "record.json"
    words = given | {"OUT": str(out), "OUT/plan.json": f"{out}/plan.json", "OUT/m.pt2": f"{out}/m.pt2"}
    words |= {"OUT/curve.json": f"{out}/curve.json"}
    code, said, err = run(*(words.get(str(word), word) for word in RUNS[name]), "--json", record)
    assert record.exists(), err
    files = {
        str(file.relative_to(out)): golden.seen(Image.open(file)) if file.suffix == ".png" else file.suffix
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }
    if name.startswith("embed"):
        files |= rows(out)
    for file in sorted(out.glob("*.json")) if name.startswith("tune") else ():
        files[file.name] = golden.small(json.loads(file.read_text()))
    held = golden.small(json.loads(plain(record.read_text(), given, out)))
    text = [re.sub(r"\s+$", "", line) for line in plain(said, given, out).splitlines()]
    told = [line for line in plain(err, given, out).splitlines() if "\r" not in line and line.startswith("saint")]
    compare(name, {"status": code, "said": text, "told": told, "files": files, "record": held}, request)


def rows(folder: Path) -> dict[str, object]:
    """What the parquet files hold."""
    from pyarrow import parquet

    return {
        file.name: [
            golden.small({**row, "embedding": list(row.get("embedding") or [])})
            for row in parquet.read_table(file).to_pylist()
        ]
        for file in sorted(folder.glob("*.parquet"))
    }


def test_every_command_has_a_record_or_a_reason():
    assert {str(arguments[0]) for arguments in RUNS.values()} | set(NONE) == set(COMMANDS)
    assert {file.stem for file in golden.HOME.glob("*.json")} == {*RUNS, "page", "outputs"}
    assert sum(file.stat().st_size for file in golden.HOME.glob("*.json")) < 400_000


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page(written, request):
    """Of records made by hand: every word, and every number that a chart is drawn with."""
    page = make_report(written(*(make() for make in made.MAKERS.values())))
    seen = made.read(page)
    drawn: dict[str, list[float]] = {}
    for tag, attributes in seen.found:
        for name in ("d", "points", "x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2", "width", "height", "transform"):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", attributes.get(name) or "")
            drawn.setdefault(f"{tag} {name}", []).extend(map(float, numbers))
    text = [line.strip() for line in seen.text.split("\n") if line.strip()]
    compare("page", {"text": text, "drawn": golden.small({name: n for name, n in drawn.items() if n})}, request)


# -- outputs ----------------------------------------------------------------------------------------------------------


def encoder_of(depth: int):
    """A narrow ViT with the layers of the measured ones and 196 or 256 tokens."""
    torch.manual_seed(0)
    patch = 16 if depth == 12 else 14
    return timm.models.VisionTransformer(224, patch, embed_dim=32, depth=depth, num_heads=2, num_classes=8).eval()


def llava_of(layers: int):
    """A narrow LLaVA: as many layers in the decoder; the tower of LLaVA-1.5 (576 tokens), or of the demo's (196)."""
    large = layers > 4
    tower = (
        {"num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
        if large
        else {"num_hidden_layers": 12, "image_size": 224}
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**tower_config(), **tower}),
        text_config=hf.LlamaConfig(**text_config(num_hidden_layers=layers, max_position_embeddings=1024)),
        image_token_id=IMAGE,
        image_seq_length=576 if large else 196,
        vision_feature_layer=-2,
    )
    return make(hf.LlavaForConditionalGeneration, config)


def measured() -> dict[str, saint.Plan]:
    """All recipes, and the plans of the committed measurements, each once."""
    plans = {name: saint.plan(name) for name in saint.recipes()}
    for file in sorted(RESULTS.glob("*.json")):
        found = list(plans_in(json.loads(file.read_text())))
        plans |= {f"{file.stem} {number}": plan for number, plan in enumerate(found)}
    return {
        name: plan for name, plan in plans.items() if name == next(n for n, other in plans.items() if other == plan)
    }


def plans_in(value):
    """Every plan that a record holds."""
    if isinstance(value, dict):
        if "version" in value and value.keys() & {"vision", "connector", "language"}:
            yield saint.Plan.from_dict({k: v for k, v in value.items() if k != "tuned"})
        else:
            for entry in value.values():
                yield from plans_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from plans_in(entry)


@functools.cache
def subject(kind: str, depth: int):
    """A model and what it is given: two smooth pictures, or one and a question."""
    model = encoder_of(depth) if kind == "encoder" else llava_of(depth)
    if kind == "encoder":
        pixels = [np.asarray(smooth(n, (224, 224)), dtype=np.float32) for n in range(2)]
        return model, {"x": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1}
    side, tokens = (336, 576) if depth > 4 else (224, 196)
    pixels = torch.from_numpy(np.asarray(smooth(0, (side, side)), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    return model, {"input_ids": torch.tensor([[5, 6, *[IMAGE] * tokens, 7, 8, 9]]), "pixel_values": pixels}


def kind_of(name: str, plan: saint.Plan) -> tuple[str, int]:
    """The model that a plan is for."""
    if set(plan.slots) != {"vision"} or "llava" in name:
        return "llava", 4 if name.startswith("small") else 32
    last = max(
        (layer for stage in plan.vision for layer in stage.layers or (0,) if stage.layers != "first_half"), default=0
    )
    return "encoder", 12 if last < 12 else 32


MEASURED = measured()


def machine() -> str:
    """Where sums are rounded in the same way."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {cpu_name()}, {platform.machine()}"


@pytest.fixture(scope="module")
def golden_outputs(request):
    """Compares one entry of ``outputs.json``: bits where the machine is the one that wrote them, figures everywhere."""
    writes = request.config.getoption("write_golden")
    held = {"machine": machine(), "plans": {}} if writes else golden.read("outputs")

    def check(name, got):
        got = json.loads(json.dumps(got))
        if writes:
            held["plans"][name] = got
            return
        want = held["plans"][name]
        if held["machine"] != machine():
            want, got = ({k: v for k, v in entry.items() if k != "bits"} for entry in (want, got))
        found = golden.differences(want, got, name)
        assert not found, "\n".join(["tests/golden/outputs.json: `make golden` writes it anew", *found])

    yield check
    if writes:
        golden.write("outputs", held)


@pytest.mark.parametrize("name", MEASURED)
def test_outputs_of_a_measured_plan(name, golden_outputs):
    plan = MEASURED[name]
    model, inputs = subject(*kind_of(name, plan))
    with saint.pruned(model, plan) as session, torch.no_grad():
        out = model(**inputs)
        trace = session.trace
    out = out if isinstance(out, torch.Tensor) else out.logits
    got = {
        "model": "{} of {} layers".format(*kind_of(name, plan)),
        "left": [sorted(entry.tokens_out.tolist()) for entry in trace],
        "kept": zlib.crc32(json.dumps([[kept.tolist() for kept in entry.kept] for entry in trace]).encode()),
        "output": golden.small(out.flatten().double().tolist()),
        "bits": hashlib.sha256(out.contiguous().numpy().tobytes()).hexdigest()[:16],
    }
    golden_outputs(name, got)
