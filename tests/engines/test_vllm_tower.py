"""The vision stage inside the tower of a real vLLM: LLaVA-1.5."""

import json

import checkpoints
import pytest
from vllm_reference import TOKENS, check_mixed, job, mixed, needs_vllm

import saint

pytestmark = needs_vllm

VISION = {
    "layers": saint.Plan(saint.Saint(keep=0.5)),
    "two stages": saint.Plan(
        [saint.Stage(saint.Saint(keep=0.75), layers=[0]), saint.Stage(saint.SaintFullGraph(keep=12), layers=[2])]
    ),
    "in front": saint.Plan(saint.Stage(saint.methods.Random(keep=0.5), placement="input")),
    "hybrid": saint.Plan(saint.Saint(keep=0.5), saint.methods.DivPrune(keep=0.5)),
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
