"""Why tokens were dropped, as plain data: what stands for them, and how they voted."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import saint
from saint import graph
from saint.lab.sources.items import Item
from saint.lab.view.reasons import Reasons
from saint.lab.view.survivors import SHOWN, survivors
from saint.methods import PPT, Grid, Random, ToMe
from saint.runtime.observe import Observer


class Keys(Observer):
    """What each drop point was shown, kept here without the code under test."""

    def __init__(self) -> None:
        self.keys, self.index = [], []

    def candidates(self, stage, layer, candidates):
        self.keys.append(candidates.keys.float())
        self.index.append([row[:n] for row, n in zip(candidates.tokens.index, candidates.tokens.lengths, strict=True)])


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


def asked(vit, plan, batch=2):
    """Trace, reasons and keys of a forward."""
    torch.manual_seed(1)
    coarse = torch.nn.functional.interpolate(torch.randn(batch, 3, 5, 5), size=(160, 160), mode="bilinear")
    keys, reasons = Keys(), Reasons(plan)
    with saint.pruned(vit, plan, observers=[reasons, keys]) as session, torch.no_grad():
        vit(coarse)
        found = reasons.take()
        assert reasons.take() == []
        return session.trace, found, keys


@pytest.mark.parametrize("center", [False, True])
def test_degrees_and_stand_ins_are_those_of_the_graph(vit, center):
    method = saint.Saint(threshold=0.2 if center else 0.8, neighbors=4, center=center)
    trace, found, keys = asked(vit, saint.Plan(vision=saint.Stage(method, layers=[0, 2])))
    assert sum(len(why["gone"]) for point in found for why in point) > 4
    left = [set(range(100))] * 2
    for point, reasons in enumerate(found):
        for sample, why in enumerate(reasons):
            index = keys.index[point][sample]
            own = keys.keys[point][sample, : len(index)]
            kept = trace[point].kept[sample].tolist()
            assert sorted([*kept, *why["gone"]]) == index.tolist() == sorted(left[sample])
            left = [set(kept) if n == sample else old for n, old in enumerate(left)]
            vote = graph.vote(own[None], method.threshold, 4, center=center)
            assert why["degree"] == vote.degree[0].tolist()
            assert len(why["gone"]) == int(vote.votes[0])
            assert (why["neighbors"], why["threshold"], why["merged"]) == (4, method.threshold, False)
            unit = own / own.norm(dim=-1, keepdim=True)
            place = {n: i for i, n in enumerate(index.tolist())}
            for n, to in zip(why["gone"], why["into"], strict=True):
                cosines = [float(unit[place[n]] @ unit[place[k]]) for k in kept]
                assert float(unit[place[n]] @ unit[place[to]]) == pytest.approx(max(cosines), abs=1e-6)
                assert to in kept


def test_what_is_merged_names_what_it_became_part_of(vit):
    trace, found, _ = asked(vit, saint.Plan(vision=saint.Stage(ToMe(r=12), layers=[1])))
    for sample, why in enumerate(found[0]):
        assert why["merged"]
        assert "degree" not in why
        assert len(why["gone"]) == 12
        assert [int(trace[0].into[sample][n]) for n in why["gone"]] == why["into"]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_what_only_drops_is_not_told_as_merged(vit, threshold):
    trace, found, _ = asked(vit, saint.Plan(vision=saint.Stage(PPT(r=12, threshold=threshold), layers=[1])))
    for sample, why in enumerate(found[0]):
        assert why["merged"] == bool(threshold)
        assert len(why["gone"]) == 12
        assert set(why["into"]) <= set(trace[0].kept[sample].tolist())


def test_each_drop_point_is_told_with_its_own_method(vit):
    first = saint.Stage(Random(keep=0.8), placement="input")
    stages = [first, saint.Stage(saint.Saint(0.8), layers=[0]), saint.Stage(saint.Saint(0.7, neighbors=3), layers=[3])]
    trace, found, _ = asked(vit, saint.Plan(vision=stages))
    assert len(trace) == len(found) == 3
    assert ["degree" in reasons[0] for reasons in found] == [False, True, True]
    assert [reasons[0].get("neighbors") for reasons in found] == [None, 5, 3]
    for step, reasons in zip(trace, found, strict=True):
        for sample, why in enumerate(reasons):
            assert len(why["gone"]) == int(step.tokens_in[sample] - step.tokens_out[sample])


def test_where_nothing_leaves_nothing_is_gone(vit):
    _, found, _ = asked(vit, saint.Plan(vision=saint.Stage(saint.Saint(threshold=1.0), layers=[1])))
    assert [(why["gone"], why["into"]) for why in found[0]] == [([], [])] * 2
    assert found[0][0]["degree"] == [0] * 50


def test_the_first_images_are_read_again_and_what_is_gone_is_told(tmp_path):
    from saint.lab.kinds import Encoder

    loaded = Encoder.load("timm:test_vit", "cpu", False)
    read = []

    def at(n):
        def load():
            read.append(n)
            if n == 1:
                raise FileNotFoundError("it is gone")
            return Image.fromarray(np.random.default_rng(n).integers(0, 255, (90, 120, 3), dtype=np.uint8))

        return load

    items = [Item(f"{n}.png", f"{n}.png", at(n)) for n in range(6)]
    plan = saint.Plan(vision=saint.Stage(Grid(keep=0.5), layers=[1]))
    photos, left_out = survivors(loaded, plan, items)
    assert read == list(range(SHOWN))
    assert [photo["name"] for photo in photos] == ["0.png", "2.png"]
    assert left_out == [["1.png", "it is gone"]]
    assert photos[0]["grid"] == [10, 10]
    assert len(photos[0]["picture"]) < 30_000
    (layer,) = photos[0]["layers"]
    assert len(layer["kept"]) == len(layer["why"]["gone"]) == 50
    assert saint.status(loaded.model) is None
