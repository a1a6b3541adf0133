"""The plug-in inside a real vLLM: tokens kept and answers are those of transformers, nobody else is disturbed.

vLLM lives in an environment of its own, whose interpreter ``SAINT_VLLM_PYTHON`` names (``make engines`` makes one).
These tests run in the usual environment and start it.
"""

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import saint
from saint.backends.vllm import budget, positions, selection
from saint.methods.base import FixedBudget
from saint.testing import masked_oracle
from saint.tokens import Candidates, Selection

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import checkpoints  # noqa: E402
from drive_vllm import picture  # noqa: E402

PYTHON = os.environ.get("SAINT_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs vllm: make engines, or SAINT_VLLM_PYTHON=its interpreter")
SIDE = (checkpoints.SIDE, checkpoints.SIDE)
TOKENS = checkpoints.TOKENS
SPECIAL = list(range(checkpoints.IMAGE, checkpoints.VOCAB))  # made on neither side: transformers would miss a picture
SMALL = {"max_model_len": 256, "max_num_seqs": 16, "limit_mm_per_prompt": {"image": 2}}


@dataclasses.dataclass(frozen=True)
class Given(FixedBudget):
    """Keeps what it is told."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = ""
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})

    index: tuple[int, ...] = ()

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        keep = torch.zeros(candidates.tokens.index.shape, dtype=torch.bool)
        keep[0, list(self.index)] = True
        return Selection.from_mask(keep, goal)


def environment():
    """For the other interpreter: this tree, and no plan."""
    paths = [str(HERE / "site"), str(HERE.parents[1] / "src")]
    return {k: v for k, v in os.environ.items() if k != "SAINT_PLAN"} | {"PYTHONPATH": os.pathsep.join(paths)}


def job(text, images=(), saint=None, new=6, videos=()):
    return {"text": text, "images": list(images), "videos": list(videos), "saint": saint, "new": new}


class Seen:
    """Notes the features that enter the language model."""

    def candidates(self, stage, layer, candidates):
        if stage == "connector":
            self.features = candidates.features


class Reference:
    """The same model in transformers."""

    def __init__(self, folder, image="<image>", side=SIDE):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.image, self.side, self.known = image, side, {}

    def inputs(self, text, seeds):
        images = [picture(seed, self.side) for seed in seeds]
        inputs = dict(self.processor(images=images or None, text=text, return_tensors="pt"))
        if "token_type_ids" in inputs:  # Gemma 3's bidirectional pictures, which vLLM's attention on CPUs does not have
            inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        return inputs

    def kept(self, seed, settings):
        """Indices that transformers keeps of one picture."""
        key = seed, json.dumps(settings, sort_keys=True)
        if key not in self.known:
            inputs = self.inputs(f"w3 {self.image} w4", [seed])
            visual = inputs["input_ids"][0] == checkpoints.IMAGE
            if settings is None or settings.get("keep") == 1.0:
                self.known[key] = list(range(int(visual.sum())))
                return self.known[key]
            method, seen = saint.methods.from_dict({"method": "divprune", **settings}), Seen()
            plan = saint.Plan(connector=method)
            with saint.pruned(self.model, plan, observers=[seen]) as session, torch.no_grad():
                self.model(**inputs)
                (entry,) = [entry for entry in session.trace if entry.stage == "connector"]
                self.known[key] = entry.kept[0].tolist()
            runs = torch.unique_consecutive(visual, return_counts=True)
            if len(runs := tuple(runs[1][runs[0]].tolist())) > 1:  # tiles: in vLLM each has its own share
                choice = budget.Choice(method, runs, tuple(budget.shares(method.keep, runs)))
                self.known[key] = selection.choose(seen.features, choice)[0].tolist()
        return self.known[key]

    def planned(self, seed, plan, settings=None):
        """Patches that the tower keeps of one picture, and those of them that enter the language model."""
        key = seed, json.dumps([plan.to_dict(), settings], sort_keys=True)
        if key not in self.known:
            connector = (
                plan.connector if settings is None else saint.methods.from_dict({"method": "divprune", **settings})
            )
            with saint.pruned(self.model, saint.Plan(plan.vision, connector)) as session, torch.no_grad():
                self.model(**self.inputs(f"w3 {self.image} w4", [seed]))
                *_, tower = [entry.kept[0].tolist() for entry in session.trace if entry.stage == "vision"]
                chosen = [entry.kept[0].tolist() for entry in session.trace if entry.stage == "connector"]
            self.known[key] = tower, chosen[0] if chosen else tower
        return self.known[key]

    def greedy(self, request, new, never=SPECIAL, even=False, plan=None):
        """What the masked oracle answers behind each of the tokens ``new``: by induction, greedy decoding of them.

        ``even``: the survivors of the picture have positions of evenly spaced places. ``plan``: with a vision stage.
        """
        inputs = self.inputs(request["text"], request["images"])
        visual = (inputs["input_ids"][0] == checkpoints.IMAGE).nonzero().flatten()
        ids = torch.cat([inputs["input_ids"], torch.tensor([new])], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for types in ("token_type_ids", "mm_token_type_ids"):
            if types in inputs:
                inputs[types] = torch.nn.functional.pad(inputs[types], (0, len(new)))
        kept, slots, start, left = [], [], 0, 0
        for seed in request["images"]:
            every = self.kept(seed, None)
            seen, mine = (
                (every, self.kept(seed, request["saint"]))
                if plan is None
                else self.planned(seed, plan, request["saint"])
            )
            kept += [start + index for index in mine]
            slots += [left + seen.index(index) for index in mine]  # among those that arrive at the connector
            start, left = start + len(every), left + len(seen)
        assert start == len(visual)
        there = torch.ones_like(ids[0])
        there[visual] = 0
        there[visual[kept]] = 1
        if "mm_token_type_ids" not in inputs:  # rows and columns are kept; elsewhere survivors stand side by side
            inputs["position_ids"] = (there.cumsum(0) - 1).clamp_min(0).unsqueeze(0)
        if even:
            types, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
            laid, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=grid)  # [3, 1, L]
            places = positions.even(budget.Choice(Given(), (len(visual),), (len(kept),)))
            inputs["position_ids"] = laid.index_copy(2, visual[kept], laid[..., visual[places]])
        given = Given(keep=len(slots), index=tuple(slots)) if slots else None
        plan = saint.Plan(plan and plan.vision if slots else None, given)
        with torch.no_grad():
            logits = masked_oracle(self.model, plan, inputs)[0]["logits"]
        logits[..., never] = -torch.inf
        return logits[0, -len(new) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    checkpoints.llava(path)
    return path


@pytest.fixture(scope="session")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory):
    def start(rounds, plan=None, loads=0, model=folder, side=SIDE, fails=False, never=SPECIAL, plugin=True, **settings):
        where = tmp_path_factory.mktemp("run")
        jobs = {"model": str(model), "settings": {**SMALL, **settings}, "rounds": rounds, "side": side, "loads": loads}
        jobs["never"] = never
        (where / "jobs.json").write_text(json.dumps(jobs))
        env = environment() | ({} if plan is None else {"SAINT_PLAN": plan}) | ({} if plugin else {"VLLM_PLUGINS": ""})
        done = subprocess.run(
            [PYTHON, str(HERE / "drive_vllm.py"), "jobs.json", "results.json"],
            cwd=where, env=env, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        if fails:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads((where / "results.json").read_text())

    return start


def test_indices_and_answers_are_those_of_transformers(run, reference):
    methods = [
        {"keep": 0.25},
        {"keep": 7},
        {"method": "saint_full_graph", "keep": 0.5},
        {"method": "random", "keep": 0.5},
    ]
    one_by_one = [[job(f"w{5 + seed} <image> w7 w8 w9", [seed], settings)] for seed in range(4) for settings in methods]
    got = run(one_by_one)
    for (request,), (answer,), kept in zip(one_by_one, got["rounds"], got["kept"], strict=True):
        want = reference.kept(request["images"][0], request["saint"])
        assert kept == [want]
        assert len(answer["prompt"]) == 4 + len(want)
        assert answer["new"] == reference.greedy(request, answer["new"])


GRID = "<|vision_start|> <|image_pad|> <|vision_end|>"
FAMILIES = {  # how a prompt names a picture; sides of pictures: of one run of places, and of several runs or of another number
    "llava-next": ("<image>", [SIDE, (20, 60)]),
    "llava-onevision": ("<image>", [SIDE, (20, 60)]),
    "internvl": ("<IMG_CONTEXT>", [SIDE]),
    "idefics3": ("<image>", [SIDE, (20, 60)]),
    "smolvlm": ("<image>", [SIDE, (20, 60)]),
    "gemma3": ("<boi>", [SIDE]),
    "qwen2.5-vl": (GRID, [(32, 48), (16, 80)]),
    "qwen3-vl": (GRID, [(32, 48), (16, 80)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, run, tmp_path):
    """Each picture loses its share, text between its tiles stays, and answers are those of the masked oracle."""
    if family == "smolvlm":
        for python in (sys.executable, PYTHON):
            if subprocess.run([python, "-c", "import num2words"], capture_output=True, check=False).returncode:
                pytest.skip(f"SmolVLM's processor needs num2words, which {python} does not have")
    checkpoints.FAMILIES[family](tmp_path)
    image, sides = FAMILIES[family]
    for side in sides:
        reference = Reference(tmp_path, image, side)
        rounds = [[job(f"w5 {image} w7 w8", [seed], settings)] for seed in (0, 1) for settings in BUDGETS]
        got = run(rounds, model=tmp_path, side=side, max_model_len=512)
        for (request,), (answer,), kept in zip(rounds, got["rounds"], got["kept"], strict=True):
            want = reference.kept(request["images"][0], request["saint"])
            assert answer["error"] is None
            assert kept == ([] if len(want) == len(reference.kept(request["images"][0], None)) else [want])
            full = reference.inputs(request["text"], request["images"])["input_ids"].shape[1]
            assert len(answer["prompt"]) == full - len(reference.kept(request["images"][0], None)) + len(want)
            assert answer["new"] == reference.greedy(request, answer["new"])


BUDGETS = [None, {"keep": 0.25}, {"keep": 0.5}, {"keep": 1.0}]


def mixed(count, image="<image>"):
    """Requests of every kind in random order: budgets, text alone, two pictures; some pictures several times."""
    draw = random.Random(0)
    requests = []
    for number in range(count):
        words = " ".join(f"w{draw.randrange(2, 99)}" for _ in range(draw.randrange(1, 60)))
        seeds = [draw.randrange(12) for _ in range((1, 1, 2, 0)[number % 4])]
        text = f"w{draw.randrange(2, 99)} {f'{image} ' * len(seeds)}{words}"
        requests.append(job(text, seeds, draw.choice(BUDGETS) if seeds else None, new=draw.randrange(2, 9)))
    draw.shuffle(requests)
    return requests


def check_mixed(run, reference, requests, plan=None, **settings):
    """All at once, twice, the plug-in loaded three times: every answer is that of the masked oracle.

    ``plan``: of the engine, with a vision stage.
    """
    if plan is not None:
        settings["plan"] = json.dumps(plan.to_dict())
    got = run(
        [requests, requests], loads=2, max_num_batched_tokens=48, enable_prefix_caching=True, block_size=32, **settings
    )  # 48: less than the 36 places of a picture and the text around it
    first, again = got["rounds"]
    for request, answer in zip(requests, first, strict=True):
        asked = request["saint"]
        places = sum(
            len(reference.kept(seed, asked) if plan is None else reference.planned(seed, plan, asked)[1])
            for seed in request["images"]
        )
        assert len(answer["prompt"]) == len(request["text"].split()) - len(request["images"]) + places
        assert len(answer["new"]) == request["new"]
        assert answer["new"] == reference.greedy(request, answer["new"], plan=plan), request
    assert [answer["new"] for answer in again] == [answer["new"] for answer in first]
    assert sum(answer["cached"] for answer in again) > 0, "no block of the cache was used again"
    assert max(len(answer["prompt"]) for answer in first) > 48


def test_200_mixed_requests_at_once(run, reference):
    """No answer is wrong or lost: prompts longer than a chunk, shared blocks of the cache."""
    check_mixed(run, reference, mixed(200))


@pytest.fixture(scope="session", params=["qwen2.5-vl", "qwen3-vl"])
def grid(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("grid")
    checkpoints.FAMILIES[request.param](path)
    return path


def test_mixed_requests_on_a_grid(grid, run):
    """Rows and columns are kept, compiled too; pictures are wider than the number of places that they keep."""
    side = (16, 80)
    check_mixed(run, Reference(grid, GRID, side), mixed(80, GRID), model=grid, side=side, enforce_eager=False)


def test_a_chunk_may_end_anywhere_in_a_picture(grid, run):
    """In front of it, between its first token and the next, behind it; and so may what is cached of a prompt."""
    side, words = (32, 48), [f"w{number}" for number in range(2, 60)]
    rounds = [
        [job(f"{' '.join(words[:before])} {GRID} {' '.join(behind)}", [0], {"keep": 0.5})]
        for before in range(16, 35)
        for behind in (words[40:], words[30:50])
    ]
    got = run(rounds, model=grid, side=side, max_num_batched_tokens=16, enable_prefix_caching=True, block_size=32)
    reference = Reference(grid, GRID, side)
    for (request,), (answer,) in zip(rounds, got["rounds"], strict=True):
        assert answer["new"] == reference.greedy(request, answer["new"])
    cached = [answer["cached"] for (answer,) in got["rounds"][1::2]]
    assert any(before + 1 < count < before + 13 for before, count in zip(range(16, 35), cached, strict=True)), cached


def test_where_features_leave_the_model_places_are_evenly_spaced(grid, run):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    side, rounds = (16, 80), [[job(f"w5 {GRID} w{seed}", [seed], {"keep": 3}, new=1)] for seed in range(2, 34)]
    got = run(rounds, model=grid, side=side, never=[], speculative_config=speculative)
    reference = Reference(grid, GRID, side)
    new = [answer["new"] for (answer,) in got["rounds"]]
    even, exact = (
        [reference.greedy(request, [0], never=[], even=even) for (request,) in rounds] for even in (True, False)
    )
    assert even != exact
    assert new == even


def test_videos_stay_as_they_are(grid, run):
    """Alone, in front of a picture, and in front of one that is pruned."""
    video = "<|vision_start|> <|video_pad|> <|vision_end|>"
    settings = {"model": grid, "side": (32, 48), "limit_mm_per_prompt": {"image": 1, "video": 1}, "max_model_len": 512}
    both = f"w5 {video} w6 {GRID} w7"
    rounds = [[job(f"w5 {video} w6", videos=[1]), job(both, [0], videos=[1])]]
    plain = run(rounds, plugin=False, **settings)["rounds"]
    got = run([*rounds, [job(both, [0], {"keep": 0.25}, videos=[1])]], **settings)["rounds"]
    assert got[:1] == plain
    assert len(got[1][0]["prompt"]) == len(plain[0][1]["prompt"]) - 18


def test_pictures_are_not_pruned_beside_videos_that_are(grid, run):
    """Only refused: in vLLM 0.32 the runner for CPUs never takes the positions from the features again."""
    rounds = [[job(f"w5 {GRID} w7", [0], {"keep": 0.25})], [job("w5 w6")]]
    got = run(rounds, model=grid, side=(32, 48), video_pruning_rate=0.5)["rounds"]
    assert "--video-pruning-rate is set" in got[0][0]["error"]
    assert got[1][0]["error"] is None


def test_the_plan_of_the_engine(run, reference):
    """It holds for requests that ask for nothing, and memory is planned for fewer tokens."""
    rounds = [
        [job("w3 <image> w5", [0]), job("w3 <image> w5", [0], {"keep": 1.0}), job("w3 <image> w5", [0], {"keep": 3})]
    ]
    plan = json.dumps(saint.Plan(connector=saint.methods.DivPrune(keep=0.25)).to_dict())
    pruned, plain = run(rounds, plan=plan), run(rounds)
    assert [len(answer["prompt"]) for answer in pruned["rounds"][0]] == [2 + 9, 2 + 36, 2 + 3]
    assert [len(answer["prompt"]) for answer in plain["rounds"][0]] == [2 + 36, 2 + 36, 2 + 3]
    assert pruned["most"] == {"image": 9}
    assert plain["most"] == {"image": 36}
    kept = reference.kept(0, {"keep": 0.25})
    assert kept in pruned["kept"][0]
    for answers in (pruned["rounds"][0], plain["rounds"][0]):
        assert answers[1]["new"] == plain["rounds"][0][0]["new"]
    assert pruned["rounds"][0][0]["new"] == reference.greedy(
        job("w3 <image> w5", [0], {"keep": 0.25}), pruned["rounds"][0][0]["new"]
    )


VISION = {
    "layers": saint.Plan(saint.Saint(budget=0.5)),
    "two stages": saint.Plan(
        [saint.Stage(saint.Saint(budget=0.75), layers=[0]), saint.Stage(saint.SaintFullGraph(keep=12), layers=[2])]
    ),
    "in front": saint.Plan(saint.Stage(saint.methods.Random(keep=0.5), placement="input")),
    "hybrid": saint.Plan(saint.Saint(budget=0.5), saint.methods.DivPrune(keep=0.5)),
}


@pytest.mark.parametrize("name", VISION)
def test_the_vision_stage_runs_in_vllms_tower(name, run, reference):
    """Patches that leave, tokens that enter the language model, memory that is planned, and answers."""
    plan, rounds = VISION[name], [[job(f"w{5 + seed} <image> w7 w8", [seed])] for seed in range(4)]
    got = run(rounds, plan=json.dumps(plan.to_dict()))
    for (request,), (answer,), tower, kept in zip(rounds, got["rounds"], got["tower"], got["kept"], strict=True):
        patches, enter = reference.planned(request["images"][0], plan)
        assert tower == [patches]
        assert [[tower[0][index] for index in one] for one in kept] == [enter]
        assert len(answer["prompt"]) == 3 + len(enter)
        assert answer["new"] == reference.greedy(request, answer["new"], plan=plan)
    assert got["most"] == {"image": len(enter)}
    assert len(enter) < TOKENS


def test_requests_have_budgets_of_their_own_behind_the_tower(run, reference):
    check_mixed(run, reference, mixed(80), plan=VISION["hybrid"])


def test_a_vision_stage_needs_a_tower_that_is_known(run, tmp_path):
    checkpoints.llava_next(tmp_path)
    said = run([], model=tmp_path, plan=json.dumps(VISION["layers"].to_dict()), fails=True)
    assert "it runs inside the towers of LlavaForConditionalGeneration only" in said


def test_bad_requests_stop_nobody(run):
    bad = [{"method": "fastv"}, {"method": "saint"}, {"keep": 37}, {"keep": 2.0}, 0.5]
    rounds = [[job("w3 <image> w5", [0], settings)] for settings in bad]
    got = run([*rounds, [job("w3 <image> w5", [0], {"keep": 9})]])
    reasons = [answers[0]["error"] for answers in got["rounds"][:-1]]
    for reason, word in zip(
        reasons, ["caches a picture", "fixed number", "only 36", "keep must be", "must be an object"], strict=True
    ):
        assert word in reason
    assert len(got["rounds"][-1][0]["prompt"]) == 2 + 9


def test_a_plan_that_vllm_cannot_follow_ends_its_start(run):
    assert "vLLM cannot follow the language stage" in run([], plan="llava-1.5/llm", fails=True)


def test_names_that_are_gone_are_named():
    code = (
        "from saint.backends.vllm import names, register\n"
        "names.verify()\n"
        "names.PROCESSOR['_get_mm_prompt_updates'] = ('other',)\n"
        "register()\n"  # a warning: no plan asks for anything
        "import os; os.environ['SAINT_PLAN'] = 'llava-1.5/divprune-64'\n"
        "try: register()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([PYTHON, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "needs BaseMultiModalProcessor._get_mm_prompt_updates(other), which vLLM" in done.stdout
    assert "visual tokens are not pruned" in done.stderr
