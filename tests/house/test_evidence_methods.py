"""Every method in one frame (`evidence/methods.py`): what is measured, how budgets are met, how a record grows; its tables."""

import json
import math
import sys
from pathlib import Path

import compared
import make_tables
import numpy as np
import pytest
import torch

import saint
from saint.lab.analysis import bootstrap
from saint.plans import Plan
from support.models import build

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))
import methods as frame

SLOTS = ("vision", "connector", "language")


def test_every_method_is_measured_in_every_slot_or_left_out_with_the_reason():
    for method in make_tables.builtin_methods():
        measured = {slot for slot in SLOTS if method.name in frame.names(slot)}
        assert measured == (set() if method.name in frame.LEFT_OUT else method.stages)


def test_parts_of_a_method_are_measured_beside_it():
    assert [name for name in frame.names("connector") if name.startswith("hiprune")] == [
        "hiprune", "hiprune, anchors alone", "hiprune, registers alone",
    ]  # fmt: skip
    assert frame.with_budget("hiprune", 0.25) == saint.methods.HiPrune(keep=0.25)
    assert frame.with_budget("hiprune, anchors alone", 0.25) == saint.methods.HiPrune(keep=0.25, alpha=1.0)
    assert frame.with_budget("hiprune, registers alone", 0.25) == saint.methods.HiPrune(keep=0.25, alpha=0.0)


@pytest.mark.parametrize("model", list(frame.SLOTS))
def test_drop_points_suit_every_method_and_budget(model):
    """Votes and pairs, which let half of the tokens go at most, reach the smallest share."""
    depth = {"vision": 12, "connector": 1, "language": 6}
    for slot in frame.SLOTS[model]:
        for name in filter(frame.takes_budget, frame.names(slot)):
            method = frame.with_budget(name, 0.11)
            plan = frame.plan_of(model, slot, method)
            if slot != "connector":
                method.validate(196, len(plan.resolve_layers(slot, depth[slot])[0]))


def test_the_largest_setting_within_the_budget():
    asked = []

    def reached(setting):
        asked.append(setting)
        if setting < 0.2:
            raise ValueError("too few")
        return setting**2

    found = frame.fitted(reached, 0.25, 0.0, 1.0, 12)
    assert 0.4995 < found <= 0.5
    assert len(asked) == 12
    assert 0.2232 < frame.fitted(reached, 0.05, 0.0, 1.0, 12) < 0.2237


def test_copies_are_counted_without_another_run():
    vit = build("timm/vit-augreg")
    pictures = torch.zeros(2, 3, 96, 96)
    pictures[1, :, :, 48:] = torch.randn(3, 96, 48, generator=torch.Generator().manual_seed(0))
    copies = frame.Copies(vit, {"x": pictures})
    for tau in (0.0, 4.0, 9.0):
        with saint.pruned(vit, saint.methods.Duplicates(tau=tau)) as session, torch.no_grad():
            vit(pictures)
            (entry,) = session.trace
        want = float(entry.tokens_out.sum() / entry.tokens_in.sum())
        assert copies.left(saint.methods.Duplicates(tau=tau)) == pytest.approx(want)


def test_a_larger_count_adds_photographs_and_keeps_those_of_thresholds():
    names = list(range(100))
    few, others = frame.divided(names, 10)
    more, same = frame.divided(names, 76)
    assert len(few) == 10
    assert more[:10] == few, "what a record holds stays in front"
    assert same == others
    assert len(others) == frame.OTHERS
    assert sorted(more + others) == names, "each once"
    with pytest.raises(ValueError, match="count 77 leaves too few"):
        frame.divided(names, 77)


class Fake:
    """A model of which a method's value is its budget, at each of ten pictures."""

    name, whole = "clip-b16", 100.0

    def __init__(self):
        self.asked = []

    def method(self, slot, name, budget):
        if name == "duplicates":
            return "not to be had"
        return saint.methods.get(name.removesuffix(frame.VOTES))().keeping(budget)

    def unpruned(self, first):
        return {"values": [1.0] * (self.count - first)}

    def values(self, slot, chosen, first):
        self.asked.append((chosen[0].name, first))
        for method in chosen:
            yield {"values": [method.fixed] * (self.count - first), "seen": 98.0}

    def flops(self, plan):
        return 100 * plan.vision[0].method.fixed, []


def test_a_record_grows_by_what_it_lacks(tmp_path):
    file, fake = tmp_path / "methods.json", Fake()
    fake.count = 4
    frame.run(fake, ["vision"], 4, math.inf, ["random", "duplicates"], file)
    assert fake.asked == [("random", 0)]
    before = json.loads(file.read_text())
    assert [row["method"] for row in before["rows"]] == ["unpruned", *["random"] * 3, *["duplicates"] * 3]
    fake.count = 10
    frame.run(fake, ["vision"], 10, math.inf, ["random", "duplicates", "grid"], file)
    assert fake.asked == [("random", 0), ("random", 4), ("grid", 0)]
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        if row["method"] in ("random", "grid"):
            assert frame.numbers(row) == [row["budget"]] * 10
            assert row["flops"] == row["budget"]
            assert row["seen"] == 0.5
        elif row["method"] == "duplicates":
            assert row["why"] == "not to be had"
    frame.run(fake, ["vision"], 10, -math.inf, file=file)
    assert len(fake.asked) == 3, "time was over"


def test_the_tower_is_looked_at_once_for_all_budgets(demo_llava):
    """What is answered, and how much is seen, is what each plan alone gives."""
    subject = frame.Llava(2)
    chosen = [subject.method("connector", "visionzip", budget) for budget in (0.5, 0.11)]
    together = list(subject.values("connector", chosen, 0))
    answers = subject.answers(0)
    for method, found in zip(chosen, together, strict=True):
        with saint.pruned(answers.model, Plan(connector=method)) as session:
            right, seen = answers.answered(session, answers.look())
        assert found == {"values": right["all"], "seen": seen}
    assert [round(found["seen"]) for found in together] == [98, 22]
    assert chosen[0].fixed == 0.5, "the methods that were given stay as they are"


# -- tables ---------------------------------------------------------------------------------------------------------------


def row(method, budget, values, flops=0.5):
    return {"method": method, "budget": budget, "values": " ".join(map(str, values)), "flops": flops, "seen": 0.5}


def test_best_and_who_is_not_worse_by_more_than_chance():
    better, worse = [0.9, 0.8, 0.9, 1.0, 0.9, 0.8] * 4, [0.5, 0.4, 0.5, 0.6, 0.5, 0.4] * 4
    swaying = [value + (-1) ** i * 0.1 for i, value in enumerate(better)]
    slot = compared.Slot([row("grid", 0.5, worse), row("random", 0.5, better), row("tome", 0.5, [*swaying, 7])])
    assert slot.count == 24, "pictures that all rows have"
    assert slot.best(0.5) == "random"
    assert slot.apart("grid", 0.5)
    assert not slot.apart("tome", 0.5)
    assert slot.ranked()[-1] == "grid"


def test_who_leaves_more_than_most_is_not_the_best():
    rows = [row(name, 0.5, [value] * 3) for name, value in (("grid", 0.5), ("random", 0.6), ("tome", 0.4))]
    slot = compared.Slot([*rows, row("saint, votes", 0.5, [0.9] * 3, 0.53)])
    assert slot.best(0.5) == "random"
    assert slot.over("saint, votes", 0.5)
    assert slot.unusual("saint, votes", 0.5) == " at 0.53"
    assert slot.unusual("tome", 0.5) == ""


def test_cells_are_the_means_and_intervals_of_the_record():
    """Computed anew of the values, with other resamples."""
    found = json.loads(frame.RECORD.read_text())
    base = next(frame.numbers(r) for r in found["rows"] if r["method"] == "unpruned" and r["model"] == "small-llava")
    text = compared.answers_table() + compared.embeddings_table()
    rng = np.random.default_rng(1)
    slots = {("small-llava", name): slot for name, slot in compared.slots("small-llava").items()}
    slots["clip-b16", "vision"] = compared.slots("clip-b16")["vision"]
    for (model, _), slot in slots.items():
        for key, values in slot.values.items():
            scale, form = (100, "+.1f") if model == "small-llava" else (1, ".3f")
            apart = scale * (values - (np.array(base[: slot.count]) if model == "small-llava" else 0))
            draws = apart[rng.integers(0, slot.count, (4000, slot.count))].mean(1)
            cells = [
                cell
                for cell in text.split("|")
                if f"{format(round(apart.mean(), int(form[-2])) + 0.0, form)} [" in cell
            ]
            near = np.quantile(draws, [0.025, 0.975])
            ends = [[float(end) for end in cell.partition("[")[2].partition("]")[0].split(",")] for cell in cells]
            assert any(np.allclose(pair, near, atol=0.1 * np.ptp(near) + scale * 2e-3) for pair in ends), key


def test_what_the_page_says_in_plain_words():
    slots = compared.slots("small-llava")
    (clip,) = compared.slots("clip-b16").values()

    def behind(slot, name, other, budget):
        """Points, or hundredths of a cosine, that a method is behind another."""
        return 100 * (slot.values[other, budget] - slot.values[name, budget]).mean()

    def apart(slot, name, other, budget):
        """Tell whether a method is behind another by more than chance."""
        found = slot.values[name, budget] - slot.values[other, budget]
        return bool(bootstrap.interval(found, slot.weights).high < 0)

    connector = slots["connector"]
    assert [connector.best(budget) for budget in (0.5, 0.25, 0.11)] == ["scope", "scope", "cdpruner"]
    assert connector.ranked()[:6] == ["scope", "divprune", "cdpruner", "apet", "mmr", "saint_full_graph"]
    assert all(connector.apart("saint_full_graph", budget) for budget in connector.budgets)
    points = [behind(connector, "saint_full_graph", connector.best(budget), budget) for budget in connector.budgets]
    assert 1.45 < min(points) < max(points) < 4.05
    looking = ("vispruner", "prumerge", "visionzip", "hiprune")
    assert all(connector.values[name, 0.11].mean() < 0.8 for name in looking)
    assert all(9.5 < behind(connector, "hiprune", "random", budget) < 18.5 for budget in connector.budgets)
    for part in ("hiprune", "hiprune, anchors alone", "hiprune, registers alone"):
        assert all(apart(connector, part, "random", budget) for budget in connector.budgets)
    for budget in connector.budgets:
        low, high = (connector.values[f"hiprune, {part} alone", budget].mean() for part in ("anchors", "registers"))
        assert low < high
    assert (connector.values["hiprune", 0.11] == connector.values["hiprune, registers alone", 0.11]).all()

    language = slots["language"]
    looking = ("fastv", "sparsevlm", "priortr", "d2pruner", "scope", "pyramiddrop")
    assert all(apart(language, name, "random", 0.11) for name in looking)
    points = [behind(language, name, "random", 0.11) for name in looking]
    assert 1.45 < min(points) < max(points) < 3.0
    ours = ("saint", "saint_full_graph")
    assert all(apart(language, name, "random", 0.11) for name in ours)
    assert all(0.95 < behind(language, name, "random", 0.11) < 1.55 for name in ours)
    assert round(language.rows["saint", 0.11]["seen"], 2) == 0.39

    tower = slots["vision"]
    assert [tower.best(budget) for budget in (0.5, 0.25, 0.11)] == ["resize", "pitome", "pitome"]
    assert not tower.apart("pitome", 0.5)
    assert 1.5 < behind(tower, "saint_full_graph", "resize", 0.5) < 2.5
    assert tower.apart("saint_full_graph", 0.5)
    assert 5.5 < behind(tower, "saint_full_graph", "pitome", 0.25) < 6.5
    assert 5 < behind(tower, "saint", "pitome", 0.5) < behind(tower, "saint", "resize", 0.5) < 6.5
    assert not apart(tower, "random", "saint", 0.5)
    assert 9.5 < behind(tower, "saint", "pitome", 0.25) < 10.5
    assert [name for name in tower.at(0.11) if not tower.apart(name, 0.11)] == [
        "saint", "saint_full_graph", "pitome", "apet",
    ]  # fmt: skip
    assert not tower.apart("saint, votes", 0.5)
    assert round(tower.rows["saint, votes", 0.5]["flops"], 2) == 0.77
    assert [round(behind(tower, "saint, votes", "pitome", budget)) for budget in (0.25, 0.11)] == [9, 15]
    assert round(tower.rows["resize", 0.5]["flops"], 2) == 0.5
    assert round(behind(tower, "resize", "pitome", 0.25)) == 6
    assert tower.apart("resize", 0.25)
    assert tower.rows["resize", 0.25]["flops"] < 0.5 * tower.usual(0.25)
    assert not apart(tower, "random", "resize", 0.11)

    assert [clip.best(budget) for budget in (0.7, 0.5, 0.35)] == ["saint_full_graph", "saint_full_graph", "resize"]
    assert all(round(behind(clip, name, "saint_full_graph", 0.7), 1) == 0.3 for name in ("saint", "match"))
    assert all(clip.apart(name, 0.7) and not clip.apart(name, 0.5) for name in ("saint", "match"))
    last = ("pitome", "ppt", "tome", "duplicates")
    assert all(apart(clip, name, "random", budget) for name in last for budget in clip.budgets)
    assert [name for name in clip.at(0.35) if not clip.apart(name, 0.35)] == ["resize"]
    assert round(behind(clip, "saint_full_graph", "resize", 0.35)) == 4
    assert 5 < behind(clip, "saint", "resize", 0.35) < 6
    assert not apart(clip, "random", "match", 0.35)
    assert not clip.apart("saint, votes", 0.7)
    assert not any(apart(clip, "random", "saint, votes", budget) for budget in (0.5, 0.35))
