"""Tuning a tiny model end to end: targets, what is held back, how it continues, what the plan keeps; thresholds; the command."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint import testing
from saint.flops import count_flops
from saint.lab.eval.journal import JournalError
from saint.lab.kinds import around
from saint.lab.report import make_report, read_records
from saint.lab.tuning import Target, search, work
from saint.lab.tuning.costs import Cost, grid, proposals
from saint.lab.tuning.layout import Drop, Space
from saint.lab.tuning.run import split
from saint.lab.tuning.thresholds import bisect, calibrated
from saint.lab.tuning.trials import Trials
from saint.lab.tuning.work import Meter, Table
from saint.methods import FastV, Random, ToMe
from saint.samples import read_samples
from saint.upstream.tiny import IMAGE, VIDEO
from saint.vlm.prompts import answered
from support.command_line import TINY
from support.families import FAMILIES, prompts
from support.models import build, share_of

MODEL = "timm/vit-augreg"


@pytest.fixture
def vit():
    return build(MODEL)


def pictures(count: int, side: int = 96) -> torch.Tensor:
    """Smooth pictures of a few scales: noise alone has no tokens that resemble each other."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") + 0.1 * fine


def side_of(model) -> int:
    return next(t for t in testing.example_inputs(model).values() if t.ndim == 4).shape[-1]


@pytest.fixture
def images(vit):
    return pictures(18, side_of(vit))


# -- end to end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_the_target_is_met_on_images_held_back_and_the_model_is_clean(vit, images, target):
    before = testing.snapshot(vit)
    found = search(around(vit), images, Target(flops=target))
    assert testing.snapshot(vit) == before
    _, held = split(len(images), 1 / 3, 0)
    shares = [share_of(vit, found.plan, images[number]) for number in held]
    assert abs(np.mean(shares) / target - 1) < 0.02
    reached = found.plan.tuned["reached"]
    assert reached["flops"]["mean"] == pytest.approx(np.mean(shares), abs=1e-9)
    with torch.no_grad():
        base = vit(images[held])
        with saint.pruned(vit, found.plan):
            pruned = vit(images[held])
    cosines = torch.nn.functional.cosine_similarity(base.double(), pruned.double())
    assert reached["agreement"]["mean"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert reached["agreement"]["low"] <= reached["agreement"]["mean"] <= reached["agreement"]["high"]


def test_the_plan_loses_no_more_than_the_published_layout_on_the_images_it_was_tuned_on(vit, images):
    found = search(around(vit), images, Target(flops=0.6))
    tuning, _ = split(len(images), 1 / 3, 0)
    layers = range(len(vit.blocks) // 2)
    for keep in np.linspace(0.05, 0.95, 19):  # the published layout with the most tokens within the same FLOPs
        plan = saint.Plan(vision=saint.Stage(saint.Saint(budget=float(keep)), layers=layers))
        try:
            if share_of(vit, plan, images[0]) > 0.6:
                break
        except ValueError:
            continue
        best = plan
    with torch.no_grad():
        base = vit(images[tuning])
        with saint.pruned(vit, best):
            other = vit(images[tuning])
    rival = 1 - float(torch.nn.functional.cosine_similarity(base.double(), other.double()).mean())
    assert found.record["tuned_loss"] <= rival * 1.02  # counts of the rival are as coarse as its nineteen budgets


def test_a_list_of_tensors_or_of_arguments_gives_the_same_plan(vit, images):
    tensor = saint.tune(vit, images, target_flops=0.7)
    assert saint.tune(vit, list(images), target_flops=0.7) == tensor
    assert saint.tune(vit, [{"x": image[None]} for image in images], target_flops=0.7) == tensor


def test_an_agreement_is_met_with_less_work_where_less_is_asked(vit, images):
    high = search(around(vit), images, Target(agreement=0.999))
    low = search(around(vit), images, Target(agreement=0.95))
    assert 1 - high.record["tuned_loss"] >= 0.999 - 5e-4  # counts are fitted after the search
    assert low.record["reached"]["flops"]["mean"] < high.record["reached"]["flops"]["mean"]


def test_a_speed_is_measured_and_met(vit, images, monkeypatch):
    monkeypatch.setattr(work, "interleave", clock)
    found = search(around(vit), images, Target(speed=1.25))
    assert found.record["target"] == {"speed": 1.25}
    assert found.record["reached"]["speed"] == pytest.approx(1.25, rel=0.02)


def clock(runs, device, repeats, warmup, tick=None):
    """A machine whose time is a staircase: FLOPs of the run, rounded up."""
    return {name: [float(np.ceil(count_flops(run)[1].total / 1e5))] * repeats for name, run in runs.items()}


def test_a_full_length_output_is_that_of_the_plan_that_suits(vit, images):
    suits = saint.Plan(vision=saint.Stage(saint.Saint(threshold=0.6, center=True), output="similar"))
    plan = saint.tune(vit, images, target_flops=0.7, plan=suits, methods=["saint"])
    for stage in plan.slots["vision"]:
        assert stage.output == "carried"
        assert stage.method.name == "saint"


def test_a_method_of_ones_own_may_be_given(vit, images):
    plan = saint.tune(vit, images, target_flops=0.7, methods=[Random(keep=0.5, seed=3)])
    assert all(stage.method.seed == 3 for stage in plan.slots["vision"])


def test_a_vision_language_model_is_tuned_on_its_next_token():
    family = FAMILIES["llava-llama"]
    model = family.build()
    one = prompts(family, model, [[3, "0", 4]])
    generator = torch.Generator().manual_seed(0)
    several = [{**one, "pixel_values": torch.randn(one["pixel_values"].shape, generator=generator)} for _ in range(12)]
    found = search(around(model), several, Target(flops=0.9))
    assert set(found.plan.slots) <= {"connector", "language"}
    assert found.record["reached"]["measure"] == "KL of the answer's tokens"
    assert "agreement" not in found.record["reached"]
    assert abs(found.record["reached"]["flops"]["mean"] / 0.9 - 1) < 0.02
    with pytest.raises(ValueError, match="is a share"):
        saint.tune(model, several, target_agreement=0.99)


@pytest.mark.parametrize(
    ("name", "method"), [("llava-llama", Random), ("llava-llama", FastV), ("qwen2.5-vl", Random), ("paligemma", Random)]
)
def test_the_loss_of_an_answer_is_the_mean_over_its_tokens(name, method):
    """Of a plan that decides as where the answer is generated: by the prompt."""
    family = FAMILIES[name]
    model = family.build()
    one = prompts(family, model, [[3, "0", 4]])
    trials = Trials(around(model), read_samples([one]), facts={})
    plan = saint.Plan(language=saint.Stage(method(keep=0.3), layers=[0]))
    found = trials.run(plan, [0]).loss
    said = model.generate(**one, max_new_tokens=16, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
    length, losses = one["input_ids"].shape[1], []
    for end in range(length, said.shape[1]):
        now = answered(model, one, said[:, length:end])
        with torch.inference_mode():
            base = model(**now, use_cache=False).logits[0, -1].double().log_softmax(-1)
            with saint.pruned(model, plan) as session, session.prompt(length):
                pruned = model(**now, use_cache=False).logits[0, -1].double().log_softmax(-1)
        losses.append(float((base.exp() * (base - pruned)).sum()))
    assert len(losses) > 4
    assert len({round(loss, 6) for loss in losses}) > 2
    assert found == pytest.approx(np.mean(losses), rel=1e-3)
    assert trials.run(saint.Plan(), [0]).loss == pytest.approx(0, abs=1e-9)


# -- how it continues -----------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_a_killed_run_continues_and_ends_the_same(vit, images, tmp_path):
    seen = []

    def dies(count: int) -> None:
        seen.append(count)
        if sum(seen) > 150:
            raise KilledError

    journal = tmp_path / "j.sqlite"
    with pytest.raises(KilledError):
        search(around(vit), images, Target(flops=0.7), journal=journal, tick=dies)
    assert saint.status(vit) is None
    again = search(around(vit), images, Target(flops=0.7), journal=journal)
    assert again.resumed > 5
    whole = search(around(vit), images, Target(flops=0.7))
    assert again.plan == whole.plan
    assert again.record["tuned_loss"] == whole.record["tuned_loss"]


def test_a_journal_is_of_one_model_and_one_set_of_images(vit, images, tmp_path):
    journal = tmp_path / "j.sqlite"
    saint.tune(vit, images, target_flops=0.7, journal=journal)
    other = search(around(vit), images, Target(flops=0.8), journal=journal)  # another target finds what is there
    assert other.resumed
    with pytest.raises(JournalError, match="another run"):
        saint.tune(vit, images + 1, target_flops=0.7, journal=journal)
    with torch.no_grad():
        next(vit.parameters()).add_(1)
    with pytest.raises(JournalError, match="another run"):
        saint.tune(vit, images, target_flops=0.7, journal=journal)


# -- what the plan keeps --------------------------------------------------------------------------------------------------


def test_a_plan_file_keeps_how_it_was_tuned_and_equality_does_not_depend_on_it(vit, images, tmp_path):
    plan = saint.tune(vit, images, target_flops=0.7)
    assert plan.tuned["class"] == type(vit).__name__
    assert plan.tuned["depth"] == {"vision": len(vit.blocks)}
    assert plan.tuned["images"] == {"set": None, "tuned": 12, "held_out": 6}
    plan.save(tmp_path / "plan.json")
    loaded = saint.Plan.load(tmp_path / "plan.json")
    bare = saint.Plan.from_dict(plan.to_dict())
    assert loaded == plan == bare
    assert hash(loaded) == hash(bare)
    assert loaded.tuned == plan.tuned
    assert bare.tuned is None
    assert "tuned" not in plan.to_dict()
    assert dataclasses.replace(loaded, vision=saint.Saint()).tuned is None  # no longer what was tuned
    with pytest.raises(ValueError, match="tuned must be an object"):
        saint.Plan.from_dict({"version": 1, "tuned": 3})


def test_another_model_warns_and_the_same_does_not(vit, images):
    plan = saint.tune(vit, images, target_flops=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saint.apply(vit, plan).remove()
    deeper = plan.with_tuned({**plan.tuned, "depth": {"vision": len(vit.blocks) + 6}})
    with pytest.warns(UserWarning, match=f"{len(vit.blocks) + 6} vision layers, and this one has {len(vit.blocks)}"):
        saint.apply(vit, deeper).remove()
    other = plan.with_tuned({**plan.tuned, "class": "Dinov2Model"})
    with pytest.warns(UserWarning, match="Dinov2Model, and this is a"):
        saint.apply(vit, other).remove()


# -- parts ----------------------------------------------------------------------------------------------------------------


def flat_table(depth: int, tokens: int) -> Table:
    counts = grid(tokens)
    half = counts / tokens / depth / 2
    return Table("flops", counts, half, half, depth, 0.0)


def test_the_table_is_what_a_counter_says_of_other_plans(vit, images):
    trials = Trials(around(vit), read_samples(images), facts={})
    with saint.pruned(vit, saint.Plan(vision=saint.Stage(Random(), layers=[0]))) as session, torch.no_grad():
        vit(images[:1])
        tokens = int(session.trace[0].tokens_in[0])
    depth = len(vit.blocks)
    table = Meter(around(vit), trials.once(0), "vision", depth, tokens).table("flops", np.arange(tokens, 0, -1))
    space = Space("vision", True, True, depth, tokens)
    for layout in (
        (Drop(1, Random(), tokens // 2),),
        (Drop(0, Random(), tokens - 3), Drop(2, Random(), tokens // 3)),
        (Drop(depth, Random(), 5),),
    ):
        assert space.work(layout, table) == pytest.approx(share_of(vit, space.plan(layout), images[0]), rel=1e-9)


def test_proposals_prefer_the_place_that_costs_nothing():
    space, saint_ = Space("vision", True, True, 6, 64), saint.Saint(keep=0.5)
    costs = {(place, 0): Cost(0.001 if place == 3 else 1.0, 1.0) for place in range(5)}
    best = proposals(space, costs, [saint_], flat_table(6, 64), 0.75)
    assert len(best[0]) == 1
    assert best[0][0].place == 3
    for layout in best:
        assert space.work(layout, flat_table(6, 64)) <= 0.75


def test_the_power_law_goes_through_two_points():
    cost = Cost.fit([0.2, 0.5], [0.01, 0.07])
    assert cost.at(-np.log([0.8, 0.5])) == pytest.approx([0.01, 0.07])


def test_fitting_uses_up_the_budget_and_keeps_to_steps_that_are_possible():
    space, table = Space("vision", True, True, 6, 64), flat_table(6, 64)
    layout = space.even(ToMe(keep=0.5), [1, 2])
    fit = space.fitted(layout, table, 0.6)
    assert space.possible(fit)
    assert 0.6 - 0.02 < space.work(fit, table) <= 0.6
    assert space.fitted(layout, table, 0.2) is None  # two steps leave a quarter at least


def test_neighbours_of_a_layout_are_layouts():
    space = Space("vision", True, True, 6, 64)
    layout = space.even(saint.Saint(keep=0.5), [1, 3])
    moved = list(space.moves(layout, 4))
    assert len(moved) > 5
    assert layout not in moved
    for one in moved:
        places = [drop.place for drop in one]
        left = [drop.left for drop in one]
        assert places == sorted(set(places))
        assert left == sorted(set(left), reverse=True)


def test_bisection_finds_where_a_rising_function_crosses():
    assert bisect(lambda t: 100 * t, 37.0, -1, 1) == pytest.approx(0.37, abs=1e-4)


def test_thresholds_meet_the_mean_and_every_image_keeps_its_own(vit, images):
    numbers = list(range(len(images)))
    trials = Trials(around(vit), read_samples(images), facts={})
    depth = len(vit.blocks)
    with saint.pruned(vit, saint.Plan(vision=saint.Stage(Random(), layers=[0]))) as session, torch.no_grad():
        vit(images[:1])
        tokens = int(session.trace[0].tokens_in[0])
    table = Meter(around(vit), trials.once(0), "vision", depth, tokens).table("flops", grid(tokens))
    space = Space("vision", True, True, depth, tokens)
    method = saint.Saint(neighbors=2, keep=0.5)
    layout = space.fitted(space.even(method, [1, 2]), table, 0.8)
    found = calibrated(trials, space, layout, table, numbers, 0.8)
    assert found is not None
    left = trials.run(space.plan(layout, found), numbers).left
    assert len(set(left[-1].tolist())) > 1, "every image has the same number"
    assert abs(left[0].mean() - layout[0].left) < 1.5
    assert np.mean(space.work(layout, table, list(left))) == pytest.approx(0.8, rel=0.01)
    assert calibrated(trials, space, space.even(ToMe(keep=0.5), [1]), table, numbers, 0.8) is None


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "one target.*got none"),
        ({"target_flops": 0.5, "target_speed": 2.0}, "one target.*target_flops=0.5 and target_speed=2"),
        ({"target_flops": 1.5}, r"in \(0, 1\), got 1.5"),
        ({"target_agreement": 0.0}, r"in \(0, 1\), got 0"),
        ({"target_speed": 1.0}, "times faster"),
        ({"target_flops": 0.02}, "is the least"),
        ({"target_flops": 0.7, "methods": ["sanit"]}, "did you mean 'saint'"),
        ({"target_flops": 0.7, "held_out": 0.0}, "held_out must be"),
    ],
)
def test_bad_settings_say_what_is_expected(vit, images, settings, words):
    with pytest.raises(ValueError, match=words):
        saint.tune(vit, images, **settings)
    assert saint.status(vit) is None


def test_bad_images_say_what_is_expected(vit, images):
    with pytest.raises(ValueError, match="at least 12 images are needed.*got 11"):
        saint.tune(vit, images[:11], target_flops=0.7)
    with pytest.raises(TypeError, match=r"\[n, 3, H, W\].*got str"):
        saint.tune(vit, "photos/", target_flops=0.7)
    with pytest.raises(TypeError, match="got Image in it"):
        saint.tune(vit, [Image.new("RGB", (8, 8))] * 12, target_flops=0.7)
    with saint.pruned(vit, saint.Saint()), pytest.raises(saint.AlreadyAppliedError, match="carries a plan"):
        saint.tune(vit, images, target_flops=0.7)


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my photos"
    path.mkdir()
    for number in range(13):
        Image.effect_noise((9, 7), 40 + 5 * number).convert("RGB").resize((90, 70)).save(path / f"{number}.png")
    return path


def test_the_command_writes_a_plan_that_other_commands_take(command, folder, tmp_path):
    plan, record, curve = tmp_path / "out" / "plan.json", tmp_path / "tune.json", tmp_path / "curve.json"
    args = ["tune", *TINY, "--images", folder, "--target-flops", "0.7", "-o", plan, "--json", record]
    code, said, err = command(*args, "--frontier", curve)
    assert code == 0, err
    assert "published saint" in said
    assert "9 images, 4 held back" in said
    loaded = saint.Plan.load(plan)
    assert loaded.tuned["model"] == "timm:test_vit"
    assert loaded.tuned["images"]["set"] == "my photos"
    made = json.loads(record.read_text())
    assert made["kind"] == json.loads(curve.read_text())["kind"] == "tune"
    assert made["pretrained"] is json.loads(curve.read_text())["pretrained"] is False
    assert str(tmp_path) not in record.read_text() + plan.read_text() + curve.read_text()
    assert saint.Plan.from_dict(made["plan"]) == loaded
    for cost in made["costs"]:
        assert cost["left"] == round((1 - cost["share"]) * 100)
        assert cost["places"][-1] <= 4  # two thirds of six layers, counted from the one in front of them
        assert len(cost["mean"]) == len(cost["low"]) == len(cost["high"]) == len(cost["places"])
        assert all(low <= mean <= high for low, mean, high in zip(cost["low"], cost["mean"], cost["high"], strict=True))
    assert {round(cost["share"], 1) for cost in made["costs"]} == {0.2, 0.5}
    assert "costs" not in loaded.tuned
    page = make_report(read_records([record, curve]))
    assert "Other budgets" in page
    assert "Loss when 50% of the tokens are dropped at one layer alone" in page
    with pytest.raises(ValueError, match=r"plan\.json: .*a plan, which is not a record"):
        read_records([plan])
    points = json.loads(curve.read_text())["frontier"]
    reached = [point for point in points if "plan" in point]
    assert len(reached) >= 3
    for point in reached:
        assert point["reached"]["flops"]["mean"] <= point["work"] * 1.005
        saint.Plan.from_dict(point["plan"])
    again, said, _ = command(*args)
    assert again == 0
    assert "trials from the journal" in said
    code, _, err = command("bench", *TINY, "--plan", plan, "--images", folder, "--repeats", "1")
    assert code == 0, err


def test_questions_to_a_vision_language_model(command, spec, folder, tmp_path):
    lines = [{"image": f"{number}.png", "question": "what w5"} for number in range(12)] + [{"image": "0.png"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plan = tmp_path / "plan.json"
    args = ["tune", spec, "--images", folder, "--threads", "1", "--device", "cpu", "--target-flops", "0.9", "-o", plan]
    code, said, err = command(*args, "--questions", tmp_path / "q.jsonl")
    assert code == 1, err  # the last line asks nothing
    assert "q.jsonl, line 13" in err
    assert "KL of the answer's tokens" in said
    assert set(saint.Plan.load(plan).slots) <= {"connector", "language"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "one target"),
        (["--target-flops", "0.5", "--target-agreement", "0.9"], "one target"),
        (["--target-flops", "0.7", "--questions", "q.jsonl"], "vision-language"),
        (["--target-flops", "0.7", "--limit", "12", "--held-out", "2"], "held_out"),
        (["--target-flops", "0.7", "--methods", "saint,tomme"], "tome"),
        (["--target-flops", "0.7", "-o", "."], "directory"),
        (["--target-flops", "0.01"], "is the least"),
    ],
)
def test_bad_options_end_in_one_line(command, folder, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("tune", *TINY, "--images", folder, *args)
    assert code == 2
    assert words in err
    assert not (tmp_path / "plan.json").exists()


def test_a_broken_image_is_told_and_ends_with_status_1(command, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    code, _, err = command("tune", *TINY, "--images", folder, "--target-flops", "0.7", "-o", tmp_path / "plan.json")
    assert code == 1
    assert "broken.jpg" in err
    assert (tmp_path / "plan.json").exists()


def test_the_methods_that_are_tried_are_these():
    """Merging methods apart from those that drop, each with both of its settings; centred keys and plain ones."""
    from saint.lab.tuning.run import _kinds
    from saint.methods import Match, ToMe

    votes = saint.Saint(keep=0.5)
    dropping, averaging = _kinds(["saint", "tome"], None, "vision")
    assert dropping == [votes, dataclasses.replace(votes, center=True)]
    assert averaging == [ToMe(keep=0.5, beta=1.0, r=None), ToMe(keep=0.5, beta=0.0, r=None)]
    match = Match(keep=0.5)
    kinds = _kinds(["match"], None, "vision")
    assert [kind for kind in kinds if not kind[0].merges] == [
        [match, dataclasses.replace(match, center=not match.center)]
    ]
    merging = [method for kind in kinds for method in kind if method.merges]
    assert merging == [
        Match(keep=0.5, fate="weigh"),
        *(Match(keep=0.5, fate="merge", beta=beta) for beta in (1.0, 0.0)),
    ]
    own = saint.Plan(vision=saint.Saint(threshold=0.6, neighbors=3))
    assert _kinds(["saint"], own, "vision")[0][0] == saint.Saint(threshold=0.6, neighbors=3, keep=0.5)


def test_a_method_that_needs_all_that_a_stage_shows_is_usable():
    from saint.methods import FastV, SaintVideo

    vision, language = Space("vision", True, True, 6, 64), Space("language", True, False, 6, 64)
    assert vision.usable(SaintVideo(), 1)
    assert language.usable(FastV(keep=0.5), 1)
    assert not language.usable(FastV(keep=0.5), 0), "in front of the layers no query has been seen"
