"""Benchmark of generation: what is counted is right, what is timed is complete; no test depends on how long anything took."""

import pytest
import torch

import saint
from saint.errors import AlreadyAppliedError
from saint.lab.bench import bench_generation
from saint.plans import Plan, Stage
from support.families import FAMILIES, prompts

FAMILY = FAMILIES["llava-llama"]
PLANS = {
    "vision": Plan(vision=Stage(saint.SaintFullGraph(keep=18, step=6), layers=[1])),
    "language": Plan(language=Stage(saint.Saint(keep=0.25), layers=[1, 2])),
}


@pytest.fixture(scope="module")
def model():
    return FAMILY.build()


@pytest.fixture(scope="module")
def inputs(model):
    return prompts(FAMILY, model, [[4, "0", 7], [8, "0", 3]])


@pytest.fixture(scope="module")
def result(model, inputs):
    return bench_generation(model, PLANS, inputs, new_tokens=4, repeats=2, warmup=1)


def test_every_step_of_every_variant_is_timed(result):
    steps = result.conditions["steps_ms"]
    assert set(steps) == {"base", *PLANS} == set(result.times)
    assert all([len(lap) for lap in laps] == [4, 4] for laps in steps.values())
    assert all(lap == sorted(lap) and lap[0] > 0 for laps in steps.values() for lap in laps)
    for name, laps in steps.items():
        times = result.times[name]
        assert times.first.median == pytest.approx(sum(lap[0] for lap in laps) / 2, abs=1e-3)
        assert times.total.median == pytest.approx(sum(lap[3] for lap in laps) / 2, abs=1e-3)
        assert times.per_token.median == pytest.approx(sum(lap[3] - lap[0] for lap in laps) / 6, abs=1e-3)
        assert times.tokens_per_second.median == pytest.approx(
            sum(2 * 4 / (lap[3] / 1e3) for lap in laps) / 2, rel=1e-3
        )


def test_gains_are_ratios_of_the_same_round(result):
    steps = result.conditions["steps_ms"]
    for name, gain in result.gains.items():
        pairs = list(zip(steps["base"], steps[name], strict=True))
        assert gain.first.median == pytest.approx(sum(a[0] / b[0] for a, b in pairs) / 2, rel=1e-2)
        assert gain.decode.median == pytest.approx(sum((b[3] - b[0]) / (a[3] - a[0]) for a, b in pairs) / 2, rel=1e-2)
        assert gain.efficiency == pytest.approx(gain.first.median / gain.bound)


def test_counts(result, model, inputs):
    for name, plan in PLANS.items():
        with saint.pruned(model, plan) as session, torch.no_grad():
            model(**inputs)
            assert result.times[name].kv_bytes == session.kv_memory.kept
        gain = result.gains[name]
        assert gain.bound > 1
        assert gain.bound == result.times["base"].prefill.flops / result.times[name].prefill.flops
        assert gain.kv < 1
    assert result.times["base"].kv_bytes == 5 * 2 * inputs["input_ids"].numel() * 2 * 12 * 4


def test_model_is_left_alone_and_record_is_plain(result, model):
    import json

    assert saint.status(model) is None
    json.dumps(result.to_dict())
    assert result.to_dict()["plans"]["language"] == PLANS["language"].to_dict()


def test_one_token_has_no_steps(model, inputs):
    one = bench_generation(model, PLANS, inputs, new_tokens=1, repeats=1, warmup=0)
    assert one.times["base"].per_token is None
    assert one.gains["vision"].decode is None


def test_bad_input(model, inputs):
    with pytest.raises(ValueError, match="at least one plan"):
        bench_generation(model, {}, inputs)
    with pytest.raises(ValueError, match='called "base"'):
        bench_generation(model, {"base": PLANS["vision"]}, inputs)
    with pytest.raises(ValueError, match="new_tokens"):
        bench_generation(model, PLANS, inputs, new_tokens=0)
    with pytest.raises(ValueError, match="no generate"):
        bench_generation(model.model, PLANS, inputs)
    with pytest.raises(ValueError, match="need an image"):
        bench_generation(model, PLANS, prompts(FAMILY, model, [[5]]), repeats=1, warmup=0)
    with saint.pruned(model, PLANS["vision"]), pytest.raises(AlreadyAppliedError):
        bench_generation(model, PLANS, inputs)
    assert saint.status(model) is None
