"""Pruning inside towers whose output is joined in groups of patches: features, choices, refusals.

Logits, generation, undo and identity of these families are in the suites that run over all families.
"""

import dataclasses
from contextlib import ExitStack

import pytest
import torch

import saint
from saint.errors import ParityError
from saint.gathers import is_dropped
from saint.vision import inputs as encoder_inputs
from saint.vlm import model as vlm_model
from saint.vlm.locate import find
from support.families import FAMILIES, IMAGE, VIDEO, one_at_a_time, prompts
from support.oracles import Oracle, members, oracle_model, relative_error
from support.plans import SPECIAL

JOINED = [name for name, family in FAMILIES.items() if family.merge_size > 1]
PACKED = [name for name in JOINED if name.startswith("qwen")]
SAMPLES = [[4, "0", 3, "1", 2], [9], [2, "1", 3]]  # several images, none, one


def voting(model, inputs, **stage):
    """A plan under which images lose different numbers of groups, at two layers."""
    for threshold in (0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3):
        method = saint.Saint(threshold=threshold, neighbors=1, center=True, floor=0.0)
        plan = saint.Plan(vision=saint.Stage(method, layers=[0, 2], **stage))
        with saint.pruned(model, plan) as session, torch.no_grad():
            model(**inputs)
            before, after = session.trace
        lost = [before.tokens_in - before.tokens_out, after.tokens_in - after.tokens_out]
        if all(int(n.sum()) for n in lost) and len(set(after.tokens_out.tolist())) > 1:
            return plan
    raise AssertionError("no threshold drops different numbers")


@pytest.fixture(scope="module")
def models():
    def make(name):
        model = FAMILIES[name].build()
        return FAMILIES[name], model, oracle_model(model)

    return one_at_a_time(make)


def pictures(inputs):
    return {k: v for k, v in inputs.items() if k.startswith(("pixel", "image_grid"))}


def features(model, inputs):
    """Visual tokens of all images in a row, [N, C], and those of earlier layers (DeepStack)."""
    with torch.no_grad():
        out = model.get_image_features(**pictures(inputs), return_dict=True)
    rows = [torch.cat([part.flatten(0, -2) for part in out.pooler_output])]
    for deep in getattr(out, "deepstack_features", None) or []:
        rows.append(deep if isinstance(deep, torch.Tensor) else torch.cat(list(deep)))
    return rows


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("placement", ["mid", "post"])
def test_features_of_kept_groups(models, name, placement):
    family, model, twin = models(name)
    inputs = prompts(family, model, SAMPLES)
    plan = voting(model, inputs, placement=placement)

    with saint.pruned(model, plan) as session:
        actual = features(model, inputs)
        trace = session.trace

    oracle = Oracle(family, twin, trace, inputs)
    with ExitStack() as stack:
        oracle.hide_in_tower(stack)
        expected = features(twin, inputs)
    unpruned = features(twin, inputs)[0]
    gone = torch.cat(oracle.lost(trace[-1]))
    assert relative_error(unpruned[~gone], expected[0][~gone]) > 1e-3, "hiding changes nothing"
    assert torch.equal(is_dropped(actual[0]), gone)
    assert int((~gone).sum()) == int(trace[-1].tokens_out.sum())
    assert len(actual) == len(expected) == (3 if name == "qwen3-vl" else 1)
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        assert relative_error(got[~gone], want[~gone]) < 1e-5
    assert all(torch.isfinite(deep).all() for deep in actual[1:])


@pytest.mark.parametrize("name", JOINED)
def test_ragged_images(models, name):
    """Prompt and generation when every image keeps its own number, with more drops behind."""
    family, model, twin = models(name)
    inputs = prompts(family, model, SAMPLES)
    language = saint.Stage(saint.Saint(threshold=0.9, keep=0.5), layers=[1])
    plan = saint.Plan(vision=voting(model, inputs).vision, language=language)
    with saint.pruned(model, plan) as session, torch.no_grad():
        logits = model(**inputs).logits
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        trace = session.trace

    oracle = Oracle(family, twin, trace, inputs)
    assert trace[2].tokens_in.tolist()[1] == 0
    assert int(trace[2].tokens_in.sum()) == int(trace[1].tokens_out.sum())
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert relative_error(logits[here], oracle().logits[here]) < 1e-4
    expected = oracle.continued(out.sequences[:, inputs["input_ids"].shape[1] :])
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


@pytest.mark.parametrize("name", JOINED)
def test_keeping_everything_gives_the_same_features(models, name):
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    base = features(model, inputs)
    for placement in ("mid", "post"):
        plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=1.0), layers=[0, 2], placement=placement))
        with saint.pruned(model, plan) as session:
            same = features(model, inputs)
            assert all(torch.equal(e.tokens_in, e.tokens_out) for e in session.trace)
        for got, want in zip(same, base, strict=True):
            assert relative_error(got, want) < 1e-6
            assert placement == "mid" or torch.equal(got, want)


@pytest.mark.parametrize("name", JOINED)
def test_a_method_sees_the_mean_keys_of_groups(models, name):
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    attention = model.get_submodule(family.tower)[1].get_submodule(family.attention or "self_attn")
    shown = []
    fused = hasattr(attention, "qkv")
    source = attention.qkv if fused else getattr(attention, "k_norm", None) or attention.k_proj
    hook = source.register_forward_hook(lambda _module, _args, y: shown.append(y.detach()))
    features(model, inputs)
    hook.remove()
    keys = shown[0].chunk(3, -1)[1][None] if fused else shown[0][:, family.prefix :]
    keys = keys.unflatten(-1, (2, -1)).mean(-2)  # 2 heads
    seen = []

    class Spy(saint.SaintFullGraph):
        def select(self, candidates):
            seen.append(candidates)

    with saint.pruned(model, saint.Plan(vision=saint.Stage(Spy(keep=1.0), layers=[1]))):
        features(model, inputs)
    given = seen[0]
    if fused:
        flat = keys[0].unflatten(0, (-1, family.merge_size**2)).mean(1)
        order = Oracle(family, model, [], inputs).in_sequence(torch.arange(len(flat)))[:: family.merge_size**2]
        expected = torch.empty_like(flat)
        expected[order] = flat  # back to the order of the language model
        got = torch.cat([rows[:n] for rows, n in zip(given.keys, given.tokens.lengths, strict=True)])
    else:
        expected = keys[:, members(family, keys.shape[1] // family.merge_size**2)].mean(2)
        got = given.keys
    assert given.tokens.lengths == given.tokens.total
    assert torch.allclose(got, expected, atol=1e-6)
    assert given.features.shape[:2] == given.keys.shape[:2]
    assert given.features.shape[2] == 32


@pytest.mark.parametrize("name", JOINED)
def test_an_image_does_not_depend_on_its_batch_mates(models, name):
    family, model, _ = models(name)
    together = prompts(family, model, [[3, "0", 2], [2, "1", 4], [5, "0", 2]])
    plan = voting(model, together)
    with saint.pruned(model, plan) as session:
        rows = features(model, together)[0]
        trace = session.trace
        start = first = 0
        for image, total in enumerate(trace[0].tokens_in.tolist()):
            alone = dict(pictures(together))
            if name in PACKED:
                grid = alone["image_grid_thw"][image : image + 1]
                count = int(grid.prod())
                alone = {"pixel_values": alone["pixel_values"][first : first + count], "image_grid_thw": grid}
                first += count
            else:
                alone = {"pixel_values": alone["pixel_values"][image : image + 1]}
            single = features(model, alone)[0]
            for entry, other in zip(trace, session.trace, strict=True):
                assert torch.equal(entry.kept[image], other.kept[0])
            assert torch.allclose(single, rows[start : start + total], rtol=1e-4, atol=1e-5, equal_nan=True)
            start += total


@pytest.mark.parametrize("name", JOINED)
def test_gradients_are_finite_and_those_of_the_kept(models, name):
    """A forward that records gradients gives the same logits, and holes do not reach the weights."""
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    plan = voting(model, inputs)
    with saint.pruned(model, plan):
        with torch.no_grad():
            expected = model(**inputs).logits
        model.zero_grad()
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert torch.equal(out.logits, expected)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert any("visual" in n or "vision" in n or "projector" in n or "connector" in n for n in gradients)


# -- families with a turn of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_padded_images(models, name):
    """Padding of an image is a candidate as well: unpruned, the language model receives it."""
    family, model, twin = models(name)
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
    inputs["pixel_attention_mask"] = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    inputs["pixel_attention_mask"][1, :, 12:] = False
    inputs["pixel_attention_mask"][1, :, :, 16:] = False
    for plan in (saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.7), layers=[1])), voting(model, inputs)):
        with saint.pruned(model, plan) as session, torch.no_grad():
            actual = model(**inputs).logits
            trace = session.trace
        assert trace[0].tokens_in.tolist() == [9, 9]
        oracle = Oracle(family, twin, trace, inputs)
        here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
        assert relative_error(actual[here], oracle().logits[here]) < 1e-4


@pytest.mark.parametrize("layer", [-2, 3])
def test_internvl_with_features_of_an_earlier_layer(layer):
    family = FAMILIES["internvl"]
    model = family.build()
    model.config.vision_feature_layer = layer
    twin = oracle_model(model)
    inputs = prompts(family, model, SAMPLES)
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.7), layers=[2]))
    with saint.pruned(model, plan) as session, torch.no_grad():
        actual = model(**inputs).logits
        trace = session.trace
    oracle = Oracle(family, twin, trace, inputs)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert relative_error(actual[here], oracle().logits[here]) < 1e-4
    with pytest.raises(ValueError, match="behind the features"):
        saint.apply(model, saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.7), layers=[3])))
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(saint.UnsupportedModelError, match="several layers"):
        saint.apply(model, plan)


@pytest.mark.parametrize("name", ["llava-llama", "llava-mistral", "llava-qwen2", "llava-next"])
def test_a_list_of_one_feature_layer_is_one_layer(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, SAMPLES)
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.7), layers=[1]))

    def run(layer):
        model.config.vision_feature_layer = layer
        with saint.pruned(model, plan) as session, torch.no_grad():
            logits = model(**inputs).logits
        return logits, session.trace

    want, trace = run(-2)
    assert bool((trace[0].tokens_out < trace[0].tokens_in).all())
    got, same = run([-2])
    assert torch.equal(got, want)
    assert torch.equal(same[0].kept[0], trace[0].kept[0])
    model.config.vision_feature_layer = [-3, -2]
    with pytest.raises(saint.UnsupportedModelError, match="several layers"):
        saint.apply(model, plan)


@pytest.mark.parametrize("name", PACKED)
def test_frames_of_a_video_are_samples(models, name):
    family, model, twin = models(name)
    g = torch.Generator().manual_seed(0)
    grid = torch.tensor([[2, 8, 8], [1, 4, 8]])
    inputs = {"pixel_values_videos": torch.randn(160, 96, generator=g), "video_grid_thw": grid}
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    with saint.pruned(model, plan) as session, torch.no_grad():
        actual = torch.cat(model.get_video_features(**inputs, return_dict=True).pooler_output)
        trace = session.trace
    assert trace[0].tokens_in.tolist() == [16, 16, 8]
    assert trace[0].tokens_out.tolist() == [8, 8, 4]
    images = {"pixel_values": inputs["pixel_values_videos"], "image_grid_thw": grid, "input_ids": torch.zeros(1, 1)}
    oracle = Oracle(family, twin, trace, images)
    with ExitStack() as stack, torch.no_grad():
        oracle.hide_in_tower(stack)
        expected = torch.cat(twin.get_video_features(**inputs, return_dict=True).pooler_output)
    gone = torch.cat(oracle.lost(trace[0]))
    assert torch.equal(is_dropped(actual), gone)
    assert relative_error(actual[~gone], expected[~gone]) < 1e-5


@pytest.mark.parametrize("name", PACKED)
def test_images_and_videos_in_one_prompt(models, name):
    family, model, _ = models(name)
    inputs = prompts(family, model, [[3, "1", 4]])
    g = torch.Generator().manual_seed(1)
    video = {"pixel_values_videos": torch.randn(64, 96, generator=g), "video_grid_thw": torch.tensor([[1, 8, 8]])}
    more = torch.tensor([[VIDEO] * 16 + [7, 8]])
    kinds = torch.tensor([[2] * 16 + [0, 0]])
    both = {
        **inputs, **video, "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 18, dtype=torch.long),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], kinds], 1),
    }  # fmt: skip
    plan = saint.Plan(
        vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]), connector=saint.SaintFullGraph(keep=1.0)
    )
    with saint.pruned(model, plan) as session, torch.no_grad():
        logits = model(**both).logits
        assert session.trace[-1].tokens_in.tolist() == [16]  # half of 16 + 16 came through the tower
        image = model(**inputs).logits
    before = inputs["input_ids"].shape[1]
    assert torch.isfinite(logits).all()
    assert relative_error(logits[:, :before], image) < 1e-4  # causal: the video comes later


@pytest.mark.parametrize("name", PACKED)
def test_longest_segment_for_flash_attention(models, name):
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    told = []

    def listen(_module, _args, kwargs):
        ends = kwargs["cu_seqlens"]
        told.append((kwargs["max_seqlen"], int(ends.diff().max()), int(ends[-1]), int(ends.diff().min())))

    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    attention = model.get_submodule(family.tower)[2].attn  # in Qwen2.5-VL one of the whole image
    with saint.pruned(model, plan), torch.no_grad():
        hook = attention.register_forward_pre_hook(listen, with_kwargs=True)
        model.get_image_features(**pictures(inputs), return_dict=True, max_seqlen=96)
        hook.remove()
    assert told == [(48, 48, 112, 32)]  # 24, 16 and 16 groups of 4, halved


# -- what must be noticed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "internvl"])
def test_wrong_groups_are_an_error(models, name, monkeypatch):
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    real = encoder_inputs.squares

    def shifted(*args):
        state = real(*args)
        places = state.places.roll(1, -1).flatten(1).roll(1, 1).view_as(state.places)
        return dataclasses.replace(state, places=places)

    monkeypatch.setattr(encoder_inputs, "squares", shifted)
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    with (
        saint.pruned(model, plan),
        torch.no_grad(),
        pytest.raises((ValueError, saint.ParityError), match="joins (patches of different|other patches)"),
    ):
        model(**inputs)


def test_a_merger_that_hides_holes_is_an_error(models):
    family, model, _ = models("gemma3")
    inputs = prompts(family, model, SAMPLES)
    norm = model.model.multi_modal_projector.mm_soft_emb_norm
    hook = norm.register_forward_hook(lambda _module, _args, y: y.nan_to_num())
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    try:
        with saint.pruned(model, plan), torch.no_grad(), pytest.raises(saint.ParityError, match="groups of 2 x 2"):
            model(**inputs)
    finally:
        hook.remove()


def test_a_grid_that_is_not_square(models):
    _, model, _ = models("internvl")
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    with saint.pruned(model, plan), torch.no_grad(), pytest.raises(ValueError, match="must be square"):
        model.model.get_image_features(torch.randn(1, 3, 24, 32))


def test_an_unknown_window_order_is_refused():
    model = FAMILIES["qwen2.5-vl"].build()
    cls = type("Other", (type(model.model.visual),), {})
    model.model.visual.__class__ = cls
    name = find(model)[2].tower_spec.order.of(cls)
    method = getattr(cls, name)
    parent = cls.__mro__[1]
    delattr(parent, name)
    try:
        with pytest.raises(saint.UnsupportedModelError, match="order of its windows"):
            saint.apply(model, saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1])))
    finally:
        setattr(parent, name, method)


def test_a_changed_block_is_refused():
    model = FAMILIES["qwen2-vl"].build()
    block = model.model.visual.blocks[1]
    block.forward = lambda x, *args, **kwargs: type(block).forward(block, x, *args, **kwargs) * 1.01
    plan = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.5), layers=[1]))
    with pytest.raises(saint.ParityError, match="post"):
        saint.apply(model, plan)


def test_merging_methods_are_refused(models):
    _, model, _ = models(JOINED[0])
    plan = saint.Plan(vision=saint.Stage(saint.methods.ToMe(r=1), layers=[0]))
    with pytest.raises(saint.UnsupportedModelError, match="ToMe merges patches of different squares"):
        saint.apply(model, plan)
    assert saint.status(model) is None


def test_a_method_that_names_its_own_layers_leaves_out_those_behind_the_features():
    model = FAMILIES["llava-llama"].build()
    depth = model.config.vision_config.num_hidden_layers
    with saint.pruned(model, saint.Plan(vision=saint.methods.ToMe(r=1))) as session:  # by itself in every layer
        model(**prompts(FAMILIES["llava-llama"], model, [[3, "0", 4]]))
        assert [entry.layer for entry in session.trace] == list(range(depth - 1))
    with pytest.raises(ValueError, match="lies behind the features"):
        saint.apply(model, saint.Plan(vision=saint.Stage(saint.methods.ToMe(r=1), layers=[depth - 1])))


@pytest.mark.parametrize("name", JOINED)
def test_where_a_look_at_a_tensor_waits_mergers_are_proved_once(models, name, monkeypatch):
    """On a device groups are trusted behind the first forward, and features are the same."""
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    plan = voting(model, inputs)
    with saint.pruned(model, plan):
        want = features(model, inputs)
    looks = []
    monkeypatch.setattr(vlm_model, "reads_are_free", lambda device: False)
    with saint.pruned(model, plan):
        isnan = torch.isnan
        for _ in range(2):
            monkeypatch.setattr(torch, "isnan", lambda x: looks.append(1) or isnan(x))
            got = features(model, inputs)
            monkeypatch.setattr(torch, "isnan", isnan)
            looks.append(0)
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, want, strict=True))
    first = looks.index(0)
    assert first > 0
    assert looks[first:] == [0, 0]


@pytest.mark.parametrize("name", PACKED)
def test_a_merger_that_joins_other_patches_is_refused(models, name):
    family, model, _ = models(name)
    inputs = prompts(family, model, SAMPLES)
    plan = voting(model, inputs)
    norm = next(model.model.visual.merger.children())
    shift = norm.register_forward_hook(lambda _m, _a, y: y.roll(1, 0))
    try:
        with (
            saint.pruned(model, plan),
            torch.no_grad(),
            pytest.raises((ValueError, ParityError), match="joins (other )?patches"),
        ):
            model(**inputs)
    finally:
        shift.remove()
