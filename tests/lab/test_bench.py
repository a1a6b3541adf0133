"""The encoder benchmark: counts, records, isolation. No test looks at how long anything took."""

import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch

import saint
from saint.lab import bench, variants
from saint.lab.bench import forward
from saint.lab.bench.timing import Spread, interleave
from saint.lab.kinds.agreement import agreement
from saint.lab.records import environment, write_json
from saint.lab.variants import copy_sharing_weights
from saint.plans import Plan, Stage
from saint.testing import snapshot
from support.models import build

PLAN = Plan(vision=saint.Saint(keep=0.5))


@pytest.fixture
def vit():
    return build("timm/vit-augreg")  # 96 px, patch 16: 36 + 1 tokens, width 48, 4 blocks, 7 classes


@pytest.fixture
def inputs():
    return {"x": torch.randn(2, 3, 96, 96)}


def hand_count(lengths: list[int], batch: int, scored: list[int]) -> int:
    """FLOPs of that model. lengths: tokens in attention and in the MLP of each block, alternating; scored: candidates."""
    width, classes = 48, 7
    total = batch * 2 * 36 * (3 * 16 * 16) * width
    for attention, mlp in zip(lengths[0::2], lengths[1::2], strict=True):
        total += batch * 2 * attention * width * 4 * width  # q, k, v, projection
        total += batch * 2 * 2 * attention * attention * width  # QK^T and AV
        total += batch * 2 * 2 * mlp * width * 4 * width
    for n in scored:
        total += batch * 2 * ((n + 1) // 2) * (n // 2) * 16  # sources x targets x head dim
    return total + batch * 2 * width * classes


def test_flops_equal_a_count_by_hand(vit, inputs):
    result = bench.bench_forward(vit, PLAN, inputs, repeats=1, warmup=0)

    first, second = (round(layer.tokens_out) for layer in result.layers)
    assert (result.layers[0].tokens_in, second) == (36, 18)
    base = hand_count([37] * 8, 2, [])
    lengths = [37, first + 1, first + 1, second + 1, *[second + 1] * 4]
    pruned = hand_count(lengths, 2, [36, first])
    assert result.costs["base"].flops == base
    assert result.costs["pruned"].flops == pruned
    assert result.bound == base / pruned > 1.2
    assert result.costs["base"].uncounted == result.costs["pruned"].uncounted == []


def test_eager_attention_costs_its_matrices(vit, inputs):
    result = bench.bench_forward(vit, PLAN, inputs, repeats=1, warmup=0)

    assert result.eager is not None
    assert result.costs["eager"].flops == result.costs["pruned"].flops
    eager, fused = (result.costs[name].by_operator for name in ("eager", "pruned"))
    assert any("scaled_dot_product" in name for name in fused)
    assert not any("scaled_dot_product" in name for name in eager)


@pytest.mark.parametrize("name", ["transformers/clip", "transformers/dinov2", "open_clip/vit", "timm/eva02"])
def test_every_library_can_be_measured(name):
    from saint.testing import example_inputs

    model = build(name)
    result = bench.bench_forward(model, PLAN, example_inputs(model), repeats=1, warmup=0)

    assert result.bound > 1
    assert result.costs["base"].uncounted == []
    assert result.overhead is not None
    assert (result.eager is None) == name.startswith("open_clip")  # nn.MultiheadAttention has no switch
    if result.eager is not None:
        assert not any("scaled_dot_product" in operator for operator in result.costs["eager"].by_operator)


def test_the_model_is_left_as_it_was(vit, inputs):
    before, weights = snapshot(vit), copy.deepcopy(vit.state_dict())
    fused = vit.blocks[0].attn.fused_attn

    bench.bench_forward(vit, PLAN, inputs, repeats=1, warmup=0)

    assert snapshot(vit) == before
    assert saint.status(vit) is None
    assert vit.blocks[0].attn.fused_attn == fused
    assert all(torch.equal(weights[key], value) for key, value in vit.state_dict().items())


def test_a_twin_shares_weights_and_nothing_else(vit):
    other = copy_sharing_weights(vit)

    assert all(a is b for a, b in zip(vit.parameters(), other.parameters(), strict=True))
    assert not set(map(id, vit.modules())) & set(map(id, other.modules()))


def test_a_model_with_a_plan_is_refused(vit, inputs):
    with saint.pruned(vit, PLAN), pytest.raises(saint.AlreadyAppliedError, match=r"saint\.remove"):
        bench.bench_forward(vit, PLAN, inputs, repeats=1)
    with pytest.raises(ValueError, match="repeats"):
        bench.bench_forward(vit, PLAN, inputs, repeats=0)


def test_nan_pixels_are_refused_and_the_model_left_clean(vit, inputs):
    inputs["x"][1, :, 5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf for sample\(s\) \[1\]"):
        bench.bench_forward(vit, PLAN, inputs, repeats=1, warmup=0)
    assert saint.status(vit) is None


def test_fixed_methods_have_no_idle_plan(vit, inputs):
    plan = Plan(vision=Stage(saint.SaintFullGraph(keep=9), layers=[1]))
    result = bench.bench_forward(vit, plan, inputs, repeats=2, warmup=0)
    assert result.overhead is not None
    assert result.overhead.keep_all is None
    assert [layer.slots for layer in result.layers] == [9]


def test_overhead_is_noticed(vit, inputs):
    overhead = bench.bench_forward(vit, PLAN, inputs, repeats=3, warmup=0).overhead
    assert overhead is not None
    assert overhead.scoring.median > 0
    assert overhead.gathering.median > 0
    assert overhead.scoring.n == overhead.gathering.n == 3


def test_record_holds_all_conditions(vit, inputs, tmp_path):
    ticks = []
    result = bench.bench_forward(vit, PLAN, inputs, repeats=2, warmup=1, tick=lambda: ticks.append(1))
    write_json(
        tmp_path / "deep" / "record.json", {**result.to_dict(), "environment": environment("cpu"), "no": float("nan")}
    )

    record = json.loads((tmp_path / "deep" / "record.json").read_text())
    assert len(ticks) == 3
    assert Plan.from_dict(record["plan"]) == PLAN
    assert record["version"] == 1
    assert record["saint"] == saint.__version__
    assert record["no"] is None
    assert record["base"]["n"] == record["conditions"]["repeats"] == 2
    assert record["conditions"]["inputs"] == {"x": [2, 3, 96, 96]}
    assert {"dtype", "device", "threads", "warmup", "attention", "times_ms"} <= set(record["conditions"])
    assert {"python", "torch", "timm", "transformers", "open_clip", "cpu", "threads", "device"} <= set(
        record["environment"]
    )
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["record.json"]


def test_a_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    old = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def full(*_args):
        raise OSError("no space left on device")

    monkeypatch.setattr("saint.lab.records.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert path.read_text() == old
    assert list(tmp_path.iterdir()) == [path]


def test_rounds_are_paired_and_their_order_alternates():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(runs, torch.device("cpu"), repeats=2, warmup=1)
    assert "".join(calls) == "cba" + "abc" + "cba"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_spread():
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 2.0, 8.0, 11)
    assert Spread.of([float(i * i) for i in reversed(range(11))]) == Spread(25.0, 4.0, 64.0, 11)  # the mean is 35
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_agreement_of_vectors_and_maps():
    a = torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    found = agreement({"logits": a}, {"logits": torch.tensor([[2.0, 4.0], [0.0, 1.0]])})
    assert found.answer == "logits"
    assert found.values == pytest.approx([1.0, 0.0])
    assert found.same_top1 == [True, False]

    saliency = torch.rand(2, 1, 8, 8)
    found = agreement(saliency, 0.3 * saliency + 0.5)
    assert found.measure == "correlation"
    assert found.values == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="shapes"):
        agreement(saliency, saliency[:, :, :4])


def test_numbers_of_a_list_share_a_line_in_a_record_and_nothing_else_changes(tmp_path):
    record = {
        "numbers": [1, -2.5, 1e-7, math.inf, True],
        "rows": [[0.1, 0.2], [0.3, 0.4]],
        "words": ["a", "b"],
        "text": "[\n  1,\n  2\n]",
        "none": [],
        "mixed": [1, "a"],
    }
    write_json(tmp_path / "r.json", record)
    text = (tmp_path / "r.json").read_text()
    assert '"numbers": [1, -2.5, 1e-07, null, true],' in text
    assert "    [0.1, 0.2],\n" in text
    found = json.loads(text)
    assert {name: found[name] for name in record} == {**record, "numbers": [1, -2.5, 1e-7, None, True]}


def test_every_variant_but_the_first_is_patched_while_it_runs_and_none_behind_it(vit, inputs, monkeypatch):
    """A variant without its plan would be timed, and its number would look right."""
    sessions, ran, seen = [], [], {}
    real_pruned, real_interleave = variants.pruned, forward.interleave

    @contextmanager
    def pruned(model, plan, **more):
        number = len(sessions)
        with real_pruned(model, plan, **more) as session:
            sessions.append((model, session))
            model.register_forward_pre_hook(lambda *_: ran.append(number))
            yield session

    def interleave(runs, *rest):
        for name, run in runs.items():
            ran.clear()
            run()
            seen[name] = [*ran]
        return real_interleave(runs, *rest)

    monkeypatch.setattr(variants, "pruned", pruned)
    monkeypatch.setattr(forward, "interleave", interleave)
    bench.bench_forward(vit, PLAN, inputs, repeats=1, warmup=0)
    assert seen == {"base": [], "pruned": [0], "metered": [1], "keep_all": [2], "eager": [3]}
    assert all(saint.status(model) is None for model, _ in sessions)
    assert sessions[2][1].trace[-1].tokens_out.tolist() == [36, 36]
    assert sessions[3][1].trace[-1].tokens_out.tolist() == [18, 18]
