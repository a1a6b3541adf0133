"""What the authors' code is known to get wrong, one test per item (the last two of their list are not ours to have).

Measured throughput with the data loader inside: ``saint bench`` takes tensors, ``test_bench.py``. MACs called FLOPs:
``test_bench.py::test_flops_equal_a_count_by_hand``.
"""

import itertools
import re
from pathlib import Path

import pytest
import timm
import torch

import saint
from support.families import FAMILIES, IMAGE, cache_of, cached, prompts
from support.models import build
from support.oracles import relative_error
from support.plans import CONNECTOR, LANGUAGE, VISION, threshold_at

ROOT = Path(__file__).parents[2]
LLAVA = FAMILIES["llava-llama"]
PLAN = saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE)
NOTHING = saint.Plan(
    connector=saint.SaintFullGraph(keep=1.0),
    language=saint.Stage(saint.Saint(threshold=1.0, keep=1.0), layers=[0, 2]),
)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def llava():
    return LLAVA.build()


@pytest.fixture
def images():
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("before", [0, 1, 4, 35])
def test_offset_of_the_image_is_not_off_by_one(llava, before):
    """Theirs: 36 system tokens instead of 35, 376 image tokens instead of 375."""
    parts = [before, "0", 7] if before else ["0", 7]
    inputs = prompts(LLAVA, llava, [parts])
    text = [*range(before), *range(before + 36, before + 43)]
    with saint.pruned(llava, saint.Plan(language=LANGUAGE)) as session, torch.no_grad():
        cache = cache_of(llava(**inputs))
        trace = session.trace
    assert trace[0].tokens_in.tolist() == [36]
    for entry in trace:
        held = cache.layers[entry.layer + 1].map.index[0].tolist()
        assert held == sorted(text + (entry.kept[0] + before).tolist())


@pytest.mark.parametrize("plan", [NOTHING, PLAN], ids=["nothing", "hybrid"])
def test_padding_mask_is_kept(llava, plan):
    inputs = prompts(LLAVA, llava, [[4, "0", 7], [3, "0", 15]])
    pad = inputs["attention_mask"] == 0
    with saint.pruned(llava, plan), torch.no_grad():
        logits = llava(**inputs).logits
        other = llava(**{**inputs, "input_ids": inputs["input_ids"].masked_fill(pad, 17)}).logits
        seen = llava(**{**inputs, "input_ids": inputs["input_ids"].masked_fill(pad, 17),
                        "attention_mask": torch.ones_like(pad).long()}).logits  # fmt: skip
    assert pad.any()
    assert relative_error(other[~pad], logits[~pad]) < 1e-6
    assert relative_error(seen[~pad], logits[~pad]) > 1e-3


def test_decode_positions_are_the_true_ones_in_every_layer(llava):
    """Theirs: off by one, and another one in every pruned layer."""
    inputs = prompts(LLAVA, llava, [[4, "0", 7], [3, "0", 15]])
    seen = []

    def see(_module, _args, kwargs):
        if kwargs["position_ids"].shape[1] == 1:
            seen.append(kwargs["position_ids"].flatten().tolist())

    layers = llava.model.language_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        llava.generate(**inputs, **GREEDY)
        expected, seen = seen, []
        with saint.pruned(llava, PLAN), torch.no_grad():
            llava.generate(**inputs, **GREEDY)
            by_generate, seen = seen, []
            # without generate, the model counts from the cache of its first layer, which the vision stage has shortened
            alone = prompts(LLAVA, llava, [[4, "0", 7]])
            cache = cache_of(llava(input_ids=alone["input_ids"], pixel_values=alone["pixel_values"]))
            llava(input_ids=torch.tensor([[5]]), **cached(llava, cache))
    finally:
        for hook in hooks:
            hook.remove()
    real = inputs["attention_mask"].sum(1)
    assert by_generate == expected
    assert seen == [[47]] * len(layers)
    assert by_generate == [(real + step).tolist() for step in range(3) for _ in layers]


@pytest.mark.parametrize("plan", [NOTHING, PLAN], ids=["nothing", "hybrid"])
def test_text_only_prompts_run(llava, plan):
    inputs = prompts(LLAVA, llava, [[9]])
    expected = llava.generate(**inputs, **GREEDY)
    with saint.pruned(llava, plan):
        assert torch.equal(llava.generate(**inputs, **GREEDY), expected)


def test_no_cache_runs(llava):
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    with saint.pruned(llava, PLAN):
        with_cache = llava.generate(**inputs, **GREEDY)
        assert torch.equal(llava.generate(**inputs, use_cache=False, **GREEDY), with_cache)


def test_labels_and_loglikelihoods_run(llava):
    inputs = prompts(LLAVA, llava, [[4, "0", 7], [3, "0", 15]])
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with saint.pruned(llava, PLAN), torch.no_grad():
        out = llava(**inputs, labels=labels)
    assert out.logits.shape[:2] == labels.shape
    likelihood = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0))[:, -5:]
    assert torch.isclose(out.loss, -likelihood.mean(), rtol=1e-5)


def test_positions_beyond_five_thousand_run(llava):
    longest = llava.model.language_model.config.max_position_embeddings
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    ids = {"position_ids": torch.arange(6000, 6047)[None]}  # rotary positions, beyond the 1024 of the config too
    assert longest < 5000
    with saint.pruned(llava, saint.Plan(language=LANGUAGE)), torch.no_grad():
        near, far = llava(**inputs).logits, llava(**inputs, **ids).logits
    assert relative_error(far, near) < 1e-2  # rotary attention sees distances only


def test_batches_and_several_images_run(llava):
    inputs = prompts(LLAVA, llava, [[4, "0", 7], [3, "0", 2, "0", 5], [8]])
    with saint.pruned(llava, PLAN) as session, torch.no_grad():
        logits = llava(**inputs).logits
        assert len(session.trace[0].kept) == 3  # images
        assert [len(kept) > 0 for kept in session.trace[-1].kept] == [True, True, False]  # samples
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [36, 72, 0]


@pytest.mark.parametrize("change", [{"neighbors": 1}, {"gamma": 0.0}])
def test_neighbors_and_gamma_are_used(llava, images, change):
    base = {"neighbors": 4, "gamma": 30.0}
    vit = build("timm/vit-augreg")
    inputs = prompts(LLAVA, llava, [[4, "0", 7]])
    # a fixed number shows which go; the votes, which `neighbors` moves, decide how many under "sample"
    base["budget"] = "sample" if "neighbors" in change else 0.6

    def kept(model, plan, run):
        with saint.pruned(model, plan) as session, torch.no_grad():
            run(model)
            return [kept.tolist() for entry in session.trace for kept in entry.kept]

    def runs(settings):
        def stage(threshold):
            return saint.Stage(saint.Saint(threshold=threshold, **settings), layers=[1])

        similar = threshold_at(llava, inputs, 1, 0.7)
        return kept(vit, saint.Plan(vision=stage(0.2)), lambda m: m(images)), kept(
            llava, saint.Plan(language=stage(similar)), lambda m: m(**inputs)
        )

    for before, after in zip(runs(base), runs({**base, **change}), strict=True):
        assert before != after


def test_usable_as_soon_as_it_is_applied(images):
    vit = build("timm/vit-augreg")
    before = set(vars(vit))
    with saint.pruned(vit, saint.Saint(threshold=0.2)), torch.no_grad():
        assert vit(images).shape == (3, 7)
        assert set(vars(vit)) - before <= {
            "forward_features", "forward_intermediates", "get_intermediate_layers",
            "_replicate_for_data_parallel", "_saint_session", "__reduce_ex__",
        }  # fmt: skip


def test_forward_features_runs(images):
    vit = build("timm/vit-augreg")
    with saint.pruned(vit, saint.Saint(keep=0.6)) as session, torch.no_grad():
        assert vit.forward_features(images).shape[1] == 1 + int(session.trace[-1].tokens_out[0]) < 37


@pytest.mark.parametrize("name", ["timm/vit-qknorm", "timm/vit-augreg"])
def test_attention_stays_the_models_own(images, name, monkeypatch):
    """Theirs is written out eagerly and forgets the norms of queries and keys."""
    vit = build(name)
    calls = []
    own = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[2]) or own(*a, **k)
    )
    with torch.no_grad():
        expected, unpruned = vit(images), calls.copy()
        with saint.pruned(vit, saint.Saint(threshold=1.0, keep=1.0)):
            calls.clear()  # applying calls the blocks, to prove that they are what the table says
            assert torch.allclose(vit(images), expected, atol=1e-5, rtol=1e-5)
            assert calls == unpruned == [37] * len(vit.blocks)
        with saint.pruned(vit, saint.Saint(keep=0.6)):
            calls.clear()
            vit(images)
            assert len(calls) == len(vit.blocks)
            assert calls[-1] < 37


@pytest.mark.parametrize(("name", "protected"), [("timm/dinov2-reg", 5), ("timm/deit-distilled", 2)])
def test_registers_are_never_dropped(name, protected):
    vit = build(name)
    side = vit.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    patches = vit.patch_embed.num_patches
    with saint.pruned(vit, saint.Saint(keep=0.5)) as session, torch.no_grad():
        rows = vit.forward_features(images).shape[1]
        entry, last = session.trace[0], session.trace[-1]
    assert entry.tokens_in.tolist() == [patches] * 2  # only patches are candidates
    assert rows == protected + int(last.tokens_out[0])


def test_survivors_are_returned(images):
    vit = build("timm/vit-augreg")
    with saint.pruned(vit, saint.Saint(threshold=0.2)) as session, torch.no_grad():
        vit(images)
        trace = session.trace
    for entry in trace:
        assert [len(kept) for kept in entry.kept] == entry.tokens_out.tolist()
        assert all(bool((kept.diff() > 0).all()) and 0 <= int(kept[0]) <= int(kept[-1]) < 36 for kept in entry.kept)
    for earlier, later in itertools.pairwise(trace):
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(earlier.kept, later.kept, strict=True))


def test_no_device_is_assumed():
    sources = {path: path.read_text() for path in (ROOT / "src").rglob("*.py")}
    assert sources
    assert not [path for path, text in sources.items() if re.search(r"\.cuda\(\)|device=\"cuda|to\(\"cuda", text)]


def test_no_pins_and_no_forks():
    text = (ROOT / "pyproject.toml").read_text()
    requirements = text[text.index("dependencies = ") : text.index("\ndev = ")]  # our own tools may be pinned
    assert "timm>=" in requirements
    assert not re.search(r"git\+|@ *http|==|<", requirements)
    assert timm.__name__ not in {path.name for path in (ROOT / "src").iterdir()}
