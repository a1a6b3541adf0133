"""What the connector stage is shown of the vision tower, against attention that an eager copy of the model computes."""

import dataclasses
import gc
import threading
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.vision_utils import get_vision_window_index

import saint
from saint import testing
from saint.errors import HookNeverFiredError, UnsupportedModelError
from saint.methods import SCOPE, HiPrune, PruMerge, Random, VisionZip
from saint.methods.base import FixedBudget
from saint.needs import TOWER, TOWER_ATTENTION, TOWER_CLASS, TOWER_JOINED, TOWER_KEYS, TOWER_RECEIVED, TOWER_VALUES
from saint.plans import Plan, Stage
from saint.runtime.rows import rows
from saint.testing import zoo
from saint.testing.vlm import check_vlm
from saint.tokens import Candidates, Selection
from saint.vision.inputs import EncoderForward
from support.families import FAMILIES, IMAGE, maker, prompts
from support.oracles import Oracle, members, oracle_model, relative_error
from support.plans import GREEDY

SEES = ["llava-llama", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3", "paligemma", "idefics3"]
PAIR = [[4, "0", 3], [2, "1", 3, "0"]]  # left padding, several images, and in some families of two sizes
SEEN: list[Candidates] = []


@dataclasses.dataclass(frozen=True)
class Looking(FixedBudget):
    """Keeps the first tokens, and what it was shown."""

    name: ClassVar[str] = "looking"
    paper: ClassVar[str] = ""
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})
    needs: ClassVar[frozenset[str]] = TOWER

    def tower_layers(self, depth: int, read: int, prefix: int) -> tuple[int, ...]:
        return (1, read)

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        SEEN.append(candidates)
        return Selection.from_scores(-candidates.tokens.index, goal, candidates.tokens)


@dataclasses.dataclass(frozen=True)
class LookingAtKeys(Looking):
    needs: ClassVar[frozenset[str]] = frozenset({TOWER_KEYS})


def shown(model, inputs, method=Looking(0.5), **slots):  # frozen
    """What a method was shown of each visual token, prompt after prompt: by what and layer, [tokens, D]."""
    SEEN.clear()
    with saint.pruned(model, Plan(connector=method, **slots)), torch.no_grad():
        model(**inputs)
    (candidates,) = SEEN
    tower, valid = candidates.facts.tower, candidates.tokens.valid
    flat = [v.flatten(0, 1) if valid is None else v[valid] for v in (*tower.shown.values(), tower.place, tower.grid)]
    return dict(zip((*tower.shown, "place", "grid"), flat, strict=True)), tower


class Softmax(TorchFunctionMode):
    """Keeps the probabilities that an eager attention computes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.softmax:
            self.made.append(out)
        return out


def literal(family, twin, inputs, layer):
    """Attention of the first token and that received, of each visual token in the order of the pictures, float64."""
    mode = Softmax()
    tower = twin.get_submodule(family.tower)
    enter = tower[layer].register_forward_pre_hook(lambda *_: mode.__enter__() and None)
    leave = tower[layer].register_forward_hook(lambda *_: mode.__exit__(None, None, None))
    with torch.no_grad():
        twin(**inputs)
    enter.remove()
    leave.remove()
    first, received = [], []
    grids = inputs.get("image_grid_thw")
    if grids is not None:  # one sequence: attention of each segment of it
        matrix = torch.block_diag(*(part[0].double().mean(0) for part in mode.made))
        pictures = [int(n) for n in grids.prod(1)]
        order = torch.arange(len(matrix))
        if family.name == "qwen2.5-vl":
            visual = twin.model.visual
            at, _ = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
            size = visual.spatial_merge_size**2
            order = (at.argsort()[:, None] * size + torch.arange(size)).flatten()
        sums = matrix.sum(0)[order]
        for count, own in zip(pictures, sums.split(pictures), strict=True):
            received.append((own / count).view(-1, family.merge_size**2).mean(1))
        return None, torch.cat(received)
    (probabilities,) = mode.made  # [pictures, H, P + N, P + N]
    for picture in probabilities.double().mean(1):
        row, columns = picture[0, family.prefix :], picture.mean(0)[family.prefix :]
        squares = members(family, len(row) // family.merge_size**2)
        first.append(row[squares].mean(1))
        received.append(columns[squares].mean(1))
    return torch.cat(first), torch.cat(received)


@pytest.mark.parametrize("name", SEES)
def test_attention_is_that_of_an_eager_tower(name, monkeypatch):
    family = FAMILIES[name]
    model = family.build()
    inputs, twin = prompts(family, model, PAIR), oracle_model(model)
    monkeypatch.setattr("saint.runtime.received.rows", partial(rows, block=500))  # a few queries at a time
    got, tower = shown(model, inputs)
    depth = len(model.get_submodule(family.tower))
    assert (tower.depth, tower.read) == (depth, depth - 2 if name.startswith("llava") else depth - 1)
    assert tower.prefix == family.prefix
    for layer in (1, tower.read):
        first, received = literal(family, twin, inputs, layer)
        assert len(received) == int((inputs["input_ids"] == IMAGE).sum())
        torch.testing.assert_close(got[TOWER_RECEIVED, layer][:, 0].double(), received, rtol=1e-4, atol=1e-7)
        want = first if family.prefix else received
        torch.testing.assert_close(got[TOWER_CLASS, layer][:, 0].double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "idefics3"])
def test_values_are_as_long_as_the_layer_makes_them(name):
    """All heads side by side; of joined patches the mean."""
    family = FAMILIES[name]
    model = family.build()
    inputs, values = prompts(family, model, PAIR), []
    layer = model.get_submodule(family.tower)[1]
    with layer.self_attn.v_proj.register_forward_hook(lambda *of: values.append(of[2].double())):
        got, _ = shown(model, inputs)
    lengths = values[0].norm(dim=2)[:, family.prefix :]  # [pictures, patches]
    want = lengths[:, members(family, lengths.shape[1] // family.merge_size**2)].mean(2).flatten()
    torch.testing.assert_close(got[TOWER_VALUES, 1][:, 0].double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl"])
def test_a_method_is_told_whether_the_tower_has_a_class_token(name, monkeypatch):
    """When a plan is applied, and when it chooses: both must name the same layers."""
    family, asked, own = FAMILIES[name], [], HiPrune.tower_layers
    model = family.build()
    monkeypatch.setattr(HiPrune, "tower_layers", lambda *given: asked.append(given[1:]) or own(*given))
    with saint.pruned(model, Plan(connector=HiPrune(0.5, alpha=1.0))), torch.no_grad():
        model(**prompts(family, model, PAIR))
    depth = len(model.get_submodule(family.tower))
    assert asked == [(depth, depth - 2 if family.prefix else depth - 1, family.prefix)] * 2


def test_keys_are_those_of_the_layer_and_alone_need_no_attention():
    family = FAMILIES["llava-llama"]
    model = family.build()
    model.model.vision_tower.set_attn_implementation("eager")
    inputs, keys = prompts(family, model, PAIR), []
    layer = model.get_submodule(family.tower)[2]
    with layer.self_attn.k_proj.register_forward_hook(lambda *of: keys.append(of[2])):
        got, tower = shown(model, inputs, LookingAtKeys(0.5))
    assert {what for what, _ in tower.shown} == {TOWER_KEYS}
    want = keys[0].unflatten(2, (2, -1)).mean(2)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(got[TOWER_KEYS, 2], want)


def test_all_heads_as_one_are_one_attention_of_all_channels():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs, made = prompts(family, model, PAIR), {}
    layer = model.get_submodule(family.tower)[2].self_attn
    with (
        layer.q_proj.register_forward_hook(lambda *of: made.update(q=of[2].double())),
        layer.k_proj.register_forward_hook(lambda *of: made.update(k=of[2].double())),
    ):
        got, _ = shown(model, inputs)
    want = (made["q"][:, :1] @ made["k"].mT / made["q"].shape[2] ** 0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(got[TOWER_JOINED, 2][:, 0].double(), want.flatten(), rtol=1e-4, atol=1e-7)


def test_places_count_along_the_grid_of_each_picture():
    family = FAMILIES["qwen2-vl"]
    model = family.build()
    inputs = prompts(family, model, PAIR)
    got, _ = shown(model, inputs)
    grids = [(rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    assert got["place"].tolist() == [i for rows, columns in grids for i in range(rows * columns)]
    assert got["grid"].tolist() == [[rows, columns] for rows, columns in grids for _ in range(rows * columns)]


@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl", "internvl"])
def test_behind_a_vision_stage_it_is_the_attention_of_survivors(name):
    """Layer 1 drops, behind its attention: there everything is seen, and at the last one what is left."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, PAIR)
    whole, _ = shown(model, inputs)
    got, tower = shown(model, inputs, vision=Stage(Random(0.5), layers=[1]))
    (candidates,) = SEEN
    kept = candidates.tokens
    lengths = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    here = torch.cat([torch.arange(n).unsqueeze(1).eq(row).any(1) for n, row in zip(lengths, kept.kept(), strict=True)])
    assert len(got["place"]) == int(here.sum()) < len(here)
    assert torch.equal(got["place"], whole["place"][here])
    torch.testing.assert_close(got[TOWER_RECEIVED, 1], whole[TOWER_RECEIVED, 1][here])
    at = TOWER_RECEIVED, tower.read
    assert not torch.allclose(got[at], whole[at][here])
    if family.prefix == 0:  # all that is attended to has gone to survivors
        members = family.merge_size**2
        assert got[at].sum().item() * members == pytest.approx(len(inputs["image_grid_thw"]), rel=1e-5)


def test_survivors_of_each_picture_may_differ_in_number():
    """Padding among them counts for nothing: alone it is the same."""
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 3], [4, "0", 3]])
    plan = {"vision": Stage(saint.Saint(threshold=0.3, neighbors=2), layers=[0])}
    together, tower = shown(model, inputs, **plan)
    assert len(set(SEEN[0].tokens.lengths)) == 2
    start = 0
    for sample in range(2):
        alone, _ = shown(model, {name: value[sample : sample + 1] for name, value in inputs.items()}, **plan)
        for what in (TOWER_RECEIVED, TOWER_CLASS):
            one = alone[what, tower.read]
            torch.testing.assert_close(together[what, tower.read][start : start + len(one)], one)
        start += len(one)


# -- ways to call a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava-llama"].build()


PLAN = Plan(connector=VisionZip(0.4))


def kept(session):
    (entry,) = session.trace
    return [one.tolist() for one in entry.kept]


def test_generating_in_beams_and_in_pieces_keeps_the_same(llava):
    inputs = prompts(FAMILIES["llava-llama"], llava, PAIR)
    with saint.pruned(llava, PLAN) as session, torch.no_grad():
        llava(**inputs)
        want = kept(session)
        llava.generate(**inputs, max_new_tokens=2, num_beams=2, **GREEDY)
        assert kept(session) == [one for one in want for _ in range(2)]
        whole = llava.generate(**inputs, max_new_tokens=4, **GREEDY)
        pieces = llava.generate(**inputs, max_new_tokens=4, prefill_chunk_size=16, **GREEDY)
        assert torch.equal(whole, pieces)
        assert kept(session) == want


def test_features_that_were_computed_once_are_known_in_every_prompt(llava):
    inputs = prompts(FAMILIES["llava-llama"], llava, [[4, "0", 3]])
    other = prompts(FAMILIES["llava-llama"], llava, [[1, "0", 5]], seed=1)
    with saint.pruned(llava, PLAN) as session, torch.no_grad():
        llava(**inputs)
        want = kept(session)
        features = torch.cat(list(llava.model.get_image_features(inputs["pixel_values"]).pooler_output))
        llava(**other)  # the tower runs on another picture in between
        assert kept(session) != want
        embeds = llava.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE] = features
        llava(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert kept(session) == want


def test_threads_do_not_mix(llava):
    family = FAMILIES["llava-llama"]
    given = [prompts(family, llava, [[4, "0", 3]], seed=seed) for seed in range(3)]
    with saint.pruned(llava, PLAN) as session, torch.no_grad():
        alone = []
        for inputs in given:
            alone.append(llava(**inputs).logits)
        assert len(session.trace) == 1
        wrong = []

        def work(which):
            with torch.no_grad():
                for _ in range(10):
                    if not torch.equal(llava(**given[which]).logits, alone[which]):
                        wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_forwards_are_not_held(llava):
    """What is known of features is a few numbers of each."""
    inputs = prompts(FAMILIES["llava-llama"], llava, PAIR)
    with saint.pruned(llava, PLAN), torch.no_grad():
        gc.collect()
        before = sum(isinstance(one, EncoderForward) for one in gc.get_objects())
        for _ in range(5):
            llava(**inputs)
        gc.collect()
        assert sum(isinstance(one, EncoderForward) for one in gc.get_objects()) <= before + 1


def test_the_same_picture_twice_in_a_prompt(llava):
    """What is known of one is known of the other; each has its own places."""
    inputs = prompts(FAMILIES["llava-llama"], llava, [[4, "0", 3, "0"]])
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    got, tower = shown(llava, inputs)
    for value in got.values():
        assert torch.equal(*value.chunk(2))
    assert got["place"].tolist() == [*range(36), *range(36)]
    assert tower.read == 2


def test_prompts_without_pictures_pass(llava):
    inputs = prompts(FAMILIES["llava-llama"], llava, [[9], [4]])
    with torch.no_grad():
        base = llava(**inputs).logits
        with saint.pruned(llava, PLAN) as session:
            assert torch.equal(llava(**inputs).logits, base)
            assert session.trace == []


PLANS = {
    "means, behind a vision stage": Plan(
        vision=Stage(saint.SaintFullGraph(keep=0.8), layers=[1]), connector=VisionZip(0.4)
    ),
    "sums, in front of a language stage": Plan(
        connector=PruMerge(), language=Stage(saint.Saint(threshold=0.9, keep=0.6), layers=[1])
    ),
    "one method in two slots": Plan(connector=SCOPE(0.6), language=Stage(SCOPE(0.5), layers=[1])),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl", "qwen3-vl", "gemma3"])
def test_contracts_hold(name, plan):
    """All oracles with what was added, generation, static caches, and samples alone as in a batch."""
    family = FAMILIES[name]
    model = family.build()
    results = check_vlm(model, maker(family, model), PLANS[plan])
    assert {result.outcome for result in results} == {"passed"}, results


def test_what_is_added_is_added():
    """The oracles would not agree without it."""
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 3]])
    with saint.pruned(model, PLAN) as session, torch.no_grad():
        logits = model(**inputs).logits
    (entry,) = session.trace
    assert [len(one) for one in entry.adds] == entry.tokens_out.tolist()
    kept = entry.kept[0]
    changed = entry.adds[0].any(1)
    assert 0 < int(changed.sum()) < len(kept)
    assert not entry.adds[0][:, kept].any()  # means of what leaves
    torch.testing.assert_close(entry.adds[0].sum(1)[changed], torch.ones(int(changed.sum())))
    oracle = Oracle(family, oracle_model(model), session.trace, inputs)
    words = inputs["input_ids"] != IMAGE
    assert relative_error(logits[words], oracle().logits[words]) < 1e-5
    for one in oracle.entries["connector"]:
        one.adds[0].zero_()
    assert relative_error(logits[words], oracle().logits[words]) > 1e-2


def test_what_is_added_does_not_depend_on_prompts_beside_it(llava):
    """One of them without pictures."""
    family = FAMILIES["llava-llama"]
    alone, beside = (prompts(family, llava, samples) for samples in ([[4, "0", 3]], [[9], [4, "0", 3], [2]]))
    with saint.pruned(llava, PLAN) as session, torch.no_grad():
        llava(**alone)
        (want,) = session.trace[0].adds
        llava(**beside)
        first, got, last = session.trace[0].adds
    assert want.any()
    torch.testing.assert_close(got, want)
    assert len(first) == len(last) == 0


def test_gradients_reach_what_is_added(llava):
    inputs = prompts(FAMILIES["llava-llama"], llava, [[4, "0", 3]])
    connector = llava.model.multi_modal_projector
    llava.zero_grad()
    with saint.pruned(llava, Plan(connector=PruMerge(2))) as session, connector.register_forward_hook(keep_gradient):
        llava(**inputs).logits.pow(2).mean().backward()
    (entry,) = session.trace
    reached = GRADIENTS.pop()[0].abs().sum(-1) > 0
    want = entry.adds[0].any(0)
    want[entry.kept[0][0]] = True
    assert torch.equal(reached, want)
    llava.zero_grad()


GRADIENTS = []


def keep_gradient(_module, _args, output):
    output.register_hook(GRADIENTS.append)


# -- what is refused, and what is left behind -----------------------------------------------------------------------------


def test_attention_that_is_not_seen_is_refused_before_anything_is_touched():
    model = FAMILIES["llava-llama"].build()
    model.model.vision_tower.set_attn_implementation("eager")
    before = testing.snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r'attention of CLIP.*"eager".*attn_implementation="sdpa"'):
        saint.apply(model, PLAN)
    assert testing.snapshot(model) == before


def test_attention_that_is_no_longer_seen_is_an_error():
    model = FAMILIES["llava-llama"].build()
    inputs = prompts(FAMILIES["llava-llama"], model, PAIR)
    with saint.pruned(model, PLAN):
        model.model.vision_tower.set_attn_implementation("eager")
        with pytest.raises(HookNeverFiredError, match=r"layers\.2 did not go through.*sdpa"):
            model(**inputs)


def test_a_derived_family_must_have_proved_its_tower(monkeypatch):
    """The contracts of the vision stage show that features follow each other as the tower's candidates do."""
    asked = []
    monkeypatch.setattr("saint.assemble.admit", lambda *of: asked.append(of[3]))
    model = zoo.build("video_llava")
    saint.apply(model, Plan(connector=Random(0.5))).remove()
    saint.apply(model, PLAN).remove()
    assert asked == [("connector",), ("connector", "vision")]


def test_a_tower_that_is_not_known_is_refused_before_anything_is_touched():
    model = zoo.build("lfm2_vl")
    before = testing.snapshot(model)
    with pytest.raises(UnsupportedModelError, match="looks at the vision tower of .*which is unknown: .*a row each"):
        saint.apply(model, PLAN)
    assert testing.snapshot(model) == before


def test_a_prompt_with_tokens_that_the_tower_did_not_show_is_refused_with_counts():
    family = FAMILIES["llava-next"]
    model = family.build()
    inputs = prompts(family, model, PAIR)
    newlines = 24
    count = int((inputs["input_ids"] == IMAGE).sum())
    with (
        saint.pruned(model, PLAN),
        pytest.raises(UnsupportedModelError, match=f"{newlines} of {count} visual tokens are no features.*CLIP"),
    ):
        model(**inputs)


def test_features_that_are_not_one_for_each_token_are_refused_with_counts(llava):
    inputs = prompts(FAMILIES["llava-llama"], llava, [[4, "0", 3]])
    with (
        saint.pruned(llava, PLAN),
        pytest.raises(UnsupportedModelError, match="showed 36 tokens, and they became 37 features"),
    ):
        llava.model.get_image_features(inputs["pixel_values"], vision_feature_select_strategy="full")


def test_a_plan_that_does_not_ask_does_not_look(llava, monkeypatch):
    """The tower is not touched, and where it is, its attention is not."""

    def never(*_, **__):
        raise AssertionError("looked")

    inputs = prompts(FAMILIES["llava-llama"], llava, PAIR)
    monkeypatch.setattr("saint.vision.encoder.Received", never)
    monkeypatch.setattr("saint.vlm.glances.Glances.note", never)
    tower = llava.model.vision_tower
    forwards = [layer.forward for layer in llava.get_submodule(FAMILIES["llava-llama"].tower)]
    with torch.no_grad():
        with saint.pruned(llava, Plan(connector=Random(0.4))):
            assert all("forward" not in vars(module) for module in tower.modules())
            llava(**inputs)
        with saint.pruned(llava, Plan(vision=Stage(Random(0.4), layers=[1]), connector=Random(0.4))):
            llava(**inputs)
        with saint.pruned(llava, PLAN), pytest.raises(AssertionError, match="looked"):
            llava(**inputs)
    assert [layer.forward for layer in llava.get_submodule(FAMILIES["llava-llama"].tower)] == forwards


def test_nothing_is_left_behind(llava):
    inputs, before = prompts(FAMILIES["llava-llama"], llava, PAIR), testing.snapshot(llava)
    with torch.no_grad():
        base = llava(**inputs).logits
        with saint.pruned(llava, Plan(connector=Looking(0.5))) as session:
            assert not torch.equal(llava(**inputs).logits, base)
        assert torch.equal(llava(**inputs).logits, base)
    assert testing.snapshot(llava) == before
    assert session.trace[0].tokens_out.tolist() == [18, 36]


def test_only_the_connector_stage_is_shown_the_tower():
    assert TOWER_ATTENTION < TOWER
    with pytest.raises(ValueError, match="VisionZip is not defined for the language stage"):
        Plan(language=VisionZip())


def test_what_was_added_in_front_is_no_news_of_a_layer_in_which_nothing_leaves():
    family = FAMILIES["llava-llama"]
    model = family.build()
    plan = saint.Plan(
        connector=saint.methods.VisionZip(keep=0.5), language=saint.Stage(saint.methods.Random(keep=1.0), layers=[1])
    )
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**prompts(family, model, [[4, "0", 7]]))
        front, behind = session.trace
    assert front.adds is not None
    assert behind.adds is None
    assert behind.tokens_in.tolist() == behind.tokens_out.tolist() == front.tokens_out.tolist()
