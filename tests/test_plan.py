import json

import pytest
import torch

import saint
from saint.methods import base
from saint.plan import Plan, Stage


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(vision=saint.Saint()),
        Plan(
            vision=Stage(saint.Saint(threshold=0.6, budget=64), layers=range(2, 5), placement="post", output="nearest")
        ),
        Plan(vision=Stage(saint.SaintFullGraph(keep=0.5), layers=[3]), language=saint.Saint(threshold=0.83)),
        Plan(vision=Stage(saint.Saint(), layers="first_half")),
    ],
)
def test_round_trip_through_json(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["version"] == 1
    assert Plan.from_dict(data) == plan


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"version": 99}, "version 99"),
        ({"version": 1, "visoin": {}}, "visoin"),
        ({"version": 1, "vision": {"method": {"method": "siant"}}}, "did you mean 'saint'"),
        ({"version": 1, "vision": {"method": {"method": "saint", "tresh": 1}}}, "tresh"),
        ({"version": 1, "vision": {"layers": [1]}}, "method"),
        ({"version": 1, "vision": {"method": {"method": "saint"}, "depth": 3}}, "depth"),
    ],
)
def test_bad_plan_data(data, words):
    with pytest.raises(ValueError, match=words):
        Plan.from_dict(data)


def test_bad_json():
    with pytest.raises(ValueError, match="JSON"):
        Plan.from_json("{")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: saint.Saint(threshold=2), r"threshold.*2"),
        (lambda: saint.Saint(threshold=-1.0), r"threshold.*-1"),
        (lambda: saint.Saint(threshold=float("nan")), "threshold.*nan"),
        (lambda: saint.Saint(neighbors=0), "neighbors.*0"),
        (lambda: saint.Saint(gamma=float("inf")), "gamma.*inf"),
        (lambda: saint.Saint(floor=1.5), r"floor.*1\.5"),
        (lambda: saint.Saint(budget="sampel"), "budget.*sampel"),
        (lambda: saint.Saint(budget=0), "budget.*0"),
        (lambda: saint.Saint(budget=1.2), r"budget.*1\.2"),
        (lambda: saint.Saint(budget=True), "budget.*True"),
        (lambda: saint.SaintFullGraph(keep=0), "budget.*0"),
        (lambda: saint.SaintFullGraph(step=0), "step.*0"),
        (lambda: Stage(saint.Saint(), layers="last_half"), "last_half"),
        (lambda: Stage(saint.Saint(), layers=[]), "empty"),
        (lambda: Stage(saint.Saint(), layers=[1, 1]), "twice"),
        (lambda: Stage(saint.Saint(), layers=[-1]), "-1"),
        (lambda: Stage(saint.Saint(), layers=3), "3"),
        (lambda: Stage(saint.Saint(), placement="middle"), "middle"),
        (lambda: Stage(saint.Saint(), output="short"), "short"),
        (lambda: Plan(connector=saint.Saint()), "connector"),
        (lambda: Plan(language=Stage(saint.Saint(), output="nearest")), "output"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="Stage needs a method"):
        Stage("saint")
    with pytest.raises(TypeError, match="vision"):
        Plan(vision="saint")


def test_layer_ranges():
    method = saint.Saint()
    assert Stage(method).resolve_layers("vision", 12) == [0, 1, 2, 3, 4, 5]
    assert Stage(method, layers="first_half").resolve_layers("vision", 5) == [0, 1]
    assert Stage(method, layers=range(3, 1, -1)).resolve_layers("vision", 12) == [2, 3]
    assert Stage(method).resolve_layers("language", 32) == list(range(7, 17))
    assert Stage(saint.SaintFullGraph()).resolve_layers("vision", 24) == [19]
    with pytest.raises(ValueError, match=r"layer 12 is out of range.*0\.\.11"):
        Stage(method, layers=[3, 12]).resolve_layers("vision", 12)


def test_fixed_budgets_meet_their_number_and_share_the_work():
    kept = [base.scheduled_keep(64, 196, step, 6) for step in range(6)]
    assert kept[-1] == 64
    before = [196, *kept[:-1]]
    shares = [k / n for n, k in zip(before, kept, strict=True)]
    assert max(shares) - min(shares) < 0.02
    assert base.final_keep(0.5, 197) == 99
    assert base.final_keep(0.0001, 196) == 1
    with pytest.raises(ValueError, match="budget=200.*196"):
        base.final_keep(200, 196)


def test_a_budget_no_voting_layer_can_meet_is_refused():
    with pytest.raises(ValueError, match="at least 98"):
        saint.Saint(budget=50).validate(196, 1)
    saint.Saint(budget=98).validate(196, 1)


def test_recipes_exist_and_say_what_they_do():
    names = saint.recipes()
    assert "vit/published" in names
    assert all(len(about) > 20 for about in names.values())


def test_unknown_recipe(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'vit/published'"):
        saint.apply(torch.nn.Linear(1, 1), "vit/publishd")


def test_methods_are_frozen_and_registered():
    for name in saint.methods.names():
        cls = saint.methods.get(name)
        assert cls.name == name
        assert cls.paper.startswith("https://")
        method = cls()
        with pytest.raises(AttributeError):
            method.threshold = 3
        assert saint.methods.from_dict(method.to_dict()) == method
