"""One forward, one state: threads, interleaved forwards, checkpointing, freed models, what leaves a model."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import saint
from saint import testing
from saint.gathers import is_dropped
from saint.methods import FastV, ToMe
from saint.plans import Plan, Stage
from support.families import FAMILIES, cache_of, cached, checkpoint, prompts
from support.models import build
from support.plans import LANGUAGE, VISION

HYBRID = Plan(vision=VISION, language=LANGUAGE)
PLANS = {
    "votes": saint.Saint(threshold=0.5, neighbors=2, center=True),
    "post": Stage(saint.Saint(threshold=0.5, neighbors=2, center=True), placement="post"),
    "merged": ToMe(r=4),
    "full-graph": Stage(saint.SaintFullGraph(keep=20), layers=[1, 2], output="similar"),
}
ENCODERS = ["timm/vit-augreg", "timm/eva02", "transformers/clip", "transformers/dinov2", "open_clip/vit"]


def output_of(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def views(model):
    """Two batches of pictures that lose different numbers of tokens."""
    (name, images), *_ = testing.example_inputs(model, batch=3).items()
    other = testing.example_inputs(model, batch=3, seed=5)[name].flip(0)
    return {name: images}, {name: other}


def enable_checkpointing(model) -> None:
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing()
            return
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = True
            return
    checkpoint(model)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got, want) -> bool:
    assert len(got) == len(want) > 0
    return all(torch.allclose(got[n], want[n], rtol=1e-4, atol=1e-6 * float(1 + want[n].abs().max())) for n in want)


# -- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_another_forward_before_backward(name, plan):
    """With checkpointing, layers are run again in the backward pass: each with the tokens of its own forward."""
    model = build(name).train()
    first, second = views(model)
    try:
        saint.apply(model, plan).remove()
    except saint.UnsupportedModelError as error:
        pytest.skip(str(error))  # attention without a mask cannot weigh merged tokens

    def one():
        loss = output_of(model, first).square().sum()
        with torch.no_grad():
            output_of(model, second)
        output_of(model, second)
        return loss

    def two_views():
        a, b = output_of(model, first), output_of(model, second)
        return a.square().sum() + b.square().sum().sqrt()

    with saint.pruned(model, plan):
        want = [gradients(model, loss) for loss in (one, two_views)]
        enable_checkpointing(model)
        got = [gradients(model, loss) for loss in (one, two_views)]
    assert same(got[0], want[0])
    assert same(got[1], want[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_encoder_as_one_segment(reentrant):
    model = build("timm/vit-augreg").train()
    first, second = (next(iter(v.values())).requires_grad_() for v in views(model))

    def loss(run):
        return lambda: run(first).square().sum() + run(second).square().sum().sqrt()

    with saint.pruned(model, PLANS["votes"]):
        want = gradients(model, loss(model))
        got = gradients(model, loss(lambda x: torch_checkpoint(model, x, use_reentrant=reentrant)))
    assert same(got, want)


@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl", "gemma3"])
def test_another_prompt_before_backward(name):
    family = FAMILIES[name]
    model = family.build().train()
    first = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
    second = prompts(family, model, [[2, "0", 9], [5, "0", 3]], seed=7)
    plan = HYBRID if name != "qwen2.5-vl" else Plan(vision=VISION, language=LANGUAGE)

    def loss():
        parts = [model(**i, labels=i["input_ids"], use_cache=False).loss for i in (first, second)]
        return parts[0] + 2 * parts[1]

    with saint.pruned(model, plan):
        want = gradients(model, loss)
        checkpoint(model)
        got = gradients(model, loss)
    assert same(got, want)


def test_halves_of_a_block_are_checkpointed_too():
    """transformers checkpoints inside the forward that a split block does not run."""
    model = build("transformers/clip").train()
    layer = model.vision_model.encoder.layers[0] if hasattr(model, "vision_model") else model.encoder.layers[0]
    calls = []
    inputs, _ = views(model)
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # a recomputation stops inside
    with saint.pruned(model, Stage(saint.Saint(keep=20), layers=[0, 1])):
        calls.clear()
        output_of(model, inputs).sum().backward()
        assert len(calls) == 1
        checkpoint(model)
        output_of(model, inputs).sum().backward()
    assert len(calls) == 3  # once, and again for its gradients


def test_packed_saved_tensors_are_refused():
    model = build("timm/vit-augreg").train()
    model.set_grad_checkpointing()
    inputs, _ = views(model)
    with saint.pruned(model, PLANS["votes"]):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            loss = output_of(model, inputs).sum()
        with pytest.raises(
            RuntimeError,
            match="of VisionTransformer is run again .*switch gradient checkpointing off",
        ):
            loss.backward()


# -- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/siglip2", "open_clip/vit"])
def test_threads_share_a_patched_encoder(name):
    model = build(name)
    batches = [testing.example_inputs(model, batch=2, seed=seed) for seed in range(5)]
    barrier = threading.Barrier(10)

    def work(index):
        barrier.wait()
        results = []
        for turn in range(50):
            with torch.no_grad():
                out = output_of(model, batches[(index + turn) % 5])
            results.append(((index + turn) % 5, out, [entry.tokens_out.tolist() for entry in session.trace]))
        return results

    with saint.pruned(model, PLANS["votes"]) as session, torch.no_grad():
        want = []
        for batch in batches:
            want.append((output_of(model, batch), [entry.tokens_out.tolist() for entry in session.trace]))
        with ThreadPoolExecutor(10) as pool:
            for results in pool.map(work, range(10)):
                for index, out, counts in results:
                    assert counts == want[index][1]
                    assert torch.equal(out, want[index][0])
    assert len({str(counts) for _, counts in want}) > 1


@pytest.mark.parametrize("plan", [HYBRID, Plan(language=Stage(FastV(keep=0.5), layers=[1]))], ids=["hybrid", "fastv"])
def test_threads_share_a_patched_language_model(plan):
    family = FAMILIES["llava-llama"]
    model = family.build()
    batches = [prompts(family, model, [[4 + seed, "0", 7]], seed=seed) for seed in range(3)]
    barrier = threading.Barrier(6)

    def work(index):
        barrier.wait()
        out = []
        for turn in range(4):
            which = (index + turn) % 3
            with torch.no_grad():
                new = model.generate(**batches[which], max_new_tokens=4, do_sample=False)
            out.append((which, new, [entry.kept[0].tolist() for entry in session.trace]))
        return out

    with saint.pruned(model, plan) as session:
        want = []
        for batch in batches:
            new = model.generate(**batch, max_new_tokens=4, do_sample=False)
            want.append((new, [entry.kept[0].tolist() for entry in session.trace]))
        with ThreadPoolExecutor(6) as pool:
            for results in pool.map(work, range(6)):
                for which, new, kept in results:
                    assert torch.equal(new, want[which][0])
                    assert kept == want[which][1]


def test_the_trace_of_a_worker_can_be_read_outside():
    model = build("timm/vit-augreg")
    inputs, _ = views(model)
    with saint.pruned(model, saint.Saint(keep=20)) as session:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, *inputs.values()).result()
        assert session.trace[-1].tokens_out.tolist() == [20] * 3


def test_half_a_forward_on_another_thread_is_refused():
    model = build("timm/vit-augreg")
    with saint.pruned(model, saint.Saint(keep=20)):
        x = torch.randn(2, 37, 48)
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="layers before it did not"):
            pool.submit(model.blocks[1], x).result()


def test_replicas_are_refused():
    model = build("timm/vit-augreg")
    before = testing.snapshot(model)
    with saint.pruned(model, saint.Saint(keep=20)):
        for module in (model, model.blocks[0]):
            with pytest.raises(RuntimeError, match="DataParallel.*DistributedDataParallel"):
                module._replicate_for_data_parallel()
    assert testing.snapshot(model) == before
    model.blocks[0]._replicate_for_data_parallel()


def test_tracing_is_refused():
    model = build("timm/vit-augreg")
    inputs, _ = views(model)
    with saint.pruned(model, PLANS["votes"]), pytest.raises(RuntimeError, match=r"torch\.jit\.trace .*torch\.export"):
        torch.jit.trace(model, tuple(inputs.values()), check_trace=False)


# -- freed models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [saint.Saint(keep=20), Plan()], ids=["pruned", "empty"])
@pytest.mark.parametrize("ran", [False, True])
def test_a_forgotten_encoder_is_freed(plan, ran):
    model = build("timm/vit-augreg")
    alive = weakref.ref(model)
    session = saint.apply(model, plan)
    if ran:
        model(torch.randn(2, 3, 96, 96)).sum().backward()
    del session
    gc.collect()
    if plan != Plan():
        assert saint.status(model) is not None  # the model keeps its session
    del model
    gc.collect()
    assert alive() is None


def test_a_forgotten_language_model_is_freed():
    family = FAMILIES["llava-llama"]
    model = family.build()
    alive = weakref.ref(model)
    session = saint.apply(model, HYBRID)
    with torch.no_grad():
        model(**prompts(family, model, [[4, "0", 7]]))
    del model, session
    gc.collect()
    assert alive() is None


# -- what leaves a model ------------------------------------------------------------------------------------------------------


def everything(value, path=""):
    yield from testing.tensors(value, path)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tower])
def test_nothing_that_leaves_holds_nan(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
    pixels = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image_"))}
    with saint.pruned(model, HYBRID) as session, torch.no_grad():
        features = model.get_image_features(**pixels, return_dict=True, output_hidden_states=True)
        out = model(**inputs, output_hidden_states=True)
        trace = session.trace
        step = model(input_ids=torch.tensor([[7], [8]]), **cached(model, cache_of(out)))
    lost = int((trace[0].tokens_in - trace[0].tokens_out).sum())
    assert lost > 0
    rows = torch.cat([part.flatten(0, -2) for part in features.pooler_output])
    assert int(is_dropped(rows).sum()) == lost  # a row of one small number in every channel
    for value in (features, out, step):
        for path, tensor in everything(value):
            assert torch.isfinite(tensor).all(), path


def test_marked_rows_survive_what_models_do():
    row = torch.full((2, 3, 8), 2.0**-10)
    row[0, 1] = torch.randn(8)
    for change in (lambda x: x, lambda x: x / 64, lambda x: x.half(), lambda x: (x / 8).bfloat16(), lambda x: x * 55.4):
        assert is_dropped(change(row)).tolist() == [[True, False, True], [True, True, True]]
    assert not is_dropped(torch.zeros(3, 8)).any()
