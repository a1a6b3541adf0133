"""The session as an object: context manager, switching off, what it says of itself."""

import contextlib
import copy
import dataclasses
import gc
import re
import threading
import types
import weakref

import pytest
import torch
import transformers as hf
from PIL import Image

import saint
from saint import testing
from saint.flops import count_flops
from saint.methods import Random
from saint.plans import Plan, Stage
from saint.vision.locate import locate
from support.families import FAMILIES, cache_of, cached, prompts
from support.models import build, snapshot
from support.plans import CONNECTOR, HALF, HYBRID, LANGUAGE, VISION

LLAVA = FAMILIES["llava-llama"]
BATCH = [[4, "0", 7], [3, "0", 2]]


@pytest.fixture
def vit():
    return build("timm/vit-augreg")


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llava():
    model = LLAVA.build()
    with torch.no_grad():  # transformers installs its own output hooks at the first forward
        model(**prompts(LLAVA, model, BATCH), output_hidden_states=True)
    return model


# -- a block ------------------------------------------------------------------------------------------------------------


def test_a_session_is_removed_at_the_end_of_its_block(vit, images):
    before = snapshot(vit)
    with torch.no_grad():
        base = vit(images)
        with saint.apply(vit, HALF) as session:
            assert not torch.equal(vit(images), base)
            assert saint.status(vit) is not None
        assert snapshot(vit) == before
        assert torch.equal(vit(images), base)
        with pytest.raises(ZeroDivisionError), saint.apply(vit, HALF):
            _ = 1 / 0
        assert snapshot(vit) == before
    with pytest.raises(RuntimeError, match="has been removed; saint.apply"), session:
        pass


def test_a_session_may_be_removed_inside_its_block(vit):
    before = snapshot(vit)
    with saint.apply(vit, HALF) as session:
        session.remove()
        assert snapshot(vit) == before
        with saint.apply(vit, HALF):
            session.remove()  # leaves the later session alone
            assert saint.status(vit) is not None
    assert snapshot(vit) == before


# -- what stays of a forward ---------------------------------------------------------------------------------------------


def told(session, features):
    """All that a session says of its last forward."""
    trace = [
        (e.stage, e.layer, e.placement, e.tokens_in.tolist(), [kept.tolist() for kept in e.kept]) for e in session.trace
    ]
    full = [session.expand(features), session.expand(features[:, 1:], 2)]
    return trace, session.summary(), session.kv_memory, session.status, full


def same(one, other):
    return one[:4] == other[:4] and all(torch.equal(a, b) for a, b in zip(one[4], other[4], strict=True))


def leave_the_block(vit, forward):
    with saint.apply(vit, HALF) as session:
        inside = forward(session)
    return session, inside


def leave_pruned(vit, forward):
    with saint.pruned(vit, HALF) as session:
        inside = forward(session)
    return session, inside


def leave_by_an_exception(vit, forward):
    with contextlib.suppress(ZeroDivisionError), saint.apply(vit, HALF) as session:
        inside = forward(session)
        _ = 1 / 0
    return session, inside


def remove_the_session(vit, forward):
    session = saint.apply(vit, HALF)
    inside = forward(session)
    session.remove()
    session.remove()
    return session, inside


def remove_from_the_model(vit, forward):
    session = saint.apply(vit, HALF)
    inside = forward(session)
    saint.remove(vit)
    return session, inside


def remove_while_disabled(vit, forward):
    session = saint.apply(vit, HALF)
    inside = forward(session)
    with session.disabled():
        session.remove()
    return session, inside


def disable_and_leave(vit, forward):
    with saint.apply(vit, HALF) as session:
        inside = forward(session)
        with session.disabled():
            vit(torch.randn(3, 3, 96, 96))  # no forward of the session
    return session, inside


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_block,
        leave_pruned,
        leave_by_an_exception,
        remove_the_session,
        remove_from_the_model,
        remove_while_disabled,
        disable_and_leave,
    ],
)
def test_the_last_forward_can_be_read_when_the_session_is_over(vit, images, leave):
    features = torch.randn(2, 1 + 18, 5)

    def forward(session):
        vit(torch.randn(3, 3, 96, 96))  # another one before
        vit(images)
        return told(session, features)

    with torch.no_grad():
        session, inside = leave(vit, forward)
        assert saint.status(vit) is None
        assert same(told(session, features), inside)
        with saint.apply(vit, Stage(saint.Saint(keep=0.8), layers=[0])) as later:
            vit(images[:1])  # leaves the first session's alone
        assert same(told(session, features), inside)
    assert len(later.trace) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_can_be_read_when_the_session_is_over(family):
    """In generate, whose steps leave the prompt's; with the cache's bytes."""
    family = FAMILIES[family]
    model = family.build()
    plan = Plan(vision=None if family.tower is None else VISION, connector=CONNECTOR, language=LANGUAGE)
    with saint.apply(model, plan) as session, torch.no_grad():
        model.generate(**prompts(family, model, BATCH), max_new_tokens=3, do_sample=False)
        trace, summary, memory = session.trace, session.summary(), session.kv_memory
    assert {entry.stage for entry in session.trace} == set(plan.slots)
    for left, inside in zip(session.trace, trace, strict=True):
        assert [kept.tolist() for kept in left.kept] == [kept.tolist() for kept in inside.kept]
    assert session.summary() == summary
    assert session.kv_memory == memory
    assert memory is not None


def test_a_session_that_is_over_holds_neither_model_nor_activations(images):
    """Token maps alone: whole numbers and truths."""
    vit = build("timm/vit-augreg")
    with saint.apply(vit, Stage(saint.methods.ToMe(r=4), output="carried")) as session, torch.no_grad():
        vit(images)
    alive = weakref.ref(vit)
    del vit
    gc.collect()
    assert alive() is None
    tensors = [found for found in reachable(session) if isinstance(found, torch.Tensor)]
    assert tensors
    assert not any(found.is_floating_point() for found in tensors)


def reachable(root):
    """Objects of the session's own that it holds, without classes and modules of Python."""
    seen, queue = {}, [root]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(one)] = one
        queue += gc.get_referents(one)
    return list(seen.values())


def test_maps_that_need_rows_of_the_forward_are_refused_when_it_is_over(vit, images):
    with saint.apply(vit, dataclasses.replace(HALF, output="carried")) as session, torch.no_grad():
        vit(images)
        assert session.expand(torch.randn(2, 1 + 26, 48), 1).shape == (2, 37, 48)
    with pytest.raises(RuntimeError, match="inside the with block, before remove"):
        session.expand(torch.randn(2, 1 + 26, 48), 1)
    assert session.expand(torch.randn(2, 37, 48), 0).shape == (2, 37, 48)  # in front of every drop point


def test_a_session_that_saw_no_forward_says_so_when_it_is_over(vit):
    with saint.apply(vit, HALF) as session:
        pass
    assert session.trace == []
    assert session.kv_memory is None
    for ask in (session.summary, lambda: session.expand(torch.randn(2, 19, 5))):
        with pytest.raises(RuntimeError, match="run the model first"):
            ask()


# -- disabled -----------------------------------------------------------------------------------------------------------


def test_disabled_is_the_clean_model_and_then_pruned_again(vit, images):
    before = snapshot(vit)
    with torch.no_grad():
        base = vit(images)
        session = saint.apply(vit, HALF)
        patched = snapshot(vit)
        pruned = vit(images)
        trace, summary = session.trace, str(session.summary())
        for _ in range(2):
            with session.disabled():
                assert torch.equal(vit(images), base)
                inside = {name: (t, [k for k in keys if k not in ("_saint_session", "__reduce_ex__")], *n)
                          for name, (t, keys, *n) in snapshot(vit).items()}  # fmt: skip
                assert inside == before
                assert saint.status(vit).plan == session.plan
                with pytest.raises(saint.AlreadyAppliedError):
                    saint.apply(vit, HALF)
                assert torch.equal(session.trace[-1].kept[0], trace[-1].kept[0])
            assert snapshot(vit) == patched
            assert str(session.summary()) == summary  # of the pruned forward, still
            features = torch.randn(2, 1 + 18, 5)
            assert session.expand(features, 4).shape == (2, 37, 5)
            assert torch.equal(vit(images), pruned)
        session.remove()
        assert snapshot(vit) == before
        assert torch.equal(session.trace[-1].kept[0], trace[-1].kept[0])


def test_disabled_nests_and_survives_exceptions(vit, images):
    with torch.no_grad():
        base = vit(images)
        with saint.apply(vit, HALF) as session:
            pruned = vit(images)
            with session.disabled():
                with session.disabled():
                    assert torch.equal(vit(images), base)
                assert torch.equal(vit(images), base)
            assert torch.equal(vit(images), pruned)
            with pytest.raises(ZeroDivisionError), session.disabled(), session.disabled():
                _ = 1 / 0
            assert torch.equal(vit(images), pruned)


def test_removed_while_disabled_stays_removed(vit, images):
    before = snapshot(vit)
    with torch.no_grad():
        base = vit(images)
        session = saint.apply(vit, HALF)
        vit(images)
        with session.disabled():
            saint.remove(vit)
            assert snapshot(vit) == before
        assert snapshot(vit) == before
        assert [entry.tokens_out.tolist() for entry in session.trace] == [[26, 26], [18, 18]]
        assert torch.equal(vit(images), base)
    with pytest.raises(RuntimeError, match="removed, so the model runs unpruned already"), session.disabled():
        pass


def test_patches_that_cannot_be_put_on_again_leave_a_clean_model(vit, monkeypatch):
    before = snapshot(vit)
    session = saint.apply(vit, HALF)
    with pytest.raises(ZeroDivisionError), session.disabled():
        monkeypatch.setattr(session._stacks[0].outputs, "_dense_call", lambda _: 1 / 0)
    assert snapshot(vit) == before
    assert saint.status(vit) is None


def test_disabled_holds_for_every_thread(vit, images):
    got = []
    with torch.no_grad(), saint.apply(vit, HALF) as session:
        pruned = vit(images)
        with session.disabled():
            base = vit(images)
            thread = threading.Thread(target=lambda: got.append(vit(images).detach()))
            thread.start()
            thread.join()
        assert not torch.equal(base, pruned)
        assert torch.equal(got[0], base)


def test_disabled_is_seen_by_a_compiled_model(vit, images):
    with torch.no_grad():
        base = vit(images)
        with saint.apply(vit, HALF) as session:
            pruned, compiled = vit(images), torch.compile(vit, backend="eager")
            assert torch.allclose(compiled(images), pruned, atol=1e-5)
            with session.disabled():
                assert torch.allclose(compiled(images), base, atol=1e-5)
            assert torch.allclose(compiled(images), pruned, atol=1e-5)
    assert not torch.allclose(base, pruned, atol=1e-3)


def test_disabled_does_nothing_to_an_empty_plan(vit, images):
    with saint.apply(vit, Plan()) as session, session.disabled(), torch.no_grad():
        vit(images)
        assert saint.status(vit).stages == {}


@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl", "gemma3"])
def test_disabled_generates_as_the_clean_model(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, BATCH)
    call = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        base, logits = model.generate(**inputs, **call), model(**inputs).logits
        with saint.apply(model, HYBRID) as session:
            pruned = model.generate(**inputs, **call)
            memory, trace = session.kv_memory, session.trace
            with session.disabled():
                clean = model.generate(**inputs, **call)
                assert torch.equal(clean.sequences, base.sequences)
                assert all(torch.equal(a, b) for a, b in zip(clean.logits, base.logits, strict=True))
                assert torch.equal(model(**inputs).logits, logits)
                assert session.kv_memory == memory
            assert [(e.stage, e.layer) for e in session.trace] == [(e.stage, e.layer) for e in trace]
            again = model.generate(**inputs, **call)
            assert all(torch.equal(a, b) for a, b in zip(again.logits, pruned.logits, strict=True))
            assert not torch.equal(again.logits[0], clean.logits[0])


def test_a_cache_of_the_plan_is_refused_while_disabled_and_goes_on_behind(llava):
    inputs, step = prompts(LLAVA, llava, BATCH), torch.tensor([[5], [6]])
    with torch.no_grad(), saint.apply(llava, HYBRID) as session:
        cache = cache_of(llava(**inputs))
        expected = llava(step, **cached(llava, copy.deepcopy(cache))).logits
        with session.disabled(), pytest.raises(ValueError, match="filled under a plan"):
            llava(step, **cached(llava, cache))
        assert torch.equal(llava(step, **cached(llava, cache)).logits, expected)


# -- what it says -------------------------------------------------------------------------------------------------------


def test_a_session_prints_what_is_applied(vit, llava):
    session = saint.apply(vit, Stage(saint.Saint(threshold=0.6, center=True), layers=range(1, 4)))
    told = "VisionTransformer\n  vision: Saint(threshold=0.6, center=True) at layers 1..3 (mid)>"
    assert repr(session) == f"<Session: applied on {told}"
    with session.disabled():
        assert repr(session) == f"<Session: disabled on {told}"
    session.remove()
    assert repr(session) == "<Session: removed on VisionTransformer>"
    with saint.apply(vit, Plan()) as session:
        assert repr(session) == "<Session: applied on VisionTransformer, empty plan>"
    with saint.apply(llava, HYBRID) as session:
        lines = repr(session).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["vision", "connector", "language"]
        assert lines[1].endswith("in model.vision_tower")
        assert "at layers 1, 2 (post), in model.language_model" in lines[3]


def test_summary_of_an_encoder(vit, images):
    with saint.apply(vit, HALF) as session, torch.no_grad():
        with pytest.raises(RuntimeError, match="run the model first"):
            session.summary()
        vit(images)
        summary = session.summary()
    assert [(d.stage, d.layer, d.tokens_in.mean, d.tokens_out.most) for d in summary.drops] == [
        ("vision", 0, 36, 26), ("vision", 1, 26, 18),
    ]  # fmt: skip
    assert summary.layers == {"vision": (36, 26, 18, 18)}
    assert (summary.kv_kept, summary.kv_unpruned) == (None, None)
    assert str(summary) == (
        "VisionTransformer: candidates per sample, mean (least..most)\n"
        "  vision 0  36.0 -> 26.0\n"
        "  vision 1  26.0 -> 18.0\n"
        "entering each vision layer: 36 26 18 18\n"
        f"FLOPs left in the blocks of the encoder: {summary.flops_left:.2f}"
    )
    with saint.apply(vit, Plan()) as session, pytest.raises(RuntimeError, match="the plan is empty"):
        session.summary()


def test_summary_of_a_ragged_batch(vit, images):
    with saint.apply(vit, Stage(saint.Saint(threshold=0.6, neighbors=2), layers=[1])) as session, torch.no_grad():
        vit(torch.cat([images, images.new_zeros(1, 3, 96, 96)]))
        (step,), (drop,) = session.trace, session.summary().drops
        text = str(session.summary())
    counts = step.tokens_out.tolist()
    assert len(set(counts)) > 1
    assert (drop.tokens_out.least, drop.tokens_out.most) == (min(counts), max(counts))
    assert drop.tokens_out.mean == pytest.approx(sum(counts) / 3)
    assert f"({min(counts)}..{max(counts)})" in text


# the largest difference there may be: what scoring takes, of which models that hide their keys need most
@pytest.mark.parametrize(
    ("name", "pixels", "scoring"),
    [
        ("timm/vit-augreg", 96, 0.003),
        ("timm/deit3", 96, 0.003),
        ("timm/eva02", 84, 0.003),  # SwiGLU
        ("timm/vit-parallel", 96, 0.003),
        ("transformers/clip", 96, 0.003),
        ("transformers/dinov2-registers", 96, 0.003),
        ("open_clip/vit", 96, 0.02),
    ],
)
@pytest.mark.parametrize("placement", ["input", "mid", "post"])
def test_flops_left_are_those_that_run(name, pixels, scoring, placement):
    model = build(name)
    images = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    blocks = re.compile(rf"\.{locate(model)[2].blocks}\.\d+$")

    def counted():
        with torch.no_grad():
            found = count_flops(lambda: model(images))[1].by_module
        parts = [sum(flops.values()) for key, flops in found.items() if blocks.search(key)]
        assert len(parts) > 1
        return sum(parts)

    whole = counted()
    if placement == "input":
        stage = Stage(Random(keep=0.4), placement=placement)  # nothing is scored
    else:
        stage = Stage(saint.Saint(keep=0.4), layers=[0, 1], placement=placement)
    with saint.apply(model, stage) as session:
        left = counted() / whole
        estimate = session.summary().flops_left
    assert estimate <= left + 1e-9
    assert estimate == pytest.approx(left, abs=scoring)


@pytest.mark.parametrize("name", ["gemma3", "internvl"])
def test_flops_left_of_a_tower_that_joins_patches(name):
    """The trace counts squares of 2 x 2 patches; the blocks run on patches."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4]])
    blocks = re.compile(r"\.vision_tower\..*layers?\.\d+$")

    def counted():
        with torch.no_grad():
            found = count_flops(lambda: model(**inputs))[1].by_module
        parts = [sum(flops.values()) for key, flops in found.items() if blocks.search(key)]
        assert len(parts) > 1
        return sum(parts)

    unpruned = counted()
    stage = Stage(saint.SaintFullGraph(keep=0.5), layers=[0], placement="post")
    with saint.apply(model, Plan(vision=stage)) as session:
        left = counted() / unpruned
        estimate = session.summary().flops_left
    assert estimate < 0.8
    assert estimate == pytest.approx(left, abs=0.003)


@pytest.mark.parametrize("name", ["timm/beit", "timm/vit-parallel-scaling", "timm/relpos"])
def test_flops_that_are_not_known_are_said_to_be_unknown(name, images):
    model = build(name)
    with saint.apply(model, Stage(saint.Saint(keep=0.5), layers=[0])) as session, torch.no_grad():
        model(images)
        assert session.summary().flops_left is None
        assert str(session.summary()).endswith("blocks of the encoder: unknown")


@pytest.mark.parametrize(
    ("shape", "known"), [((), True), ((8,), True), ((1, 8), True), ((4, 8), False), ((2, 1, 4), False)]
)
def test_flops_of_a_matrix_that_no_linear_layer_holds_are_not_known(vit, images, shape, known):
    """A vector scales or shifts; a matrix may be multiplied with the tokens."""
    vit.blocks[1].mlp.register_parameter("extra", torch.nn.Parameter(torch.zeros(shape)))
    with saint.apply(vit, Stage(saint.Saint(keep=0.5), layers=[0])) as session, torch.no_grad():
        vit(images)
        assert (session.summary().flops_left is not None) == known


def test_summary_of_a_vision_language_model(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.apply(llava, HYBRID) as session, torch.no_grad():
        llava.generate(**inputs, max_new_tokens=3, do_sample=False)
        summary, trace, memory = session.summary(), session.trace, session.kv_memory
    assert [(d.stage, d.layer) for d in summary.drops] == [(e.stage, e.layer) for e in trace]
    out = {(e.stage, e.layer): e.tokens_out.double().mean().item() for e in trace}
    behind = out["connector", 0]
    first, second = out["language", 1], out["language", 2]
    assert summary.layers["language"] == (behind, behind, first, second, second)
    assert summary.layers["vision"][:2] == (36.0, 36.0)
    assert (summary.kv_kept, summary.kv_unpruned) == (memory.kept, memory.unpruned)
    assert 0 < summary.flops_left < 1
    assert f"KV cache: {memory.kept:,} of {memory.unpruned:,} bytes" in str(summary)


PLACES = {  # stages of an encoder with 36 candidates and 4 layers: what enters its layers, (stage, layer, place, in, out)
    "input": ([("input", None, 0.5)], [18, 18, 18, 18], [("input", 36, 18)]),
    "mid": ([("mid", [1], 0.5)], [36, 36, 18, 18], [("mid", 36, 18)]),
    "post": ([("post", [1], 0.5)], [36, 36, 18, 18], [("post", 36, 18)]),
    "last": ([("post", [3], 0.5)], [36, 36, 36, 36], [("post", 36, 18)]),
    "input and post": ([("input", None, 27), ("post", [1], 9)], [27, 27, 9, 9], [("input", 36, 27), ("post", 27, 9)]),
    "input and mid": ([("input", None, 27), ("mid", [0], 9)], [27, 9, 9, 9], [("input", 36, 27), ("mid", 27, 9)]),
}


@pytest.mark.parametrize("stages", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/clip"])
def test_summary_of_every_placement(name, stages):
    """Layers, drops and FLOPs; the latter from the formula, with tokens in each half of a block."""
    given, entering, drops = stages
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = [Stage(saint.SaintFullGraph(keep=keep), placement=place, layers=layers) for place, layers, keep in given]
    with saint.apply(model, Plan(vision=plan)) as session, torch.no_grad():
        model(**inputs)
        summary = session.summary()
        prefix = session._stacks[0].prefix
    assert summary.layers == {"vision": tuple(map(float, entering))}
    assert [(d.placement, d.tokens_in.mean, d.tokens_out.mean) for d in summary.drops] == drops
    assert [(d.tokens_in.least, d.tokens_out.most) for d in summary.drops] == [(n, k) for _, n, k in drops]
    _, encoder, spec = locate(model)
    blocks = encoder.get_submodule(spec.blocks)
    behind = [*entering[1:], drops[-1][2]]
    mids = {layers[0] for place, layers, _ in given if place == "mid"}
    left = whole = 0
    for layer, block in enumerate(blocks):
        sizes = {n: m.weight.numel() for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        mlp = sum(size for n, size in sizes.items() if n.startswith("mlp"))
        attention, width = sum(sizes.values()) - mlp, 48
        for inner, outer, into in (
            (entering[layer], behind[layer] if layer in mids else entering[layer], "left"),
            (36, 36, "whole"),
        ):
            n, k = inner + prefix, outer + prefix
            flops = 2 * attention * n + 4 * width * n * n + 2 * mlp * k
            left, whole = (left + flops, whole) if into == "left" else (left, whole + flops)
    assert summary.flops_left == pytest.approx(left / whole, rel=1e-9)


@pytest.mark.parametrize("stage", ["vision", "connector", "language"])
@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "qwen2-vl"])
def test_summary_of_every_stage_alone(name, stage):
    """What enters each layer of each part, from the trace's counts alone."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7]])
    stages = {"vision": VISION, "connector": CONNECTOR, "language": LANGUAGE}
    with saint.apply(model, Plan(**{stage: stages[stage]})) as session, torch.no_grad():
        model(**inputs)
        summary, trace = session.summary(), session.trace
        depth = len(model.get_submodule(family.tower if stage == "vision" else family.decoder))
    assert {entry.stage for entry in trace} == {stage}
    count, want = float(trace[0].tokens_in[0]), []
    if stage == "connector":
        count = float(trace[0].tokens_out[0])
    for layer in range(depth):
        want.append(count)
        out = [entry for entry in trace if entry.layer == layer and stage != "connector"]
        count = float(out[0].tokens_out[0]) if out else count
    assert summary.layers == {"language" if stage == "connector" else stage: tuple(want)}
    memory = session.kv_memory
    assert (summary.kv_kept, summary.kv_unpruned) == (
        (None, None) if memory is None else (memory.kept, memory.unpruned)
    )


def test_summary_without_a_language_stage(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        with saint.apply(llava, Plan(vision=VISION)) as session:
            llava(**inputs)
            assert list(session.summary().layers) == ["vision"]
        with saint.apply(llava, Plan(connector=CONNECTOR)) as session:
            llava(**inputs)
            summary = session.summary()
        assert list(summary.layers) == ["language"]
        assert len(set(summary.layers["language"])) == 1
        assert summary.flops_left is None


# -- what holds a model -------------------------------------------------------------------------------------------------


def test_a_pipeline_is_pruned_through_the_model_it_holds():
    model = build("transformers/vit").vit
    pipe = hf.pipeline(
        "image-feature-extraction", model=model, image_processor=hf.ViTImageProcessor(size={"height": 96, "width": 96})
    )
    image = Image.effect_noise((96, 96), 80).convert("RGB")
    before = snapshot(model)
    base = pipe(image)
    with saint.apply(pipe, HALF) as session:
        assert len(pipe(image)[0]) == 1 + 18
        assert saint.status(pipe) == saint.status(model) == session.status
        with pytest.raises(saint.AlreadyAppliedError):
            saint.apply(model, HALF)
    with saint.pruned(pipe, HALF):
        saint.remove(pipe)
        assert saint.status(pipe) is None
        with pytest.raises(ValueError, match="no plan is applied to this ViTModel"):
            saint.remove(pipe)
    assert snapshot(model) == before
    assert pipe(image) == base


@pytest.mark.parametrize(
    ("thing", "got"),
    [
        (None, "got NoneType$"),
        (5, "got int$"),
        (types.SimpleNamespace(model="vit"), "got SimpleNamespace, whose .model is of type str"),
    ],
)
def test_what_holds_no_model_is_refused(thing, got):
    for call in (lambda: saint.apply(thing, HALF), lambda: saint.remove(thing), lambda: saint.status(thing)):
        with pytest.raises(
            TypeError, match=f"torch.nn.Module is expected, or an object that keeps one in .model.*{got}"
        ):
            call()
    with pytest.raises(TypeError, match=r"in \.model"), saint.pruned(thing, HALF):
        pass


def test_a_module_that_has_a_model_is_itself_the_model(vit):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.other = vit, build("timm/vit-avg")

    with pytest.raises(saint.UnsupportedModelError, match="holds 2 encoders"):
        saint.apply(Wrapper(), HALF)


def test_pruned_is_still_a_block(vit, images):
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(saint.pruned(vit, HALF))
        assert isinstance(session, saint.Session)
    assert saint.status(vit) is None
