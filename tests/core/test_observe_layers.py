"""Observers of layers and of attention: what they are told is what the model computes, and it changes nothing."""

import copy

import pytest
import torch

import saint
from saint import testing
from saint.runtime.rows import rows
from support.families import FAMILIES, prompts
from support.models import BUILDERS, build


class Ear:
    def __init__(self):
        self.layers, self.calls = {}, {}

    def layer(self, stage, layer, passed):
        self.layers[stage, layer] = passed

    def attention(self, stage, layer, attended):
        self.calls.setdefault((stage, layer), []).append(attended)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_encoder_tells_its_layers_and_its_attention(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    want = testing.run(model, inputs)
    ear = Ear()
    with saint.pruned(model, saint.Plan(), observers=[ear]) as session:
        got = testing.run(model, inputs)
        depth, prefix = session._stacks[0].depth, session._stacks[0].prefix
    assert saint.status(model) is None
    for key, value in want.items():
        assert torch.allclose(value, got[key], atol=1e-5), key
    assert sorted(ear.layers) == sorted(ear.calls) == [("vision", i) for i in range(depth)]
    for (_, layer), passed in ear.layers.items():
        before, after = passed.candidates()
        assert before.shape == after.shape
        assert passed.prefix == prefix
        if layer:
            assert torch.equal(passed.before, ear.layers["vision", layer - 1].after)
        for call in ear.calls["vision", layer]:
            assert call.query.shape[-2] == passed.before.shape[1] or passed.came.places is not None


def probabilities(call, sample):
    own = slice(sample, sample + 1)
    found = rows(call.query[own], call.key[own], scale=call.scale, mask=call.mask_of(sample), causal=call.causal)
    return torch.cat([part for _, (part,) in found])


@pytest.mark.parametrize(
    "name", ["transformers/vit", "transformers/clip", "transformers/dinov2-registers", "transformers/siglip"]
)
def test_rows_are_the_models_own_attention_weights(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True).attentions
        ear = Ear()
        with saint.pruned(model, saint.Plan(), observers=[ear]):
            model(**inputs)
    for layer, expected in enumerate(weights):
        (call,) = ear.calls["vision", layer]
        for sample in range(len(expected)):
            assert torch.allclose(probabilities(call, sample), expected[sample].mean(0), atol=1e-5)


def test_queries_and_keys_of_a_multihead_attention():
    """open_clip's towers compute inside of torch, which gives weights when it is asked."""
    model = build("open_clip/vit")
    inputs = testing.example_inputs(model)
    ear, seen = Ear(), []
    attention = model.transformer.resblocks[1].attn

    def keep(module, args, kwargs, _output):
        seen.append((args, kwargs))

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    with saint.pruned(model, saint.Plan(), observers=[ear]), torch.no_grad():
        testing.run(model, inputs)
    hook.remove()
    (args, kwargs), (call,) = seen[-1], ear.calls["vision", 1]
    with torch.no_grad():
        _, expected = attention(*args, **{**kwargs, "need_weights": True, "average_attn_weights": True})
    for sample in range(len(expected)):
        assert torch.allclose(probabilities(call, sample), expected[sample], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_its_layers(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4]])
    with torch.no_grad():
        want = model(**inputs).logits
        ear = Ear()
        with saint.pruned(model, saint.Plan(), observers=[ear]) as session:
            got = model(**inputs).logits
            depth = session._stacks[-1].depth
    assert torch.allclose(want, got, atol=1e-5)
    language = [key for key in ear.layers if key[0] == "language"]
    assert language == [("language", i) for i in range(depth)]
    assert [key for key in ear.calls if key[0] == "language"] == language
    assert any(key[0] == "vision" for key in ear.layers)
    for key in language:
        passed, (call,) = ear.layers[key], ear.calls[key]
        before, _ = passed.candidates()
        assert before.shape[1] == int((inputs["input_ids"] == 100).sum())
        assert torch.equal(before[0], passed.before[0, inputs["input_ids"][0] == 100])
        assert call.query.shape[2] == call.key.shape[2] == inputs["input_ids"].shape[1]


def test_behind_a_drop_point_layers_show_what_is_left():
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    ear = Ear()
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=7), layers=[1]))
    with saint.pruned(model, plan, observers=[ear]):
        testing.run(model, inputs)
    before, after = ear.layers["vision", 1].candidates()
    assert before.shape[1] > after.shape[1] == 7
    assert ear.calls["vision", 1][0].key.shape[2] == before.shape[1] + ear.layers["vision", 1].prefix
    assert ear.layers["vision", 2].before.shape[1] == ear.layers["vision", 1].after.shape[1]


def test_nobody_pays_for_what_nobody_hears(monkeypatch):
    from saint.runtime import layer

    monkeypatch.setattr(layer, "Attending", None)
    monkeypatch.setattr(layer, "Passed", None)
    model = build("timm/vit-augreg")

    class Selected:
        def selected(self, *_):
            pass

    with saint.pruned(model, saint.Saint(), observers=[Selected()]):
        testing.run(model, testing.example_inputs(model))


@pytest.mark.parametrize(
    "kind", ["none", "bool", "float", "per head", "padding", "padding and float", "padding and bool"]
)
def test_masks_of_a_multihead_attention(kind):
    """nn.MultiheadAttention says what is hidden, everything else what may be seen."""
    from saint.runtime.attended import Attending
    from saint.runtime.state import all_tokens

    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, given = torch.randn(3, 5, 8), {}
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[1, 2] = hidden[4, 0] = True
    if "bool" in kind:
        given["attn_mask"] = hidden
    if "float" in kind:
        given["attn_mask"] = torch.randn(5, 5)
    if kind == "per head":
        given["attn_mask"] = torch.randn(6, 5, 5)
    if "padding" in kind:
        given["key_padding_mask"] = torch.arange(5) >= torch.tensor([[5], [4], [2]])
        if "float" in kind:  # torch wants both of one kind
            given["key_padding_mask"] = torch.zeros(3, 5).masked_fill(given["key_padding_mask"], -torch.inf)
    calls = []
    with torch.no_grad():
        _, want = module(x, x, x, need_weights=True, **given)
        with Attending(calls.append, 0, all_tokens(3, 5, x.device)):
            module(x, x, x, need_weights=False, **given)
    (call,) = calls
    for sample in range(3):
        assert torch.allclose(probabilities(call, sample), want[sample], atol=1e-6)
    with torch.no_grad(), Attending(calls.append, 0, all_tokens(3, 5, x.device)):  # as torch's function is given them
        y, weights = (p.detach() for p in (x.transpose(0, 1), module.in_proj_weight))
        torch.nn.functional.multi_head_attention_forward(
            y, y, y, 8, 2, weights, module.in_proj_bias, None, None, False, 0.0, module.out_proj.weight,
            module.out_proj.bias, training=False, need_weights=False, **given,
        )  # fmt: skip
    for sample in range(3):
        assert torch.allclose(probabilities(calls[1], sample), want[sample], atol=1e-6)


class Decisions:
    def __init__(self):
        self.seen, self.told = [], []

    def candidates(self, stage, layer, candidates):
        self.seen.append((stage, layer, candidates))

    def selected(self, stage, layer, selection):
        self.seen[-1] += (selection,)

    def decided(self, stage, layer, candidates, selection):
        self.told.append((stage, layer, candidates, selection))


def test_a_decision_is_told_with_what_was_seen():
    model, decisions = build("timm/vit-augreg"), Decisions()
    stages = [
        saint.Stage(saint.methods.Grid(keep=0.5), layers=[0]),
        saint.Stage(saint.Saint(threshold=1.0), layers=[2]),
    ]
    with saint.pruned(model, saint.Plan(vision=stages), observers=[decisions]) as session:
        testing.run(model, testing.example_inputs(model))
        trace = session.trace
    assert len(decisions.told) == len(decisions.seen) == 2
    for (stage, layer, candidates, selection), seen, entry in zip(decisions.told, decisions.seen, trace, strict=True):
        assert (stage, layer) == seen[:2] == ("vision", entry.layer)
        assert candidates is seen[2]
        assert selection is seen[3]
        assert list(selection.lengths) == entry.tokens_out.tolist()
    last = decisions.told[-1]
    assert last[3].slots.shape[1] == last[2].tokens.slots  # nothing goes, so every slot stays
