"""What every command writes and prints on tiny models, figure by figure, and the outputs of the measured plans, bit by bit.

``make golden`` writes ``tests/golden`` anew; what changed is read in the diff. Times come from a clock that every look winds
on, so that figures made of times are held too.
"""

import base64
import json
import re
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab import records
from saint.lab.bench import forward, generation, timing
from saint.lab.cli import COMMANDS, app, common
from saint.lab.report import make_report
from saint.runtime import observe
from support import golden, measured
from support import records as made
from support.checkpoints import TEMPLATE, save
from support.text import WORDS, save_text

TINY = ["timm:test_vit", "--no-pretrained", "--threads", "1", "--device", "cpu"]
HERE = ["--threads", "1", "--device", "cpu"]
SAINT = json.dumps(saint.Plan(vision=saint.Stage(saint.Saint(threshold=0.7), layers=[0, 2])).to_dict())
HALF = json.dumps(saint.Plan(vision=saint.Stage(saint.methods.Match(keep=0.5), layers=[1])).to_dict())
HYBRID = json.dumps(
    saint.Plan(
        vision=saint.Stage(saint.methods.Grid(keep=0.7), layers=[1]),
        connector=saint.methods.DivPrune(keep=0.6),
        language=saint.Stage(saint.Saint(keep=0.5), layers=[2]),
    ).to_dict()
)

# what is run, by name: the arguments, in which words of capitals are put in
RUNS = {
    "demo": ["demo", *TINY, "--images", "PHOTOS", "--plan", SAINT, "--repeats", 3, "--output", "OUT"],
    "check": ["check", *TINY[:2]],
    "check-vlm": ["check", "VLM"],
    "bench": ["bench", *TINY, "--images", "PHOTOS", "--plan", SAINT, "--batch", 2, "--repeats", 5, "--warmup", 1],
    "bench-vlm": [
        "bench", "VLM", *HERE, "--images", "PHOTOS", "--plan", HYBRID, "--batch", 2, "--repeats", 3, "--warmup", 1,
        "--new-tokens", 3,
    ],
    "compare": [
        "compare", *TINY, "--images", "CLASSES", "--labels", "--plans", "vit/published,vit/match,0.7", "--limit", 12,
        "--repeats", 2, "--warmup", 1,
    ],
    "chat": ["chat", "VLM", *HERE, "--images", "PHOTO", "--prompt", "what w5", "--plan", HYBRID, "--max-new-tokens", 4],
    "view": ["view", *TINY, "--images", "PHOTOS", "--plan", SAINT, "--output", "OUT"],
    "view-why": ["view", *TINY, "--images", "PHOTO", "--plan", SAINT, "--why", "--patch", "3,4", "--output", "OUT"],
    "view-vlm": ["view", "VLM", *HERE, "--images", "PHOTOS", "--plan", HYBRID, "--prompt", "what", "--output", "OUT"],
    "analyze": ["analyze", *TINY, "--images", "CLASSES", "--causal", 2],
    "analyze-vlm": ["analyze", "VLM", *HERE, "--images", "PHOTOS", "--questions", "QUESTIONS", "--causal", 1],
    "analyze-text": ["analyze", "TEXT", *HERE, "--prompts", "PROMPTS", "--causal", 1],
    "advise": ["advise", *TINY, "--images", "SOME", "--target", 0.6],
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
    "ui": "answers requests until it is stopped; two answers are held below",
}


KINDS = ("encoder", "small-llava", "llava")


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
    save(root / "vlm", TEMPLATE)
    save_text(root / "text")
    # relative to ROOT: lines are broken, and titles drawn, by the length of names
    return {
        "PHOTOS": "photos", "PHOTO": "photos/1.png", "CLASSES": "classes", "SOME": "some", "QUESTIONS": "questions.jsonl",
        "PROMPTS": "prompts.txt", "VLM": "hf:vlm", "TEXT": "hf:text", "ROOT": str(root),
    }  # fmt: skip


@pytest.fixture
def fixed(given, monkeypatch):
    """A clock, a load, a processor's name and a console that are the same everywhere."""
    clock = Clock()
    monkeypatch.setattr(records, "cpu_name", lambda: "Some CPU")
    for module in (timing, generation, observe):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock))
    for module in (forward, generation):
        monkeypatch.setattr(module, "load_average", lambda: 0.25)
    for console in (common.out, common.err):
        monkeypatch.setattr(console, "_width", 110)
        monkeypatch.setattr(console, "_force_terminal", False)
    monkeypatch.chdir(given["ROOT"])
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("SAINT_DEBUG", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(text: str, given: dict[str, str]) -> str:
    """Without the name of the folder of this run."""
    return text.replace(given["ROOT"], "ROOT")


def compare(name: str, got, request, exact: bool = False) -> None:
    got = json.loads(json.dumps(got))
    if request.config.getoption("write_golden"):
        golden.write(name, got)
        return
    found = golden.differences(golden.read(name), got, exact=exact)
    assert not found, "\n".join([f"tests/golden/{name}.json: `make golden` writes it anew", *found[:20]])


@pytest.mark.parametrize("name", RUNS)
def test_a_command(name, given, fixed, run, request):
    out, record = Path("out") / name, Path(f"{name}.json")
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
    held = golden.small(json.loads(plain(record.read_text(), given)))
    text = [re.sub(r"\s+$", "", line) for line in plain(said, given).splitlines()]
    told = [line for line in plain(err, given).splitlines() if "\r" not in line and line.startswith("saint")]
    files = json.loads(plain(json.dumps(files), given))
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


def commands() -> list[str]:
    """Every command of the app, those of a group by both names."""
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    inner = [f"{name} {command.name}" for name, group in groups.items() for command in group.registered_commands]
    return [*(name for name in COMMANDS if name not in groups), *inner]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page(written, request):
    """Of records made by hand: every word, and every number that a chart is drawn with."""
    page = make_report(written(*(make() for make in made.MAKERS.values())))
    bare = re.sub(r"<(style|script).*?</\1>|data:[^\"]*", "", page, flags=re.DOTALL)
    markup = {}  # classes, colours, names for screen readers: that they changed, and in which section
    for section in bare.split("<section"):
        title = re.search(r"<h2[^>]*>([^<]*)", section)
        markup[title[1] if title else "head"] = zlib.crc32(section.encode())
    compare("page", {**of_page(page), "markup": markup}, request, exact=True)


def of_page(html: str) -> dict[str, object]:
    """Every word, by sentences, and every number that something is drawn with."""
    seen = made.read(html)
    drawn: dict[str, list[float]] = {}
    for tag, attributes in seen.found:
        for name in ("d", "points", "x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2", "width", "height", "transform"):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", attributes.get(name) or "")
            drawn.setdefault(f"{tag} {name}", []).extend(map(float, numbers))
    text = [line.strip() for line in re.split(r"\n|(?<=[.?!]) |(?<=\]) ", seen.text) if line.strip()]
    return {"text": text, "drawn": golden.small({name: n for name, n in drawn.items() if n})}


def test_answers_of_the_page(given, fixed, request):
    """What `saint ui` shows of a picture: an encoder's, and a vision-language model's."""
    testclient = pytest.importorskip("starlette.testclient")
    from saint.lab.kinds import VLM, Encoder
    from saint.lab.ui import Desk, make_app
    from saint.lab.ui.desk import Offer
    from saint.lab.ui.guard import hosts_of

    models = {"timm:test_vit": Offer("timm:test_vit", Encoder, False), given["VLM"]: Offer(given["VLM"], VLM, True)}
    host, told = "127.0.0.1:8765", {}
    asked = {"encoder": {"plan": SAINT}, "vlm": {"plan": HYBRID, "question": "what w5"}}
    with testclient.TestClient(
        make_app(Desk(models, repeats=2), hosts_of("127.0.0.1", 8765)), base_url=f"http://{host}"
    ) as client:
        for (name, fields), model in zip(asked.items(), models, strict=True):
            picture = base64.b64encode(Path(given["PHOTO"]).read_bytes()).decode()
            headers = {"Origin": f"http://{host}", "Content-Type": "application/json"}
            body = {"image": picture, "model": model, **fields}
            answer = client.post("/run", content=json.dumps(body), headers=headers)
            assert answer.status_code == 200, answer.text
            told[name] = of_page(answer.json()["html"])
    compare("ui", json.loads(plain(json.dumps(told), given)), request)


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the floor of")  # some of the measured plans keep next to nothing of random tokens
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_measured_plans(kind, request):
    """What stays is equal everywhere, figures to rounding, bytes where the machine and the releases are those recorded."""
    plans = {name: plan for name, plan in measured.measured().items() if measured.kind(name) == kind}
    file = f"outputs-{kind}"
    writes = request.config.getoption("write_golden")
    held = {} if writes else golden.read(file)
    made = {}
    for name, plan in plans.items():
        seed = measured.steady(name, plan) if writes else held["plans"].get(name, {}).get("seed", 0)
        kept, output = measured.outcome(name, plan, seed)
        made[name] = {"seed": seed, "kept": kept, **measured.figures(output)}
    if writes:
        golden.write(file, {"machine": measured.machine(), "plans": made})
        return
    same = held["machine"] == measured.machine()
    found = [f"{name}: {'new' if name in made else 'gone'}" for name in sorted(made.keys() ^ held["plans"].keys())]
    for name in made.keys() & held["plans"].keys():
        found += [name + line for line in measured.unlike(held["plans"][name], made[name], same)]
    assert not found, "\n".join([f"tests/golden/{file}.json: `make golden` writes it anew", *found[:20]])


# behind all that write one


def test_every_command_has_a_record_or_a_reason():
    golden_ones = {" ".join(map(str, arguments[: 1 + (arguments[0] == "eval")])) for arguments in RUNS.values()}
    assert golden_ones.isdisjoint(NONE)
    assert golden_ones | set(NONE) == set(commands())
    assert {file.stem for file in golden.HOME.glob("*.json")} == {
        *RUNS,
        "page",
        "ui",
        *(f"outputs-{kind}" for kind in KINDS),
    }
    assert sum(file.stat().st_size for file in golden.HOME.glob("*.json")) < 400_000
