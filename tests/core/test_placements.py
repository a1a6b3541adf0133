"""Drop points in front of block 0, several stages of a slot, the middle of decoder layers, merging there, and observers."""

import functools
from contextlib import ExitStack

import pytest
import torch

import saint
from saint import Plan, Stage, testing
from saint.methods import Random, ToMe
from saint.runtime.blocks import Block
from saint.testing import vlm as vlm_contracts
from saint.upstream.decoders import anatomies
from saint.upstream.names import CACHE, Parameters
from saint.vision.locate import locate
from support.families import FAMILIES, IMAGE, maker, prompts
from support.models import NAMES, build, prepared, restage
from support.oracles import oracle_model

GRAPH = saint.SaintFullGraph
INPUT = Stage(GRAPH(keep=0.6), placement="input")
SAMPLES = [[4, "0", 7], [3, "1", 12]]
TOWERS = [name for name, family in FAMILIES.items() if family.tower]


# -- in front of block 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_in_front_of_block_0(name):
    model, _, inputs = prepared(name)
    plan = Plan(vision=INPUT)
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    testing.check_undo(model, plan, inputs)
    testing.check_on(model, Plan(vision=Stage(Random(0.6), placement="input")), inputs)  # scoring is FLOPs too
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        (entry,) = session.trace
    assert (entry.stage, entry.layer, entry.placement) == ("vision", 0, "input")
    assert all(int(n) == int(0.6 * m + 0.5) for n, m in zip(entry.tokens_out, entry.tokens_in, strict=True))


@pytest.mark.parametrize(
    "name", ["timm/vit-augreg", "timm/dinov3", "timm/beit", "transformers/siglip2", "open_clip/vit"]
)
def test_everybody_keeps_his_own_number_in_front_of_block_0(name):
    model, _, inputs = prepared(name)
    seen = []

    class Ear:
        def candidates(self, stage, layer, candidates):
            seen.append(candidates.keys)

    with saint.pruned(model, Plan(vision=INPUT), observers=[Ear()]):
        testing.run(model, inputs)
    points = torch.nn.functional.normalize(seen[0].float(), dim=-1)
    threshold = float((points @ points.mT).flatten().quantile(0.7))
    plan = Plan(vision=Stage(saint.Saint(threshold=threshold, neighbors=3), placement="input"))
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        out = session.trace[0].tokens_out.tolist()
    assert len(set(out)) > 1, out
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)


def test_block_0_runs_on_what_is_left():
    model, _, inputs = prepared("timm/vit-augreg")
    counts = []
    with saint.pruned(model, Plan(vision=INPUT)) as session:
        hook = model.blocks[0].norm1.register_forward_hook(lambda _m, _a, y: counts.append(y.shape[1]))
        testing.run(model, inputs)
        hook.remove()
        assert session.status.stages["vision"][0].placement == "input"
        assert session.status.stages["vision"][0].layers == [0]
    assert counts == [1 + int(0.6 * 36 + 0.5)]


def test_gradients_of_a_forward_that_is_run_again():
    model, _, inputs = prepared("timm/vit-augreg")
    x = inputs["x"].clone()
    found = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        pixels = x.clone().requires_grad_()
        with saint.pruned(model, Plan(vision=[INPUT, Stage(GRAPH(keep=0.5), layers=[2])])):
            loss = model(pixels).square().sum()
            model(torch.randn_like(x))  # another forward in between
            loss.backward()
        found.append(pixels.grad)
        model.set_grad_checkpointing(False)
        model.zero_grad()
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("name", TOWERS)
def test_in_front_of_a_tower(name):
    family = FAMILIES[name]
    model = family.build()
    if name == "llava-onevision":
        with pytest.raises(saint.UnsupportedModelError, match="vision stage"):
            saint.apply(model, Plan(vision=INPUT))
        return
    language = Stage(saint.Saint(threshold=0.9, keep=0.5), layers=[1])
    plan = Plan(vision=[INPUT, Stage(GRAPH(keep=0.8), layers=[1])], language=language)
    make = maker(family, model)
    vlm_contracts.check_oracle(model, plan, make)
    vlm_contracts.check_generation(model, plan, make)
    vlm_contracts.check_undo(model, plan, make([0, 1]))


# -- several stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/eva02", "transformers/clip", "open_clip/vit"])
def test_each_stage_counts_from_where_it_begins(name):
    model, plan, inputs = prepared(name) if name in NAMES else pytest.skip("not in the table")
    several = [
        Stage(Random(0.9), placement="input"),
        Stage(saint.Saint(keep=20), layers=[0, 1], placement="mid"),
        Stage(GRAPH(keep=0.5), layers=[2], placement="post"),
    ]
    plan = Plan(vision=several)
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        trace, status = session.trace, session.status.stages["vision"]
    assert [(e.layer, e.placement) for e in trace] == [(0, "input"), (0, "mid"), (1, "mid"), (2, "post")]
    assert [s.placement for s in status] == ["input", "mid", "post"]
    for sample in range(3):
        counts = [int(e.tokens_out[sample]) for e in trace]
        assert counts[0] == int(0.9 * int(trace[0].tokens_in[sample]) + 0.5)
        assert counts[2:] == [20, 10]
        assert set(trace[3].kept[sample].tolist()) < set(trace[0].kept[sample].tolist())


def test_several_stages_of_the_language_model():
    family = FAMILIES["llava-llama"]
    model = family.build()
    plan = Plan(
        connector=GRAPH(keep=30),
        language=[
            Stage(GRAPH(keep=0.5), layers=[0], placement="mid"),
            Stage(saint.Saint(threshold=0.9, keep=8), layers=[1]),
        ],
    )
    make = maker(family, model)
    vlm_contracts.check_oracle(model, plan, make)
    vlm_contracts.check_generation(model, plan, make)
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**make([0, 1]))
        assert [e.tokens_out.tolist() for e in session.trace] == [[30, 30], [15, 15], [8, 8]]


def test_a_slot_merges_or_drops():
    model, _, _ = prepared("timm/vit-augreg")
    mixed = Plan(vision=[Stage(ToMe(r=4), layers=[0]), Stage(GRAPH(keep=0.5), layers=[2])])
    before = testing.snapshot(model)
    with pytest.raises(saint.UnsupportedModelError, match="some stages of the vision slot merge"):
        saint.apply(model, mixed)
    assert testing.snapshot(model) == before


# -- between attention and MLP of a decoder layer -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_between_attention_and_mlp_of_a_decoder(name):
    family = FAMILIES[name]
    model = family.build()
    make = maker(family, model)
    if name in ("llava-next", "llava-onevision"):

        def make(which):
            return prompts(family, model, [SAMPLES[0]] * len(which))

    plans = [
        Plan(language=Stage(saint.Saint(threshold=0.9, keep=0.4), layers=[0, 2], placement=placement))
        for placement in ("mid", "post")
    ]
    vlm_contracts.check_oracle(model, plans[0], make)
    vlm_contracts.check_generation(model, plans[0], make)
    vlm_contracts.check_identity(model, Plan(language=Stage(GRAPH(keep=1.0), layers=[0, 2], placement="mid")), make)
    mlp = model.get_submodule(family.decoder)[2].mlp
    counts, logits = [], []
    for plan in plans:
        with saint.pruned(model, plan) as session, torch.no_grad():
            hook = mlp.register_forward_hook(lambda _m, _a, y: counts.append(y.shape[1]))
            logits.append(model(**make([0, 1])).logits)
            hook.remove()
            assert session.trace[0].placement == plan.language[0].placement
    assert counts[0] < counts[1]  # the MLP of the drop point no longer runs on what goes
    assert torch.allclose(logits[0], logits[1], atol=1e-4)  # keys decide, and those are the same


def test_a_layer_of_unknown_parts_has_no_middle():
    model = FAMILIES["llava-llama"].build()
    layer = model.model.language_model.layers[1]

    kind = type(layer)

    class Other(kind):
        @functools.wraps(kind.forward)
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    layer.__class__ = Other
    plan = Plan(language=Stage(saint.Saint(keep=0.5), layers=[1], placement="mid"))
    with pytest.raises(saint.ParityError, match=r'language_model\.1 \(Other\) does not compute.*placement="post"'):
        saint.apply(model, plan)
    layer.__class__ = kind
    layer.perceptron = layer.mlp
    del layer.mlp
    with pytest.raises(
        saint.UnsupportedModelError, match=r'language_model\.1 is a Llama.*not known: use placement="post"'
    ):
        saint.apply(model, plan)
    layer.mlp = layer.perceptron
    saint.apply(model, Plan(language=Stage(saint.Saint(keep=0.5), layers=[1]))).remove()


# -- merging inside a language model ------------------------------------------------------------------------------------


def merged_logits(family, twin, trace, inputs, beta: float, placement: str, evicted: int | None = None) -> torch.Tensor:
    """Full length, eager: tokens that are part of another are hidden as keys, and those they are part of hold the mean of what
    merged, and beta * log(size) on their logits. Positions from ``evicted`` on see in every layer only what is left behind the
    last merge, weighed as at that layer."""
    ids = inputs["input_ids"]
    entries = {entry.layer: entry for entry in trace if entry.stage == "language"}
    layers = twin.get_submodule(family.decoder)
    places = [(row == IMAGE).nonzero().flatten() for row in ids]
    parts = [torch.arange(len(own)) for own in places]  # for each visual token the one it is part of
    low = torch.finfo(torch.float32).min

    def share(entry, y):
        y = y.clone()
        for sample, into in enumerate(entry.into):
            before, own = parts[sample], places[sample]
            sizes = before.bincount(minlength=len(own)).float()
            for target in into.unique().tolist():
                members = torch.tensor([i for i in before.unique().tolist() if int(into[i]) == target])
                weight = sizes[members] / sizes[members].sum()
                y[sample, own[target]] = (weight[:, None] * y[sample, own[members]]).sum(0)
            parts[sample] = into
        return y

    def masked(index):
        def hook(_module, args, kwargs):
            mask = kwargs["attention_mask"].expand(len(ids), -1, -1, -1).clone()
            for sample, (into, own) in enumerate(zip(parts, places, strict=True)):
                sizes = into.bincount(minlength=len(own)).float()
                more = torch.where(sizes > 0, beta * sizes.clamp_min(1).log(), low)
                mask[sample, :, :, own] = (mask[sample, :, :, own] + more).clamp_min(low)
                if evicted is not None:
                    gone = torch.ones(len(own), dtype=torch.bool)
                    gone[trace[-1].kept[sample]] = False
                    mask[sample, :, evicted:, own[gone]] = low
            return args, {**kwargs, "attention_mask": mask}

        return hook

    with ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(masked(index), with_kwargs=True).remove)
            if index not in entries:
                continue
            if placement == "post":
                hook = layer.register_forward_hook(lambda _m, _a, y, e=entries[index]: share(e, y))
                stack.callback(hook.remove)
            else:
                block = Block(layer, anatomies(layer)[0], "layer")

                def halves(hidden_states, block=block, entry=entries[index], **kwargs):
                    return block.second(share(entry, block.first(hidden_states, **kwargs)))

                layer.forward = halves
                stack.callback(vars(layer).pop, "forward")
        return twin(**inputs, use_cache=False).logits


@pytest.mark.parametrize("placement", ["post", "mid"])
@pytest.mark.parametrize(("beta", "evict"), [(1.0, False), (0.0, False), (1.0, True), (0.5, True)])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_in_a_language_model(name, beta, evict, placement):
    family = FAMILIES[name]
    model = family.build()
    twin = oracle_model(model)
    inputs = prompts(family, model, [[4, "0", 7], [9], [3, "0", 2, "0", 12]])
    if evict and (placement == "mid" and name not in ("llava-llama", "gemma3")):
        pytest.skip("what is evicted does not ask where tokens went")
    plan = Plan(language=Stage(ToMe(keep=0.4, beta=beta), layers=[0, 2], placement=placement, evict=evict))
    with saint.pruned(model, plan) as session, torch.no_grad():
        logits = model(**inputs).logits
        prompted = session.trace
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[100, 101, 102, 103], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        trace = session.trace
    assert int(trace[-1].tokens_out[2]) == int(0.4 * int(trace[0].tokens_in[2]) + 0.5)
    words = (inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()
    want = merged_logits(family, twin, prompted, inputs, beta, placement)
    error = (logits[words] - want[words]).abs().max() / want[words].abs().max()
    assert error < 1e-5
    plain = merged_logits(family, twin, [], inputs, beta, placement)
    assert (plain[words] - want[words]).abs().max() / want[words].abs().max() > 1e-3, "merging changes nothing"

    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    grown = {**inputs, "input_ids": out.sequences}
    for key in ("attention_mask", family.types):
        if key in inputs:
            fill = 1 if key == "attention_mask" or name == "paligemma" else 0
            grown[key] = torch.nn.functional.pad(inputs[key], (0, new.shape[1]), value=fill)
    want = merged_logits(family, twin, trace, grown, beta, placement, length if evict else None)[:, length - 1 : -1]
    got = torch.stack(out.logits, 1)
    assert (got - want).abs().max() / want.abs().max() < 1e-4


def test_merged_tokens_weigh_in_a_second_turn():
    family = FAMILIES["llava-llama"]
    model = family.build()
    twin = oracle_model(model)
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 12]])
    plan = Plan(language=Stage(ToMe(keep=0.4), layers=[0, 2]))
    more = torch.randint(2, 99, (2, 5), generator=torch.Generator().manual_seed(3))
    length = inputs["input_ids"].shape[1]
    with saint.pruned(model, plan) as session, torch.no_grad():
        first = model(**inputs, use_cache=True)
        trace = session.trace
        ids = torch.cat([inputs["input_ids"], more], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        second = model(
            input_ids=more,
            attention_mask=mask,
            **Parameters(type(model).forward).put({}, CACHE, CACHE.get(first)),
        ).logits
    grown = {**inputs, "input_ids": ids, "attention_mask": mask}
    want = merged_logits(family, twin, trace, grown, 1.0, "post")[:, length:]
    assert (second - want).abs().max() / want.abs().max() < 1e-4


def test_flash_attention_cannot_weigh_merged_tokens():
    model = FAMILIES["llava-llama"].build()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(saint.UnsupportedModelError, match="set beta=0"):
        saint.apply(model, Plan(language=Stage(ToMe(r=2), layers=[0])))
    saint.apply(model, Plan(language=Stage(ToMe(r=2, beta=0), layers=[0]))).remove()


# -- observers ------------------------------------------------------------------------------------------------------


class Everything:
    def __init__(self, layers=None):
        self.layers, self.seen, self.chosen, self.times, self.costs = layers, [], [], [], []

    def candidates(self, stage, layer, candidates):
        self.seen.append((stage, layer, candidates))

    def selected(self, stage, layer, selection):
        self.chosen.append((stage, layer, selection))

    def layer_time(self, stage, layer, seconds):
        self.times.append((stage, layer, seconds))

    def pruning_time(self, stage, layer, scoring, gathering):
        self.costs.append((stage, layer, scoring, gathering))


def test_observers_of_an_encoder():
    model, plan, inputs = prepared("timm/vit-augreg")
    plan = restage(plan, layers=[0, 2])
    ear = Everything()
    with saint.pruned(model, plan) as session:
        want = testing.run(model, inputs)
    with saint.pruned(model, plan, observers=[ear]) as session:
        got = testing.run(model, inputs)
        trace = session.trace
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert [(stage, layer) for stage, layer, _ in ear.seen] == [("vision", 0), ("vision", 2)]
    assert [(stage, layer) for stage, layer, _ in ear.chosen] == [("vision", 0), ("vision", 2)]
    for (_, _, given), (_, _, selection), entry in zip(ear.seen, ear.chosen, trace, strict=True):
        assert given.keys.shape[:2] == given.features.shape[:2] == given.tokens.index.shape
        assert list(selection.lengths) == entry.tokens_out.tolist()
    assert [layer for _, layer, _ in ear.times] == [0, 1, 2, 3]
    assert all(seconds > 0 for _, _, seconds in ear.times)
    assert all(scoring > 0 for _, layer, scoring, _ in ear.costs if layer in (0, 2))
    assert all(scoring == 0 for _, layer, scoring, _ in ear.costs if layer in (1, 3))
    for (_, _, seconds), (_, _, scoring, gathering) in zip(ear.times, ear.costs, strict=True):
        assert scoring + gathering <= seconds


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/beit", "transformers/clip", "open_clip/vit"])
def test_a_plan_that_only_observes(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    before, want, ear = testing.snapshot(model), testing.run(model, inputs), Everything()
    _, encoder, spec = locate(model)
    with saint.pruned(model, Plan(), observers=[ear]) as session:
        got = testing.run(model, inputs)
        assert session.trace == []
    assert testing.snapshot(model) == before
    assert all(torch.equal(got[key], want[key]) for key in want)
    depth = len(encoder.get_submodule(spec.blocks))
    assert [layer for _, layer, _ in ear.seen] == list(range(depth))
    assert not ear.chosen


@pytest.mark.parametrize("name", ["llava-llama", "qwen3-vl", "gemma3", "llava-onevision"])
def test_observing_a_vision_language_model(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7], [9], [3, "0", 12]])
    ear = Everything()
    ear.needs = frozenset({"last_query"})
    with torch.no_grad():
        want = model(**inputs).logits
        with saint.pruned(model, Plan(), observers=[ear]):
            got = model(**inputs).logits
    assert torch.equal(got, want)
    layers = [layer for stage, layer, _ in ear.seen if stage == "language"]
    assert layers == list(range(len(model.get_submodule(family.decoder))))
    assert {stage for stage, _, _ in ear.seen} == {"vision", "language"}
    for stage, _, given in ear.seen:
        if stage == "language":
            assert given.tokens.lengths == tuple((inputs["input_ids"] == IMAGE).sum(1).tolist())
            assert given.attention.shape == given.tokens.index.shape


class Candidates:
    """Has no other event than this one."""

    def __init__(self, layers=None):
        self.layers, self.seen = layers, []

    candidates = Everything.candidates


@pytest.mark.parametrize("kind", [Candidates, Everything])
@pytest.mark.parametrize(("layers", "stages"), [(None, {"language"}), ([1], {"vision", "language"})])
def test_stages_in_which_the_plan_drops_nothing_are_shown_where_layers_are_named(kind, layers, stages):
    family = FAMILIES["llava-llama"]
    model = family.build()
    ear = kind(layers)
    plan = Plan(language=Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    with saint.pruned(model, plan, observers=[ear]), torch.no_grad():
        model(**prompts(family, model, [[4, "0", 7]]))
    assert {stage for stage, _, _ in ear.seen} == stages
    assert {layer for _, layer, _ in ear.seen} == {1}


def test_layers_an_observer_asks_for():
    model, plan, inputs = prepared("timm/vit-augreg")
    plan = restage(plan, layers=[1])
    for layers, want in ((None, [1]), ("all", [0, 1, 2, 3]), ([3], [3]), ([0], [0])):
        ear = Everything(layers)
        with saint.pruned(model, plan, observers=[ear]) as session:
            testing.run(model, inputs)
            assert [entry.layer for entry in session.trace] == [1]
        assert [layer for _, layer, _ in ear.seen] == want
        assert [layer for _, layer, _ in ear.chosen] == [1]
    with pytest.raises(ValueError, match=r"layer 9, and there are layers 0\.\.3"):
        saint.apply(model, plan, observers=[Everything([9])])
    with pytest.raises(ValueError, match="layers of an observer"):
        saint.apply(model, plan, observers=[Everything("first")])
    for wrong in ([-1], [True], [1.0]):
        with pytest.raises(ValueError, match="layers of an observer"):
            saint.apply(model, plan, observers=[Everything(wrong)])
    with pytest.raises(TypeError, match="an observer has at least one of the methods candidates, selected"):
        saint.apply(model, plan, observers=[object()])
    assert saint.status(model) is None


def test_who_derives_from_observer_pays_only_for_what_he_defines():
    class Ear(saint.Observer):
        def selected(self, stage, layer, selection):
            heard.append(layer)

    heard = []
    model, plan, inputs = prepared("timm/vit-augreg")
    with saint.pruned(model, plan, observers=[Ear()]) as session:
        testing.run(model, inputs)
        assert not session._stacks[0].observers.candidates
        assert not session._stacks[0].observers.layer_time
    assert heard == [entry.layer for entry in session.trace] or heard
