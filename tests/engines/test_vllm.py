"""The plug-in inside a real vLLM: tokens kept and answers are those of transformers, nobody else is disturbed.

vLLM lives in an environment of its own, whose interpreter ``SAINT_VLLM_PYTHON`` names (``make engines`` makes one).
These tests run in the usual environment and start it.
"""

import json
import subprocess
import sys

import checkpoints
import pytest
from vllm_reference import BUDGETS, GRID, PYTHON, SIDE, Reference, check_mixed, environment, job, mixed, needs_vllm

import saint

pytestmark = needs_vllm


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


FAMILIES = {  # how a prompt names a picture; sides of pictures: of one run of places, and of several runs or of another number
    "llava-next": ("<image>", [SIDE, (20, 60)]),
    "llava-onevision": ("<image>", [SIDE, (20, 60)]),
    "internvl": ("<IMG_CONTEXT>", [SIDE]),
    "idefics3": ("<image>", [SIDE, (20, 60)]),
    "smolvlm": ("<image>", [SIDE, (20, 60)]),
    "gemma3": ("<boi>", [SIDE]),
    "qwen2-vl": (GRID, [(32, 48), (16, 80)]),
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


def test_200_mixed_requests_at_once(run, reference):
    """No answer is wrong or lost: prompts longer than a chunk, shared blocks of the cache."""
    check_mixed(run, reference, mixed(200))


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
