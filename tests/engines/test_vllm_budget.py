"""What vLLM is asked to keep, without vLLM: plans, requests, shares of tiles, the choice of features, `saint serve`."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

import saint
from saint.backends.vllm import budget, selection, tower
from saint.backends.vllm.budget import Choice
from saint.backends.vllm.processor import PruningProcessor
from saint.lab.cli import main

DIVPRUNE = saint.methods.DivPrune


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (saint.plan("llava-1.5/hybrid"), "language stage of a plan: in paged attention"),
        (saint.Plan(saint.Saint()), "Saint in the vision stage of a plan: each picture would keep its own number"),
        (saint.Plan(saint.methods.ToMe()), "ToMe in the vision stage of a plan: it joins tokens"),
        (saint.Plan(saint.Stage(saint.Saint(keep=9), output="nearest")), "is of full length"),
        (saint.Plan(saint.methods.SaintVideo(budget=9)), "it needs frames, which the tower does not show"),
        (saint.Plan(connector=saint.methods.EVS(0.5)), "EVS needs frames, which pictures do not have"),
        (saint.Plan(saint.Stage(saint.Saint(keep=9), guard=0.5)), "each picture would keep its own number"),
        (saint.plan("llava-1.5/llm"), "language stage of a plan: in paged attention"),
    ],
)
def test_what_vllm_cannot_follow_is_refused_with_the_reason(plan, why):
    with pytest.raises(ValueError, match=why):
        budget.of_plan(plan)


def test_the_tower_leaves_what_each_stage_leaves():
    config = SimpleNamespace(
        vision_config=SimpleNamespace(num_hidden_layers=24, model_type="clip_vision_model"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    method = saint.Saint(keep=0.5)
    plan = tower.resolved((saint.Stage(method), saint.Stage(saint.Saint(keep=0.5), layers=[20])), config)
    assert [stage.layers for stage in plan.slots["vision"]] == [
        tuple(range(12)),
        (20,),
    ]  # half of 24, though 23 are loaded
    assert tower.left(plan, 577) == 145  # 289, then 144.5, rounded half up
    with pytest.raises(ValueError, match="can drop at most half"):
        tower.left(tower.resolved((saint.Stage(saint.Saint(keep=0.25), layers=[3]),), config), 576)
    with pytest.raises(ValueError, match=r"layer 23 .* lies behind the features"):
        tower.resolved((saint.Stage(method, layers=[23]),), config)
    config.vision_feature_layer = [3, -2]
    with pytest.raises(ValueError, match="must read one layer"):
        tower.resolved((saint.Stage(method),), config)


def test_a_plan_of_the_connector_is_followed():
    assert budget.of_plan(saint.plan("llava-1.5/divprune-128")) == DIVPRUNE(keep=128)
    assert budget.of_plan(saint.Plan(connector=DIVPRUNE(keep=1.0))) is None
    assert budget.of_plan(saint.Plan()) is None


def test_the_engine_reads_its_plan(monkeypatch, tmp_path):
    monkeypatch.delenv(budget.VARIABLE, raising=False)
    assert budget.default() is None
    saint.Plan(connector=DIVPRUNE(keep=0.25)).save(tmp_path / "plan.json")
    monkeypatch.setenv(budget.VARIABLE, str(tmp_path / "plan.json"))
    assert budget.default() == DIVPRUNE(keep=0.25)
    monkeypatch.setenv(budget.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"SAINT_PLAN=.*none\.json"):
        budget.default()


@pytest.mark.parametrize(
    ("asked", "engine", "got"),
    [
        ({"keep": 0.5}, None, DIVPRUNE(keep=0.5)),
        ({"keep": 0.5}, saint.SaintFullGraph(keep=99, step=8), saint.SaintFullGraph(keep=0.5, step=8)),
        ({"method": "saint_full_graph", "step": 4}, saint.SaintFullGraph(keep=99, step=8), saint.SaintFullGraph(99, 4)),
        ({"method": "random", "seed": 5}, DIVPRUNE(keep=7), saint.methods.Random(seed=5)),
        ({"keep": 1.0}, DIVPRUNE(keep=7), None),
        ({}, DIVPRUNE(keep=7), DIVPRUNE(keep=7)),
    ],
)
def test_a_request_changes_the_plan_of_the_engine(asked, engine, got):
    assert budget.requested(asked, engine) == got


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"method": "fastv", "keep": 9}, "FastV needs last_query.*caches a picture's features"),
        ({"method": "saint"}, "Saint does not keep a fixed number of tokens"),
        ({"method": "tome"}, "ToMe does not keep a fixed number"),
        ({"keep": 0.0}, "keep must be an int >= 1"),
        ({"keep": True}, "keep must be an int >= 1"),
        ({"ratio": 0.5}, "ratio"),
        ({"method": "divprun"}, "did you mean 'divprune'"),
        (0.25, 'must be an object like {"keep": 0.25}'),
    ],
)
def test_bad_requests_name_what_is_wrong(asked, why):
    with pytest.raises(ValueError, match=why):
        budget.requested(asked, None)


@pytest.mark.parametrize("runs", [(36,), (9, 9, 9), (5, 1, 30), (4, 4, 4, 7)])
def test_shares_of_tiles(runs):
    total = sum(runs)
    assert budget.shares(0.5, runs) == [max(1, math.floor(run / 2 + 0.5)) for run in runs]
    for keep in range(len(runs), total + 1):
        got = budget.shares(keep, runs)
        assert sum(got) == keep
        assert all(1 <= g <= run for g, run in zip(got, runs, strict=True))
        exact = [keep * run / total for run in runs]
        assert all(abs(g - e) < 1 or g == 1 for g, e in zip(got, exact, strict=True)) or min(exact) < 1
    with pytest.raises(ValueError, match=f"only {total} candidates"):
        budget.shares(total + 1, runs)
    if len(runs) > 1:
        with pytest.raises(ValueError, match="at least one of each"):
            budget.shares(len(runs) - 1, runs)


def test_a_choice_survives_the_way_to_the_model():
    choice = Choice(saint.SaintFullGraph(keep=0.5, step=4, center=True), (36, 20), (18, 10))
    assert Choice.unpacked(choice.packed()) == choice


def test_features_are_chosen_run_by_run_whatever_their_neighbours():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    choices = [Choice(DIVPRUNE(keep=0.5), (8, 4), (4, 2)), Choice(DIVPRUNE(keep=0.25), (12,), (3,))]
    given = [choices[0], choices[1], choices[0]]
    got = selection.indices(features, given)
    for one, choice, places in zip(features, given, got, strict=True):
        (kept,) = selection.choose(one.unsqueeze(0), choice)
        assert torch.equal(places, kept)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == sum(choice.goals)
    first = selection.choose(features[0].unsqueeze(0), choices[0])[0]
    assert [(first < 8).sum().item(), (first >= 8).sum().item()] == [4, 2]


def test_bad_features_stop_no_engine():
    features = torch.full((10, 4), torch.nan)
    (kept,) = selection.indices([features], [Choice(DIVPRUNE(keep=0.5), (10,), (5,))])
    assert kept.shape == (5,)


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("method", [DIVPRUNE(keep=0.5), saint.SaintFullGraph(keep=0.5)], ids=lambda m: m.name)
def test_a_number_that_is_not_finite_counts_as_zero(method, value):
    """One number, a whole row, a channel, everything: the choice is that of the picture with 0 in its place."""
    generator = torch.Generator().manual_seed(4)
    choice = Choice(method, (8, 6), (4, 3))
    for where in ((3, 1), (9,), (slice(None), 2), (slice(None),)):
        features = torch.randn(14, 6, generator=generator)
        bad, plain = features.clone(), features.clone()
        bad[where], plain[where] = value, 0.0
        other = torch.randn(14, 6, generator=generator)
        got = selection.indices([bad, other], [choice, choice])
        want = selection.indices([plain, other], [choice, choice])
        assert [kept.tolist() for kept in got] == [kept.tolist() for kept in want]
        assert bool(torch.isfinite(other).all())


def test_features_of_another_number_are_told():
    with pytest.raises(ValueError, match="made 9 features of a picture, its prompt counts on 10"):
        selection.indices([torch.zeros(9, 4)], [Choice(DIVPRUNE(keep=0.5), (10,), (5,))])


def test_nothing_here_imports_vllm():
    import subprocess
    import sys

    code = "import sys, saint.backends.vllm, saint.backends.vllm.model, saint.lab.cli; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("serve some/model --plan llava-1.5/divprune-128", r"vllm is not installed: pip install \"\.\[vllm\]\""),
        ("serve some/model --plan llava-1.5/hybrid", "vLLM cannot follow the language stage"),
        ("serve timm:vit_tiny", "takes hf:NAME_OR_PATH"),
    ],
)
def test_serve_says_what_is_missing(line, why, capsys, monkeypatch):
    import re
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert re.search(why, capsys.readouterr().err)


def test_the_plan_of_serve_is_json_that_the_engine_reads():
    plan = saint.Plan(connector=DIVPRUNE(keep=0.25))
    assert saint.Plan.load(json.dumps(plan.to_dict())) == plan


def test_the_page_lists_what_is_pruned():
    import re
    from pathlib import Path

    from saint.backends.vllm import names

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    listed = re.findall(r"^\| .* \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(names.ARCHITECTURES)


# -- the hash of a picture ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """What vLLM hands to a processor, as far as we look."""

    hf_processor_mm_kwargs: dict


class Hashed:
    """The class of a processor: what it is given here is what pictures are hashed with."""

    info = SimpleNamespace(
        ctx=SimpleNamespace(
            get_mm_config=lambda: SimpleNamespace(mm_processor_kwargs=None, is_multimodal_pruning_enabled=lambda: False)
        )
    )

    def apply(self, inputs, timing_ctx):
        return json.dumps(inputs.hf_processor_mm_kwargs, sort_keys=True)


class Ours(PruningProcessor, Hashed):
    pass


def hashed(monkeypatch, plan, **kwargs):
    monkeypatch.setenv(budget.VARIABLE, "" if plan is None else json.dumps(plan.to_dict()))
    return Ours().apply(Asked(kwargs), None)


def others(value):
    """The same dataclass with each field in turn changed to another value that it takes."""
    tried = [3, 5, 0.25, 0.6, True, False, "sample", "similar", "post", "mid", (0,), (1,)]
    for field in dataclasses.fields(value):
        for new in tried:
            try:
                other = dataclasses.replace(value, **{field.name: new})
            except (ValueError, TypeError):
                continue
            if other != value:
                yield field.name, other
                break


def test_caches_of_pictures_tell_every_setting_apart(monkeypatch):
    """vLLM keeps features and KV blocks by the hash of a picture: it must say all that decides which tokens stay."""
    seen = {hashed(monkeypatch, None): "nothing", hashed(monkeypatch, None, size=9): "the user's"}
    for method in (DIVPRUNE(keep=0.5), saint.SaintFullGraph(keep=0.5), saint.methods.Random(keep=0.5)):
        for name, one in [("itself", method), *others(method)]:
            asked = hashed(monkeypatch, None, saint=one.to_dict())
            assert seen.setdefault(asked, (method.name, name)) == (method.name, name)
            assert hashed(monkeypatch, saint.Plan(connector=one)) == asked, "the same, whoever asks for it"
    stage = saint.Stage(saint.methods.Grid(keep=0.5), layers=[1])
    for name, one in [
        ("itself", stage),
        *others(stage),
        *((f, dataclasses.replace(stage, method=m)) for f, m in others(stage.method)),
    ]:
        try:
            asked = hashed(monkeypatch, saint.Plan(vision=one))
        except ValueError:
            continue  # vLLM's tower cannot follow it
        assert seen.setdefault(asked, ("vision", name, repr(one))) == ("vision", name, repr(one))
    assert len(seen) > 12


def test_a_request_cannot_pretend_a_stage_of_the_tower(monkeypatch):
    assert hashed(monkeypatch, None, saint_vision=[1]) == hashed(monkeypatch, None)
    assert hashed(monkeypatch, DIVPRUNE_PLAN, saint={"keep": 1.0}) == hashed(monkeypatch, None)


DIVPRUNE_PLAN = saint.Plan(connector=DIVPRUNE(keep=0.5))
