"""Budgets, outputs users rely on, dtypes, compile, training, and other people's wrappers."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import saint
from saint import testing, tokens
from saint.methods import Random
from saint.plans import Plan, Stage
from support.families import FAMILIES, checkpoint, prompts
from support.models import backbones, build, enliven
from support.oracles import nearest


def loose(**settings: object) -> saint.Saint:
    return saint.Saint(**{"threshold": 0.5, "neighbors": 2, "center": True, **settings})


@pytest.fixture
def vit():
    return build("timm/vit-augreg")


@pytest.fixture
def images(vit):
    return testing.example_inputs(vit)["x"]


# -- budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "survivors"), [(12, 12), (0.5, 18), (36, 36)])
def test_fixed_budgets_are_exact_for_every_sample(vit, images, budget, survivors):
    with saint.pruned(vit, saint.Saint(budget=budget)) as session:
        vit(images)
    with saint.pruned(vit, saint.Saint(budget=budget)) as session:
        vit(images)
        assert session.trace[-1].tokens_out.tolist() == [survivors] * 3


def test_full_graph_keeps_its_budget(vit, images):
    with saint.pruned(vit, Stage(saint.SaintFullGraph(keep=20), layers=[1, 2])) as session:
        vit(images)
        assert session.trace[-1].tokens_out.tolist() == [20] * 3
        testing_kept = session.trace[-1].kept[0]
    plan = Plan(vision=Stage(saint.SaintFullGraph(keep=20), layers=[1, 2]))
    testing.check_oracle(vit, plan, {"x": images})
    testing.check_batch(vit, plan, {"x": images})
    assert testing_kept.tolist() == sorted(testing_kept.tolist())


def test_the_batch_rule_is_the_published_one(vit, images):
    with saint.pruned(vit, Stage(loose(), layers=[0])) as session:
        vit(images)
        votes = (session.trace[0].tokens_in - session.trace[0].tokens_out).tolist()
    with saint.pruned(vit, Stage(loose(budget="batch"), layers=[0])) as session:
        vit(images)
        drops = (session.trace[0].tokens_in - session.trace[0].tokens_out).tolist()
    assert len(set(votes)) > 1
    assert drops == [sum(votes) // 3] * 3


def test_too_large_a_budget_is_refused_before_anything_is_touched(vit):
    before = testing.snapshot(vit)
    with pytest.raises(ValueError, match=r"keep=500 .*36 candidates"):
        saint.apply(vit, saint.Saint(keep=500))
    assert testing.snapshot(vit) == before


def test_the_floor_holds_and_says_so_once(vit):
    flat = torch.zeros(1, 3, 96, 96)
    plan = Plan(vision=Stage(saint.Saint(threshold=-0.9, neighbors=1, floor=0.5), layers=range(4)))
    with saint.pruned(vit, plan) as session:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            vit(flat)
            vit(flat)
        assert session.trace[-1].tokens_out.tolist() == [18]
        assert [str(w.message)[:16] for w in caught] == ["the floor of 0.5"]


# -- what users read ----------------------------------------------------------------------------------------------------


def test_forward_features_is_the_survivors_in_order(vit, images):
    with saint.pruned(vit, loose()) as session:
        features = vit.forward_features(images)
        longest = int(session.trace[-1].tokens_out.max())
        assert features.shape == (3, 1 + longest, 48)
        full = session.expand(features)
        assert full.shape == (3, 37, 48)
        kept = session.trace[-1].kept[1]
        assert torch.equal(full[1, 1 + kept], features[1, 1 : 1 + len(kept)])


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/dinov3", "timm/siglip", "open_clip/vit"])
def test_intermediates_stay_on_the_grid(name):
    model = build(name)
    images = testing.example_inputs(model)["x"]
    with saint.pruned(model, loose()) as session:
        out = model.forward_intermediates(images)
        trace = session.trace
        final, maps = (out["image_features"], out["image_intermediates"]) if isinstance(out, dict) else out
        pooled = model(images)
    assert {m.shape for m in maps} == {(3, 48, 6, 6)}
    assert len(maps) == 4
    for layer, found in enumerate(maps):
        behind = [entry for entry in trace if entry.layer <= layer][-1]
        for sample, kept in enumerate(behind.kept):
            assert layer < 1 or len(kept) < 36 or sample == 0
            cells = found[sample].flatten(1).T
            # a dropped cell shows the survivor that is nearest on the grid
            assert torch.equal(cells, cells[kept[nearest(kept.tolist(), 6, 6)]])
            assert len(torch.unique(cells, dim=0)) == len(kept)
    assert torch.isfinite(pooled).all()
    assert final is not None


def test_hidden_states_shrink_and_expand():
    model = build("transformers/vit")
    pixels = testing.example_inputs(model)["pixel_values"]
    with saint.pruned(model, loose()) as session, torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
        lengths = [s.shape[1] for s in states]
        assert lengths[0] == 37
        assert lengths == sorted(lengths, reverse=True)
        assert session.expand(states[-1]).shape == (3, 37, 48)
        with pytest.raises(ValueError, match="not a map"):
            session.expand(states[0][:, :5])


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "dinov3"])
def test_backbones_keep_their_maps(name):
    torch.manual_seed(0)
    model = enliven(backbones()[name].eval())
    inputs = testing.example_inputs(model)
    plan = testing.example_plan(model, inputs)
    for check in (testing.check_identity, testing.check_undo, testing.check_bad_input):
        check(model, plan, inputs)
    base, (want, _) = testing.run(model, inputs), testing.masked_oracle(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        got, kept = testing.run(model, inputs), session.trace[-1].kept
    assert min(map(len, kept)) < 36
    maps = [key for key in got if "feature_maps" in key]
    assert len(maps) == 2
    for key in maps:  # the cells of survivors hold the oracle's values, whatever the others show
        assert got[key].shape == base[key].shape
        for sample, index in enumerate(kept):
            a, b = (value[key][sample].flatten(1)[:, index] for value in (got, want))
            assert torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max()))


def test_average_pooling_over_survivors_and_by_coverage():
    model = build("timm/vit-avg")
    images = testing.example_inputs(model)["x"]
    with saint.pruned(model, loose()) as session:
        rows = model.forward_features(images)
        pooled = model.forward_head(rows, pre_logits=True)
        for sample, kept in enumerate(session.trace[-1].kept):
            want = model.fc_norm(rows[sample, 1 : 1 + len(kept)].mean(0))
            assert torch.allclose(pooled[sample], want, atol=1e-5)
    with saint.pruned(model, Stage(loose(), output="similar")) as session:
        full = model.forward_features(images)
        pooled = model.forward_head(full, pre_logits=True)
        owner = session._stacks[0].outputs.full.stand_ins(session._stacks[0].forward, 4)
    for sample, kept in enumerate(session.plan.slots and owner):
        weight = torch.bincount(kept).float()
        assert weight.sum() == 36
        survivors = torch.stack([full[sample, 1 + (kept == slot).nonzero()[0, 0]] for slot in range(len(weight))])
        want = (survivors * weight.unsqueeze(1)).sum(0) / 36
        assert torch.allclose(pooled[sample], model.fc_norm(want), atol=1e-5)


def test_other_image_sizes():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=4, num_heads=3, dynamic_img_size=True).eval()
    with saint.pruned(model, loose()) as session, torch.no_grad():
        for height, width in ((96, 96), (128, 64), (64, 160)):
            model(torch.randn(2, 3, height, width))
            assert session.trace[0].tokens_in.tolist() == [height * width // 256] * 2
            maps = model.forward_intermediates(torch.randn(2, 3, height, width), intermediates_only=True)
            assert maps[-1].shape == (2, 48, height // 16, width // 16)
    for height, width in ((128, 64), (64, 160)):
        inputs = {"x": testing.example_inputs(model)["x"][:, :, :height, :width].contiguous()}
        plan = testing.example_plan(model, inputs)
        testing.check_oracle(model, plan, inputs)
        testing.check_batch(model, plan, inputs)


# -- precision, compile, training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_low_precision_and_autocast(vit, images, dtype, share):
    """Rounding to 8 or 11 bits at each of four blocks, as a share of the output; the same survivors in every precision."""
    plan = Stage(Random(0.5, seed=1), layers=[0, 2])
    low = copy.deepcopy(vit).to(dtype)
    with torch.no_grad():
        unpruned = vit(images)
        with saint.pruned(vit, plan):
            full = vit(images)
            with torch.autocast("cpu", dtype=dtype):
                auto = vit(images)
        with saint.pruned(low, plan) as session:
            out = low(images.to(dtype))
            assert session.trace[-1].tokens_out.tolist() == [18] * 3
    assert out.dtype == dtype
    for got in (out, auto):
        assert (got.float() - full).abs().max() < share * full.abs().max()
    assert (unpruned - full).abs().max() > 3 * share * full.abs().max(), "pruning is lost in the tolerance"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_votes_in_low_precision(vit, images, dtype):
    """Decisions are made in float32 from the keys of the model's precision: what differs is at most near the threshold."""
    low = copy.deepcopy(vit).to(dtype)
    with torch.no_grad(), saint.pruned(vit, Stage(loose(), layers=[0])) as session:
        vit(images)
        want = session.trace[0].kept
    with torch.no_grad(), saint.pruned(low, Stage(loose(), layers=[0])) as session:
        low(images.to(dtype))
        got = session.trace[0].kept
    for a, b in zip(want, got, strict=True):
        assert len(set(a.tolist()) ^ set(b.tolist())) <= 4


def test_compiled_fixed_budget_breaks_no_graph(vit, images):
    torch._dynamo.reset()
    with saint.pruned(vit, saint.Saint(keep=14)) as session:
        want = vit(images)
        explained = torch._dynamo.explain(vit)(images)
        assert explained.graph_break_count == 0, explained.break_reasons
        compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(images), want, atol=1e-5)
        assert session.trace[-1].tokens_out.tolist() == [14] * 3


def test_compiled_dynamic_budget_may_break_but_is_right(vit, images):
    torch._dynamo.reset()
    with saint.pruned(vit, loose()):
        want = vit(images)
        compiled = torch.compile(vit, backend="eager")
        assert torch.allclose(compiled(images), want, atol=1e-5)


def test_a_compiled_model_is_refused(vit):
    with pytest.raises(saint.UnsupportedModelError, match="compile"):
        saint.apply(torch.compile(vit, backend="eager"), saint.Saint())


def test_training_reaches_every_weight(vit, images):
    vit.train()
    with saint.pruned(vit, loose()) as session:
        vit(images).square().sum().backward()
        assert session.trace[-1].tokens_out.min() < 36
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vit.parameters())


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/vit"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = build(name)
    key, pixels = next(iter(testing.example_inputs(model).items()))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(**{key: pixels})
        (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with saint.pruned(model, loose()):
        model.train()
        want = gradients()
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        else:
            checkpoint(model)
        got = gradients()
    assert len(got) == len(want)
    assert all(torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max())) for a, b in zip(got, want, strict=True))


def test_the_callers_random_state_is_untouched(vit, images):
    state = torch.get_rng_state()
    with saint.pruned(vit, loose()):
        vit(images)
    assert torch.equal(torch.get_rng_state(), state)


# -- sessions -----------------------------------------------------------------------------------------------------------


def test_two_models_are_independent(vit, images):
    other = build("timm/vit-augreg")
    base = other(images)
    with saint.pruned(vit, loose()):
        assert torch.equal(other(images), base)
        assert saint.status(other) is None


def test_status_says_what_is_applied(vit):
    session = saint.apply(vit, saint.Saint(threshold=0.6))
    (stage,) = saint.status(vit).stages["vision"]
    assert (stage.layers, stage.placement, stage.method.threshold) == ([0, 1], "mid", 0.6)
    session.remove()
    session.remove()
    assert saint.status(vit) is None
    with pytest.raises(ValueError, match="no plan is applied"):
        saint.remove(vit)


def test_an_empty_plan_changes_nothing(vit, images):
    before = testing.snapshot(vit)
    with saint.pruned(vit, Plan()) as session:
        assert testing.snapshot(vit) == before
        vit(images)
        assert session.trace == []


def test_a_plan_inside_a_wrapper(images):
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = build("timm/vit-augreg")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower(x)

    model = Wrapper()
    with saint.pruned(model, loose()) as session:
        model(images)
        assert session.trace
        assert saint.status(model).stages["vision"][0].module == "tower"
        with pytest.raises(saint.AlreadyAppliedError):
            saint.apply(model.tower, saint.Saint())


def test_a_failure_half_way_leaves_nothing(vit, monkeypatch):
    before = testing.snapshot(vit)
    monkeypatch.setattr(vit.blocks[1].attn.k_norm, "register_forward_hook", lambda *_: 1 / 0)
    expected = testing.snapshot(vit)
    with pytest.raises(ZeroDivisionError):
        saint.apply(vit, Stage(loose(), layers=[0, 1], placement="post"))
    assert testing.snapshot(vit) == expected
    monkeypatch.undo()
    assert testing.snapshot(vit) == before
    assert saint.status(vit) is None


def test_accelerate_hooks_stay_outside(vit, images):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    base = vit(images)
    accelerate.hooks.add_hook_to_module(vit.blocks[0], accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    with saint.pruned(vit, loose()) as session:
        vit(images)
        assert session.trace[-1].tokens_out.min() < 36
    assert torch.equal(vit(images), base)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_name_the_sample(vit, images, bad):
    images[1, 0, 0, 0] = bad
    with saint.pruned(vit, loose()), pytest.raises(ValueError, match=r"sample\(s\) \[1\]"):
        vit(images)


def test_an_empty_batch(vit):
    with saint.pruned(vit, loose()), pytest.raises(ValueError, match="empty batch"):
        vit(torch.empty(0, 3, 96, 96))


def test_open_clip_through_its_own_factory():
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    with saint.pruned(model, loose(threshold=0.2)) as session, torch.no_grad():
        out = model.encode_image(torch.randn(2, 3, 224, 224))
    assert out.shape[0] == 2
    assert session.plan.vision[0].method.threshold == 0.2


# -- host reads -----------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_consecutive")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The path of a device whose values cost a wait; counts of votes are read with one `tolist` each, which is counted too."""
    from saint.methods import base
    from saint.runtime import deciding
    from saint.vlm import model

    for module in (tokens, deciding, model):
        monkeypatch.setattr(module, "reads_are_free", lambda device: False)
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or real(self))
    assert base.host_counts(torch.tensor([2, 3])) == (2, 3)
    reads.clear()
    return reads


METHODS = {
    "saint": saint.Saint(keep=0.5),
    "full-graph": saint.SaintFullGraph(keep=0.5),
    "random": saint.methods.Random(keep=0.5),
    "grid": saint.methods.Grid(keep=0.5),
    "tome": saint.methods.ToMe(keep=0.5),
    "pitome": saint.methods.PiToMe(keep=0.5),
}


@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/clip", "open_clip/vit"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_fixed_budget_reads_nothing_back(name, method, as_on_cuda):
    model = build(name)
    inputs = testing.example_inputs(model)
    with saint.pruned(model, Stage(method, layers=[1, 2])), torch.no_grad(), HostReads() as mode:
        model(**inputs)
    assert mode.seen == []
    assert as_on_cuda == []


def test_votes_are_read_once_per_drop_point(vit, images, as_on_cuda):
    with saint.pruned(vit, Stage(loose(), layers=[0, 1, 2])), torch.no_grad(), HostReads() as mode:
        vit(images)
    assert mode.seen == []
    assert as_on_cuda == [(3,)] * 3


def test_a_prompt_reads_its_numbers_of_visual_tokens_once(as_on_cuda):
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7], [3, "0", 2]])
    keep = saint.SaintFullGraph(keep=0.5)
    plan = Plan(vision=Stage(keep, layers=[1]), connector=keep, language=Stage(saint.Saint(keep=0.5), layers=[1, 2]))

    def reads():
        as_on_cuda.clear()
        with torch.no_grad(), HostReads() as mode:
            model(**inputs)
        return [*mode.seen, *as_on_cuda]

    reads()  # the first forward installs what transformers needs
    upstream = reads()
    with saint.pruned(model, plan):
        reads()
        ours = reads()
    assert len(ours) - len(upstream) == 1


# -- budgets and the size of the input --------------------------------------------------------------------------------------


def test_the_input_decides_whether_a_budget_fits():
    """A position table says nothing where pictures of any size may come."""
    model = build("transformers/dinov2")  # 6 x 6 patches by its config, interpolated for other pictures
    with saint.pruned(model, Stage(saint.Saint(keep=60), layers=[0, 1])) as session:
        with torch.no_grad():
            model(torch.randn(1, 3, 160, 160))
        assert session.trace[-1].tokens_out.tolist() == [60]
        with pytest.raises(ValueError, match=r"keep=60 .*36 candidates"):
            model(torch.randn(1, 3, 96, 96))


def test_a_dynamic_vit_takes_the_budget_of_its_input():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, dynamic_img_size=True).eval()
    with saint.pruned(vit, Stage(saint.Saint(keep=9), layers=[0, 1])) as session, torch.no_grad():
        vit(torch.randn(1, 3, 64, 128))
        assert session.trace[0].tokens_in.tolist() == [32]
        assert session.trace[-1].tokens_out.tolist() == [9]


def test_votes_under_compile_are_warned_of(vit, images, monkeypatch):
    from saint.methods import base

    monkeypatch.setattr(base, "_warned_of_recompiling", False)
    told = pytest.warns(UserWarning, match="recompile limit.*fraction as keep")
    with saint.pruned(vit, Stage(loose(), layers=[1])), torch.no_grad(), told:
        torch.compile(vit, backend="eager")(images)
