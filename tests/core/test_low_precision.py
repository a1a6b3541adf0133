"""Models in bfloat16 and float16: what methods are shown, wherever keys are taken from."""

import pytest
import torch

import saint
from saint import testing
from saint.plans import Plan, Stage
from saint.runtime.blocks import Block
from support.families import FAMILIES, IMAGE, cache_of, prompts
from support.models import NAMES, build
from support.text import MODELS, batch, tiny

HALVES = [torch.bfloat16, torch.float16]


class Ear:
    def __init__(self, layers="all"):
        self.layers, self.seen = layers, {}

    def candidates(self, stage, layer, candidates):
        self.seen[stage, layer] = candidates


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return float((got.double() - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


def lowered(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keys_of_an_encoder_are_means_in_float32(name, dtype, monkeypatch):
    """Of the heads' keys as they are; keys that are computed again for the mean alone have the precision of the layer."""
    model = build(name).to(dtype)
    inputs = lowered(testing.example_inputs(build(name)), dtype)
    received: list[torch.Tensor] = []
    own, fast = torch.nn.functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def spy(query, key, value, *args, **kwargs):
        received.append(key.detach().double())
        return own(query, key, value, *args, **kwargs)

    ear = Ear()
    with saint.pruned(model, Plan(), observers=[ear]) as session, torch.no_grad():
        blocks, prefix = session._stacks[0].blocks, session._stacks[0].prefix
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            testing.run(model, inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    assert len(ear.seen) == len(blocks)
    calls = len(received) // len(blocks)
    for (_, layer), candidates in ear.seen.items():
        again = blocks[layer].recomputes
        assert candidates.keys.dtype == (dtype if again else torch.float32)
        if blocks[layer].tables or not calls:
            continue  # the attention receives them turned, or is not torch's
        want = torch.cat(received[layer * calls : (layer + 1) * calls], 1).mean(1)[:, prefix:]
        assert near(candidates.keys, want, 3e-2 if again else 1e-6)
        rounded = want.to(dtype).double()
        assert not near(rounded, want, 1e-5), "means in the layer's own dtype would be told apart"


def test_every_way_of_taking_keys_is_swept(monkeypatch):
    """Fused, by token, by head, in one row per token, computed again."""
    ways, own = set(), Block.head_mean_keys

    def note(self, keys, prefix):
        if self.recomputes:
            ways.add("again")
        else:
            ways.add("fused" if self.spec.fused else "token" if self.spec.keys_by_token else str(keys.ndim))
        return own(self, keys, prefix)

    monkeypatch.setattr(Block, "head_mean_keys", note)
    for name in NAMES:
        model = build(name)
        with saint.pruned(model, Plan(), observers=[Ear()]):
            testing.run(model, testing.example_inputs(model, batch=1))
    assert {"again", "token", "3", "4"} <= ways


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*MODELS, *FAMILIES])
def test_keys_of_a_language_model_are_means_in_float32(name, dtype):
    """Of those that are cached, over the heads of the cache."""
    if name in MODELS:
        model, inputs = tiny(name), batch([14, 9])
        mask = inputs["attention_mask"].bool()
        visual = mask & (mask.cumsum(1) > 1) & (mask.flip(1).cumsum(1).flip(1) > 1)
    else:
        family = FAMILIES[name]
        model = family.build()
        inputs = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
        visual = inputs["input_ids"] == IMAGE
    model = model.to(dtype)
    ear = Ear([0, 1])
    stage = Stage(saint.Saint(keep=1.0), layers=[0, 1])
    with saint.pruned(model, Plan(language=stage), observers=[ear]), torch.no_grad():
        cache = cache_of(model(**lowered(inputs, dtype)))
    for layer in (0, 1):
        candidates, keys = ear.seen["language", layer], cache.layers[layer].keys
        assert keys.dtype == dtype
        assert candidates.keys.dtype == torch.float32
        assert candidates.features.dtype == dtype
        stored = visual.shape[1] - keys.shape[2]  # a sliding layer holds the last of them
        for sample, here in enumerate(visual):
            places = [place for place in here.nonzero().flatten().tolist() if place >= stored]
            want = keys[sample, :, [place - stored for place in places]].double().mean(0)
            skipped = int(here.sum()) - len(places)
            got = candidates.keys[sample, skipped : int(here.sum())]
            assert near(got, want, 1e-6)
            assert not near(want.to(dtype).double(), want, 1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tower])
def test_keys_of_a_tower_are_means_in_float32(name, dtype):
    family = FAMILIES[name]
    model = family.build().to(dtype)
    inputs = lowered(prompts(family, model, [[4, "0", 7]]), dtype)
    ear = Ear([0, 1])
    stage = Stage(saint.SaintFullGraph(keep=1.0), layers=[0, 1])
    with saint.pruned(model, Plan(vision=stage), observers=[ear]) as session, torch.no_grad():
        model(**inputs)
        assert not any(block is not None and block.recomputes for block in session._stacks[0].blocks)
    for layer in (0, 1):
        keys = ear.seen["vision", layer].keys
        assert keys.dtype == torch.float32
        assert not torch.equal(keys, keys.to(dtype).float()), "the numbers are those of the layer's dtype"
