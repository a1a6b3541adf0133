import contextlib
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

import saint
from saint import graph, methods, presets, testing
from saint.lab.loading import read_plan
from saint.methods import base
from saint.plans import Plan, Stage
from saint.testing.contracts import snapshot
from support.families import FAMILIES
from support.models import build

FULL = saint.SaintFullGraph(keep=64)


class Mixing(saint.methods.ToMe):
    """A merging method that calls itself fit for every stage."""

    stages = frozenset({"vision", "connector", "language"})


def at(*layers, **settings):
    return Stage(saint.Saint(), layers=list(layers), **settings)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(vision=saint.Saint()),
        Plan(vision=Stage(saint.Saint(threshold=0.6, keep=64), layers=range(2, 5), placement="post", output="nearest")),
        Plan(vision=Stage(saint.SaintFullGraph(keep=0.5), layers=[3]), language=saint.Saint(threshold=0.83)),
        Plan(vision=Stage(saint.Saint(), layers="first_half")),
    ],
)
def test_round_trip_through_json(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["version"] == 1
    assert Plan.from_dict(data) == plan


def test_a_slot_of_one_stage_is_that_stage_however_it_is_given():
    plan = Plan(vision=at(1), language=saint.Saint())
    assert plan == Plan(vision=[at(1)], language=(saint.Saint(),))
    assert plan.vision == (at(1),)
    assert plan.slots == {"vision": (at(1),), "language": (Stage(saint.Saint()),)}
    assert Plan(vision=Stage(FULL, layers=[0], placement="input")) == Plan(vision=Stage(FULL, placement="input"))
    assert hash(Plan(vision=[at(1), at(2)])) == hash(Plan(vision=(at(1), at(2))))


def test_a_slot_of_several_stages():
    first, second = Stage(FULL, placement="input"), Stage(saint.Saint(), layers=[0, 1])
    plan = Plan(vision=[first, second, FULL], language=[at(3), at(7)])
    assert plan.vision == (first, second, Stage(FULL))
    assert plan.slots == {"vision": plan.vision, "language": plan.language}
    assert list(plan.slots) == ["vision", "language"]
    assert plan.slots["language"] == (at(3), at(7))
    assert plan.resolve_layers("vision", 24) == [[0], [0, 1], [19]]
    assert plan.resolve_layers("connector", 24) == []
    data = plan.to_dict()
    assert data["version"] == 1
    assert [entry["placement"] for entry in data["vision"]] == ["input", None, None]
    assert Plan.from_dict(json.loads(json.dumps(data))) == plan


def test_a_slot_is_written_as_a_list_and_read_from_one_or_several():
    for plan in (Plan(vision=at(1)), Plan(language=at(1, evict=True)), Plan(vision=[at(1), at(2)])):
        data = plan.to_dict()
        assert data["version"] == 1
        assert all(isinstance(entry, list) for name, entry in data.items() if name != "version")
    assert Plan.from_dict({"version": 1, "vision": at(1).to_dict()}) == Plan(vision=at(1))


def test_a_slot_is_a_tuple_of_stages_also_of_none_and_one():
    plan = Plan(vision=at(1))
    assert (plan.vision, plan.connector) == ((at(1),), ())
    assert dataclasses.replace(plan, vision=plan.connector) == Plan()


def test_stages_that_only_a_model_puts_out_of_order():
    plan = Plan(vision=[Stage(saint.Saint(), layers="first_half"), at(4)])
    assert plan.resolve_layers("vision", 8) == [[0, 1, 2, 3], [4]]
    with pytest.raises(ValueError, match="stage 2 starts at layer 4, a stage before it ends at layer 5"):
        plan.resolve_layers("vision", 12)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"version": 1, "vision": []}, "empty list"),
        ({"version": 1, "vision": [0.5]}, r"a stage is an object.*got 0\.5"),
        ({"version": 99}, "version 99"),
        ({"version": 1, "visoin": {}}, "visoin"),
        ({"version": 1, "vision": {"method": {"method": "siant"}}}, "did you mean 'saint'"),
        ({"version": 1, "vision": {"method": {"method": "saint", "tresh": 1}}}, "tresh"),
        ({"version": 1, "vision": {"layers": [1]}}, "method"),
        ({"version": 1, "vision": {"method": {"method": "saint"}, "depth": 3}}, "depth"),
        ([], r"a plan is an object like \{\"version\": 1.*Plan.to_dict\(\).*got \[\]"),
        (None, "a plan is an object.*got None"),
        ("x" * 1000, r"a plan is an object.*got 'x{79}$"),
        ({}, "version None is not 1"),
        ({"version": True}, "version True"),
        ({"version": 1.0}, r"version 1\.0"),
        ({"version": [1]}, r"version \[1\]"),
        ({"version": 1, 5: {}, "b": {}}, r"unknown plan entries \['5', 'b'\]"),
        ({"version": 1, "vision": 5}, "a stage is an object.*Stage.to_dict.*got 5"),
        ({"version": 2}, "version 2 is not 1"),
        ({"version": 1, "vision": {"method": "saint"}}, "a method is an object.*got 'saint'"),
        ({"version": 1, "vision": {"method": None}}, "a method is an object.*got None"),
        ({"version": 1, "vision": {"method": {"method": ["saint"]}}}, "registry name under 'method'"),
        ({"version": 1, "vision": {"method": {"method": "saint"}, "layers": 1.5}}, r"layers must be.*1\.5"),
        ({"version": 1, "vision": {"method": {"method": "saint"}, "layers": [[1]]}}, r"layers must be.*\[\[1\]\]"),
        ({"version": 1, "vision": {"method": {"method": "saint"}, "output": []}}, r"output must be one of.*\[\]"),
        (
            {"version": 1, "vision": {"method": {"method": "saint", "center": "false"}}},
            "center must be True or False.*'false'",
        ),
    ],
)
def test_bad_plan_data(data, words):
    with pytest.raises(ValueError, match=words):
        Plan.from_dict(data)


@pytest.mark.parametrize("load", [Plan.load, saint.plan])
def test_a_plan_is_looked_up_by_name_by_file_and_as_text(load, tmp_path, monkeypatch):
    plan = Plan(vision=[at(1), at(3)], language=at(2, evict=True))
    path = tmp_path / "new" / "mine.json"
    plan.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.json"]
    assert load(path) == load(str(path)) == plan
    assert load(path.read_text()) == load(json.dumps(plan.to_dict())) == plan
    assert load("llava-1.5/hybrid") == load(" llava-1.5/hybrid ") == presets.recipe("llava-1.5/hybrid")
    monkeypatch.chdir(path.parent)
    plan.save("no-ending")
    assert load("no-ending") == load("mine.json") == plan
    assert load(Plan().to_dict() and '{"version": 1}') == Plan()


def test_a_recipe_is_not_hidden_by_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Plan(vision=at(1)).save("vit/published")
    assert saint.plan("vit/published") == presets.recipe("vit/published")
    assert saint.plan(Path("vit/published")) == Plan(vision=at(1))


def test_saving_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan(vision=at(1)).save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write the file.*plan\.json"):
        Plan(vision=at(2)).save(path)
    assert Plan.load(path) == Plan(vision=at(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_what_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Plan(vision=at(1)).save("hybrid.json")
    (tmp_path / "half.json").write_text('{"version": 1, "vi')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FileNotFoundError, match=r"no such plan file; did you mean 'hybrid\.json'.*\?: .*hybird\.json"):
        Plan.load("hybird.json")
    with pytest.raises(FileNotFoundError, match=r"Plan\.save\(path\) writes one.*other/zzz"):
        Plan.load(Path("other/zzz"))
    with pytest.raises(ValueError, match=r"half\.json holds no plan: a plan in JSON is expected"):
        Plan.load("half.json")
    with pytest.raises(ValueError, match=r"bytes\.json holds no plan: .*utf-8"):
        Plan.load("bytes.json")
    with pytest.raises(ValueError, match="did you mean 'llava-1.5/hybrid'"):
        saint.plan("llava-1.5/hybird")
    for text in ("zzz", "x" * 10_000, "\0", ""):
        with pytest.raises(ValueError, match="unknown recipe"):
            Plan.load(text)
    for wrong in (None, 5, Plan(), b"vit/published"):
        with pytest.raises(TypeError, match="a recipe's name, JSON text or the path"):
            Plan.load(wrong)


def test_bad_json():
    for text in ("{", "", "[" * 100_000):
        with pytest.raises(ValueError, match="a plan in JSON is expected"):
            Plan.from_json(text)
    with pytest.raises(ValueError, match="a plan is an object"):
        Plan.from_json("null")


@pytest.mark.parametrize("text", ["[1,2]", "5", "null", '"vit/published"', " [] "])
def test_json_that_is_no_plan_is_not_taken_for_a_recipe(text):
    with pytest.raises(ValueError, match="a plan is an object"):
        read_plan(text)


def test_an_unknown_recipe_gets_the_closest_names_only():
    with pytest.raises(ValueError, match="unknown recipe") as raised:
        read_plan("llava-1.5/hybird")
    assert "'llava-1.5/hybrid'" in str(raised.value)
    assert "saint list" in str(raised.value)
    assert len(str(raised.value)) < 200
    with pytest.raises(ValueError, match=r"unknown recipe 'zzz'; all \d+: saint.recipes\(\), saint list"):
        read_plan("zzz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: saint.Saint(threshold=2), r"threshold.*2"),
        (lambda: saint.Saint(threshold=-1.0), r"threshold.*-1"),
        (lambda: saint.Saint(threshold=float("nan")), "threshold.*nan"),
        (lambda: saint.Saint(neighbors=0), "neighbors.*0"),
        (lambda: saint.Saint(gamma=float("inf")), "gamma.*inf"),
        (lambda: saint.Saint(floor=1.5), r"floor.*1\.5"),
        (lambda: saint.Saint(gamma=10**30), "gamma must be a number in .0, 256.*10{30}"),
        (lambda: saint.Saint(gamma=257), r"gamma.*\(1 - threshold\)\) must not overflow"),
        (lambda: saint.Saint(neighbors=10**30), f"neighbors must be an integer >= 1 and <= {2**31}, got 10{{30}}"),
        (lambda: saint.Saint(budget="sampel"), "budget.*sampel"),
        (lambda: saint.Saint(keep=0), "keep.*0"),
        (lambda: saint.Saint(keep=1.2), r"keep.*1\.2"),
        (lambda: saint.Saint(budget=True), "budget.*True"),
        (lambda: saint.SaintFullGraph(keep=0), "keep.*0"),
        (lambda: saint.SaintFullGraph(step=0), "step.*0"),
        (lambda: Stage(saint.Saint(), layers="last_half"), "last_half"),
        (lambda: Stage(saint.Saint(), layers=[]), "empty"),
        (lambda: Stage(saint.Saint(), layers=[1, 1]), "twice"),
        (
            lambda: Stage(saint.Saint(), layers=[-1]),
            "counted from 0.*not negative, got -1: the last of a model of 12 is 11",
        ),
        (lambda: Stage(saint.Saint(), layers="-2"), "not negative, got -2"),
        (lambda: Stage(saint.Saint(), layers="0-5,5"), "twice"),
        (lambda: Stage(saint.Saint(), layers="5-3"), "empty"),
        (lambda: Stage(saint.Saint(), layers="0-10000"), '"0-5" or "0,2,4".*0-10000'),
        (lambda: Stage(saint.Saint(), layers="0;1"), '"first_half", "all".*0;1'),
        (lambda: Stage(saint.Saint(), layers=3), "3"),
        (lambda: Stage(saint.Saint(), placement="middle"), "middle"),
        (lambda: Stage(saint.Saint(), output="short"), "short"),
        (lambda: Plan(connector=saint.Saint()), "connector"),
        (lambda: Plan(language=Stage(saint.Saint(), output="nearest")), "output"),
        (lambda: Stage(saint.Saint(), layers=[1], placement="input"), r"leave layers out, got layers=\(1,\)"),
        (lambda: Stage(saint.Saint(), layers=[0, 1], placement="input"), "leave layers out"),
        (lambda: Stage(saint.Saint(), layers="first_half", placement="input"), "leave layers out"),
        (lambda: Plan(language=Stage(saint.Saint(), placement="input")), "vision stage only.*language"),
        (lambda: Plan(connector=Stage(FULL, placement="input")), "vision stage only.*connector"),
        (lambda: Plan(connector=Stage(FULL, placement="mid")), "leave placement out"),
        (lambda: Plan(connector=Stage(FULL, layers=[0])), "leave layers out"),
        (lambda: Plan(connector=[FULL, FULL]), "takes one stage, got 2"),
        (lambda: Plan(connector=Mixing()), "Mixing merges tokens"),
        (lambda: Plan(vision=Stage(FULL, evict=True)), "language stage only"),
        (lambda: Plan(connector=Stage(FULL, evict=True)), "language stage only"),
        (lambda: Plan(vision=[]), "empty list: leave vision out"),
        (
            lambda: Plan(vision=[at(1), at(2, output="similar")]),
            "output.*all its stages the same.*'survivors', 'similar'",
        ),
        (lambda: Plan(language=[at(1), at(2, evict=True)]), "evict.*all its stages the same"),
        (lambda: Plan(vision=[at(2), at(1)]), "stage 2 starts at layer 1, a stage before it ends at layer 2"),
        (lambda: Plan(vision=[at(1), at(1)]), "stage 2 starts at layer 1"),
        (lambda: Plan(vision=[at(3), FULL, at(2)]), "stage 3 starts at layer 2"),
        (lambda: Plan(vision=[at(1, 3), at(2)]), "ends at layer 3"),
        (lambda: Plan(vision=[at(1), Stage(FULL, placement="input")]), "in front of every layer: put stage 2"),
        (lambda: Plan(vision=[Stage(FULL, placement="input"), methods.Resize()]), "first stage.*number 2"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="Stage needs a method"):
        Stage("saint")
    for wrong in ("saint", ["saint"], [at(1), None], 5):
        with pytest.raises(TypeError, match="vision"):
            Plan(vision=wrong)


def test_layer_ranges():
    method = saint.Saint()
    assert Stage(method).resolve_layers("vision", 12) == [0, 1, 2, 3, 4, 5]
    assert Stage(method, layers="first_half").resolve_layers("vision", 5) == [0, 1]
    assert Stage(method, layers="all").resolve_layers("vision", 5) == [0, 1, 2, 3, 4]
    used = Stage(method, layers="all").resolve_layers("vision", 5, used_layers=4)
    assert used == [0, 1, 2, 3]  # none whose output is not used
    assert Stage(method, layers="0-5") == Stage(method, layers=range(6))
    assert Stage(method, layers="4, 0,2").layers == (0, 2, 4)
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
    with pytest.raises(ValueError, match="keep=200.*196"):
        base.final_keep(200, 196)


def test_a_budget_no_voting_layer_can_meet_is_refused():
    with pytest.raises(ValueError, match="at least 98"):
        saint.Saint(keep=50).validate(196, 1)
    saint.Saint(keep=98).validate(196, 1)


# those that look at pixels leave it to pictures, and a smaller picture has what its grid allows
BUDGETED = [name for name in methods.names() if not methods.get(name).needs & {"pixels", "resized"}]


def budgeted(name, value):
    """A method with ``value`` as what it keeps."""
    return methods.get(name)(keep=value)


def resolve(slot, method, steps):
    """What is done with a stage before the first forward: the connector has one drop point, the others layers."""
    plan = Plan(**{slot: Stage(method, layers=None if slot == "connector" else list(range(steps)))})
    if slot != "connector":
        plan.resolve_layers(slot, 4)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_share_that_no_number_of_tokens_allows_is_refused_before_the_first_forward(name, steps):
    """And one that some numbers allow is not. Literally: the check of the forward, on many numbers of tokens."""
    for share in (0.01, 0.05, 0.1, 0.12, 0.125, 0.2, 0.24, 0.25, 0.26, 0.4, 0.49, 0.5, 0.7, 1.0):
        method = budgeted(name, share)

        def works(total, method=method):
            try:
                method.validate(total, steps)
            except ValueError:
                return False
            return True

        for slot in sorted(method.stages - ({"connector"} if steps > 1 else set())):
            least = (
                4 if slot == "connector" else 16
            )  # fewer tokens may come to the connector: a stage may lie in front of it
            possible = any(works(total) for total in range(least, 800))
            told = contextlib.nullcontext() if possible else pytest.raises(ValueError, match=f"keep={share}.*give more")
            with told:
                resolve(slot, method, steps)


@pytest.mark.parametrize("name", BUDGETED)
def test_numbers_of_tokens_are_left_to_the_forward(name):
    for keep in (1, 5, 15, 375, 2**31):
        method = budgeted(name, keep)
        for slot in method.stages:
            resolve(slot, method, 1)


@pytest.mark.parametrize("name", ["saint", "match", "tome", "pitome", "saint_video"])
@pytest.mark.parametrize("placement", ["input", "mid", "post"])
def test_an_impossible_share_leaves_the_model_alone(name, placement):
    vit = build("timm/vit-augreg")
    before = snapshot(vit)
    stage = Stage(budgeted(name, 0.25), None if placement == "input" else [1], placement)
    with pytest.raises(ValueError, match=r"keep=0\.25 keeps.*at least 32 \(a share of 0\.5\)"):
        saint.apply(vit, stage)
    assert snapshot(vit) == before


FIXED = ("divprune", "grid", "match", "pitome", "ppt", "random", "saint", "saint_full_graph", "saint_video", "tome")


@pytest.mark.parametrize("second", FIXED)
@pytest.mark.parametrize("first", FIXED)
def test_a_later_stage_cannot_keep_more_than_an_earlier_one_leaves(first, second):
    """Known before the first forward where the earlier leaves one number of tokens."""
    vit = build("timm/vit-augreg")
    before = snapshot(vit)
    for value, left in ((19, 19), (0.53, 19), (20, 20), (0.55, 20)):
        one, other = budgeted(first, value), budgeted(second, 20)
        if one.merges != other.merges:
            continue
        stages = [Stage(one, layers=[0]), Stage(other, layers=[2])]
        told = pytest.raises(ValueError, match=f"^keep=20 tokens to keep, but there are only {left} candidates")
        with told if left < 20 else contextlib.nullcontext():
            saint.apply(vit, Plan(vision=stages)).remove()
        assert snapshot(vit) == before


def test_a_language_stage_cannot_keep_more_than_the_connector_leaves():
    model = FAMILIES["llava-llama"].build()
    for keep, language in ((12, methods.Grid(keep=13)), (12, saint.Saint(keep=13)), (12, saint.Saint(keep=5))):
        stage = Stage(language, layers=[1])
        with pytest.raises(ValueError, match="only 12 candidates|keeps 5 of 12"):
            saint.apply(model, Plan(connector=methods.Random(keep=keep), language=stage))
    saint.apply(model, Plan(connector=methods.Random(keep=12), language=methods.Grid(keep=12))).remove()
    # nothing is known of what is left: a share of any number of tokens, votes, and a guard, which keeps more
    saint.apply(model, Plan(connector=methods.Random(keep=0.1), language=methods.Grid(keep=300))).remove()
    saint.apply(model, Plan(connector=methods.EVS(keep=5), language=methods.Grid(keep=300))).remove()
    for early in (
        Stage(saint.Saint(), [0]),
        Stage(methods.Grid(keep=5), [0], guard=0.0),
        Stage(methods.Grid(keep=5), [0], guard=0.2),
    ):
        late = Stage(methods.Grid(keep=30), [2], guard=early.guard)
        known = early.guard == 0 and isinstance(early.method, methods.Grid)
        with pytest.raises(ValueError, match="only 5 candidates") if known else contextlib.nullcontext():
            saint.apply(model, Plan(vision=[early, late])).remove()


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0, True, float("nan"), "all", None, [3]])
def test_a_wrong_budget_is_named_as_it_was_given(name, value):
    if value is None and name in ("tome", "pitome", "ppt", "match", "saint", "saint_video", "prumerge"):
        return  # means r, pairs or votes
    with pytest.raises(ValueError, match="^keep must be"):
        budgeted(name, value)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_number_of_tokens_that_are_not_there_is_named_as_it_was_given(name):
    method = budgeted(name, 999)
    if name == "evs":
        return  # counts the tokens of videos, which only a forward knows
    with pytest.raises(ValueError, match="^keep=999 .*only 36"):
        method.validate(36, 1)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("model", ["timm/vit-augreg", "timm/eva02", "transformers/clip", "open_clip/vit"])
def test_every_method_runs_with_its_defaults_on_a_model_of_any_size(name, model):
    method = methods.get(name)()
    if "vision" not in method.stages:
        pytest.skip(f"{name} is not for the vision stage")
    built = build(model)
    with saint.pruned(built, method) as session, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        testing.run(built, testing.example_inputs(built))
    assert session.trace


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


FIELDS = [
    pytest.param(saint.methods.get(name), field, id=f"{name}-{field.name}")
    for name in saint.methods.names()
    for field in dataclasses.fields(saint.methods.get(name))
]
WRONG = {
    "bool": [True, False],
    "text": ["", "x", "false", "0.5", "1"],
    "none": [None],
    "other": [[0], {}, (1,), 1j, b"1", object()],
    "not finite": [float("nan"), float("inf"), -float("inf")],
    "huge": [10**30, -(10**30), 1e308, -1e308, 10**400],
    "negative": [-1, -0.5, -(2**31)],
}


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_setting_of_every_method_refuses_what_it_cannot_mean(cls, field):
    """A new method is held to this by being registered: its fields are checked with the functions of methods/base.py."""
    kind, default = field.type, getattr(cls(), field.name)
    right = set()
    if kind is bool:
        right = {"bool"}
    elif "str" in str(kind):
        assert default in ("sample", "batch")  # words of its own, none of the ones above
    if "None" in str(kind):
        right |= {"none"}
    if field.name == "threshold":
        right |= {"negative"}  # a cosine: -0.5 is one; -1 is tested above
    for what, values in WRONG.items():
        if what in right:
            continue
        for value in values:
            with pytest.raises(ValueError, match=field.name if field.name != "keep" else "keep|budget"):
                cls(**{field.name: value})
    assert getattr(cls(**{field.name: default} if default is not None else {}), field.name) == default


def test_a_setting_that_says_no_in_words_is_refused_from_json():
    data = saint.Plan(vision=saint.Saint(center=False)).to_dict()
    assert Plan.from_json(json.dumps(data)).vision[0].method.center is False
    for wrong in ("false", "x", float("nan"), [0], 0, 1, None):
        data["vision"][0]["method"]["center"] = wrong
        with pytest.raises(ValueError, match="center must be True or False"):
            Plan.from_json(json.dumps(data))


def test_the_largest_settings_still_choose(recwarn):
    keys = torch.randn(2, 12, 4)
    keys[:, 1::2] = keys[:, 0::2]  # cosine 1: the largest exponent there is
    largest = saint.Saint(gamma=256, threshold=0.75, neighbors=1, keep=0.5)
    ballot = graph.vote(keys, largest.threshold, largest.neighbors, largest.gamma)
    assert torch.isfinite(ballot.score).all()
    assert int(graph.vote(keys, 0.75, 2**31).votes.sum()) == 0


def test_what_is_possible_of_the_few_tokens_behind_other_stages_is_allowed_there():
    """2 of 5 tokens can stay at one drop point: a share of 0.4, which pictures of many tokens do not allow."""
    late = Stage(saint.Saint(keep=0.4), layers=[2])
    Plan(vision=saint.Saint(), language=late).resolve_layers("language", 4)
    Plan(vision=[Stage(saint.Saint(), layers=[0]), late]).resolve_layers("vision", 4)
    with pytest.raises(ValueError, match=r"a share of 0\.5"):
        Plan(language=late).resolve_layers("language", 4)
    quarter = Stage(saint.Saint(keep=0.25), layers=[2])
    with pytest.raises(ValueError, match=r"a share of 0\.5"):
        Plan(vision=saint.Saint(), language=quarter).resolve_layers("language", 4)
