"""Every row of the support table keeps every contract, on tiny random models."""

from typing import ClassVar

import pytest
import torch

import saint
from saint import testing
from saint.plans import Plan, Stage
from saint.upstream.registry import ENCODERS
from saint.vision.locate import locate
from support.models import NAMES, backbones, build, enliven, prepared, restage
from support.oracles import nearest
from support.padded import naflex, patches


@pytest.mark.parametrize("contract", testing.CONTRACTS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, contract):
    model, plan, inputs = prepared(name)
    testing.CONTRACTS[contract](model, plan, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_post_placement(name):
    model, plan, inputs = prepared(name)
    plan = restage(plan, placement="post", layers=[0, 2])
    testing.check_identity(model, plan, inputs)
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)


class Recorder(saint.Saint):
    """Votes, and keeps what it saw and chose."""

    seen: ClassVar[list] = []

    def select(self, candidates):
        chosen = super().select(candidates)
        Recorder.seen.append((candidates, chosen))
        return chosen


def behind_the_blocks(model, plan, inputs):
    """The sequence behind the last block [B, P + K or N, C], the outputs, and the trace."""
    _, encoder, row = locate(model)
    last = encoder.get_submodule(row.blocks)[-1]
    rows = []
    hook = last.register_forward_hook(lambda _m, _a, y: rows.append((y[0] if isinstance(y, tuple) else y).clone()))
    with saint.pruned(model, plan) as session:
        out = testing.run(model, inputs)
        trace = session.trace
    hook.remove()
    return rows[0], out, trace


@pytest.mark.parametrize("name", NAMES)
def test_full_length_outputs(name):
    """Every dropped token shows the survivor that stands for it: the nearest on the grid, or the most similar when it went."""
    model, plan, inputs = prepared(name)
    base = testing.run(model, inputs)
    _, encoder, row = locate(model)
    prefix = row.prefix(encoder)
    method = Recorder(**{**vars(plan.vision[0].method), "budget": 0.6})
    plan = restage(plan, method=method, layers=[0, 2])
    short, _, trace = behind_the_blocks(model, plan, inputs)
    for output in ("nearest", "similar"):
        if output == "nearest" and row.patch is None:
            with pytest.raises(saint.UnsupportedModelError, match="no patch grid"):
                saint.apply(model, restage(plan, output=output))
            continue
        Recorder.seen.clear()
        full, got, again = behind_the_blocks(model, restage(plan, output=output), inputs)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in base.items()}
        seen = Recorder.seen[:]
        testing.check_batch(model, restage(plan, output=output), inputs)
        for sample, kept in enumerate(trace[-1].kept):
            assert torch.equal(kept, again[-1].kept[sample])
            total = int(trace[0].tokens_in[sample])
            assert len(kept) < total
            owner = nearest(kept.tolist(), 6, 6) if output == "nearest" else similar(seen, sample)
            want = short[sample, prefix:][owner]
            assert torch.equal(full[sample, :prefix], short[sample, :prefix])
            assert torch.equal(full[sample, prefix : prefix + total], want)


def similar(seen: list, sample: int) -> list[int]:
    """Slot of the survivor of each candidate: at its drop point the one with the most similar key, and so on."""
    owner = list(range(seen[0][0].tokens.lengths[sample]))
    for given, chosen in seen:
        keys = torch.nn.functional.normalize(given.keys[sample].double(), dim=-1)
        stay = chosen.slots[sample, : chosen.lengths[sample]].tolist()
        to = [
            stay.index(slot) if slot in stay else int((keys[stay] @ keys[slot]).argmax()) for slot in range(len(keys))
        ]
        owner = [to[slot] for slot in owner]
    return owner


@pytest.mark.parametrize("name", NAMES)
def test_ragged_batches_without_masks(name):
    """Attention that takes no dense mask (flash, older blocks) gets samples of equal length instead."""
    model, plan, inputs = prepared(name)
    with saint.pruned(model, plan) as session:
        masked = testing.run(model, inputs)
        session._stacks[0]._masks = lambda block: False
        grouped = testing.run(model, inputs)
        lengths = [len(kept) + session._stacks[0].prefix for kept in session.trace[-1].kept]
    for key, value in masked.items():
        for sample, length in enumerate(lengths):  # behind a sample's survivors comes padding
            a, b = value[sample], grouped[key][sample]
            a, b = (a[:length], b[:length]) if value.ndim == 3 else (a, b)
            assert torch.allclose(a, b, atol=1e-5 * max(1, value.abs().max()))


def test_every_spec_has_a_model():
    models = [prepared(name)[0] for name in NAMES] + list(backbones().values())
    assert {spec.encoder for spec in ENCODERS} == {locate(model)[2].encoder for model in models}


def test_example_plans_really_are_ragged():
    ragged = 0
    for name in NAMES:
        model, plan, inputs = prepared(name)
        with saint.pruned(model, plan) as session:
            testing.run(model, inputs)
            ragged += len(set(session.trace[-1].tokens_out.tolist())) > 1
    assert ragged == len(NAMES)


# -- inputs and keys of some architectures ------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "rope"), [("avg", "none"), ("avgmax", "axial"), ("map", "none"), ("token", "mixed")])
def test_patches_of_pictures_of_several_shapes(pool, rope):
    """NaFlexViT with what its collator gives: per-sample grids, padding, rotary tables of every sample."""
    model, inputs = naflex(pool, rope), patches()
    plan = testing.example_plan(model, inputs)
    for contract in testing.CONTRACTS.values():
        contract(model, plan, inputs)
    testing.check_oracle(model, restage(plan, placement="post", layers=[0, 2]), inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        assert session.trace[0].tokens_in.tolist() == [36, 20, 18]  # padding is no candidate
    with saint.pruned(model, restage(plan, output="similar")):
        full = testing.run(model, inputs)["output"]
    assert torch.isfinite(full).all()


@pytest.mark.parametrize("placement", [None, "post"])
@pytest.mark.parametrize(
    "name",
    ["timm/vit-parallel", "timm/vit-parallel-scaling", "timm/vit-diff", "timm/vit-diff-parallel", "timm/beit",
     "timm/beit-shared", "timm/relpos", "timm/relpos-shared", "timm/relpos-post"],
)  # fmt: skip
def test_what_is_scored_is_what_attention_received(name, placement, monkeypatch):
    if name not in NAMES:
        pytest.skip("not in this timm")
    model, _, inputs = prepared(name)
    received: list[torch.Tensor] = []
    shown = []
    own = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        received.append(key)
        return own(query, key, value, *args, **kwargs)

    class Ear:
        def candidates(self, stage, layer, candidates):
            shown.append(candidates.keys)

    plan = Stage(saint.Saint(threshold=1.0, neighbors=999), placement=placement, layers=[0, 1, 2, 3])
    with saint.pruned(model, plan, observers=[Ear()]) as session:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        testing.run(model, inputs)
        prefix = session._stacks[0].prefix
    assert len(shown) == 4
    calls = len(received) // 4
    for layer, keys in enumerate(shown):
        want = torch.cat(received[layer * calls : (layer + 1) * calls], 1).mean(1)[:, prefix:]
        assert torch.allclose(keys, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["timm/relpos", "timm/relpos-shared", "timm/beit", "timm/beit-shared"])
def test_merged_tokens_keep_the_bias_of_their_survivor(name):
    model, _, inputs = prepared(name)
    for beta in (1.0, 0.5):
        plan = Plan(vision=Stage(saint.methods.ToMe(r=6, beta=beta), layers=[0, 2]))
        assert "merged oracle" in testing.check_oracle(model, plan, inputs)
        testing.check_batch(model, plan, inputs)


def test_a_model_with_two_biases():
    """Own and shared: sizes and padding count once."""
    import timm

    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 96}
    both = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}
    model = enliven(timm.create_model("beit_base_patch16_224", **small, **both).eval())
    inputs = testing.example_inputs(model)
    plan = testing.example_plan(model, inputs)
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)
    testing.check_oracle(model, Plan(vision=Stage(saint.methods.ToMe(r=6), layers=[0, 2])), inputs)


@pytest.mark.parametrize("name", ["timm/beit", "timm/relpos-shared", "timm/naflex"])
def test_maps_of_other_encoders_stay_on_the_grid(name):
    model, plan, inputs = prepared(name)
    with saint.pruned(model, restage(plan, output="nearest")):
        maps = model.forward_intermediates(**inputs, intermediates_only=True)
    assert {m.shape for m in maps} == {(3, 48, 6, 6)}


# -- the battery itself can fail ----------------------------------------------------------------------------------------


def test_the_oracle_notices_a_wrong_survivor(monkeypatch):
    model, plan, inputs = prepared("timm/vit-augreg")
    from saint.runtime import deciding as layer

    real = layer.gather_tokens
    monkeypatch.setattr(layer, "gather_tokens", lambda x, slots, prefix: real(x, slots.roll(1, 1), prefix).roll(0))
    with pytest.raises(AssertionError, match="differs"):
        testing.check_oracle(model, restage(plan, layers=[1, 2]), inputs)


def test_the_battery_notices_a_missing_mask(monkeypatch):
    model, plan, inputs = prepared("timm/vit-augreg")
    from saint.vision import encoder

    monkeypatch.setattr(encoder, "_mask", lambda given, *_: given)
    with pytest.raises(AssertionError, match="batch changes it"):
        testing.check_batch(model, plan, inputs)


def test_the_battery_notices_stale_rope(monkeypatch):
    model, plan, inputs = prepared("timm/dinov3")
    from saint.vision import encoder

    monkeypatch.setattr(
        encoder, "gather_table", lambda table, tokens: table[..., : tokens.slots, :].expand(3, 1, -1, -1)
    )
    with pytest.raises(AssertionError, match="differs"):
        testing.check_oracle(model, plan, inputs)


def test_the_oracle_refuses_attention_it_cannot_see():
    model = build("timm/vit-augreg")
    for block in model.blocks:
        block.attn.fused_attn = False
    inputs = testing.example_inputs(model)
    with pytest.raises(saint.HookNeverFiredError, match="fused"):
        testing.masked_oracle(model, testing.example_plan(model, inputs), inputs)


def test_check_model_reports_every_contract():
    results = testing.check_model(build("timm/vit-augreg"))
    assert [r.contract for r in results] == list(testing.CONTRACTS)
    assert {r.outcome for r in results} == {"passed"}


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "small", "reason"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
            "SwinTransformer.*no global tokens",
        ),
        ("convnext_atto", {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}, "ConvNeXt.*no tokens"),
        ("cait_xxs24_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}, "Cait.*mixes heads"),
    ],
)
def test_architectures_without_global_tokens_are_refused_by_name(name, small, reason):
    import timm

    with pytest.raises(saint.UnsupportedModelError, match=reason):
        saint.apply(timm.create_model(name, **small), saint.Saint())


def test_unknown_models_hear_what_was_looked_for():
    with pytest.raises(saint.UnsupportedModelError, match=r"Sequential.*looked for.*VisionTransformer"):
        saint.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), saint.Saint())


def test_two_encoders_ask_which():
    both = torch.nn.ModuleList([build("timm/vit-augreg"), build("timm/dinov3")])
    with pytest.raises(saint.UnsupportedModelError, match=r"2 encoders: 0 .*1 "):
        saint.apply(both, saint.Saint())


class Unheard(torch.nn.Module):
    def __init__(self, dim, **_):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(dim)

    def forward(self, x):
        return x + self.norm1(x)


def test_unknown_blocks_are_refused():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", block_fn=Unheard, depth=2)
    with pytest.raises(saint.UnsupportedModelError, match="Unheard.*known: Block"):
        saint.apply(model, saint.Saint())
    assert saint.status(model) is None


@pytest.mark.parametrize(
    "name", ["timm/vit-parallel-scaling"] + ["timm/vit-diff-parallel"] * ("timm/vit-diff-parallel" in NAMES)
)
def test_where_attention_and_mlp_are_one_there_is_no_middle(name):
    model = build(name)
    with pytest.raises(saint.UnsupportedModelError, match=r'between whose attention and MLP there is no place.*"post"'):
        saint.apply(model, Stage(saint.Saint(), placement="mid"))
    assert saint.status(model) is None
    for placement in (None, "post"):
        with saint.pruned(model, Stage(saint.Saint(), placement=placement)) as session:
            assert session.status.stages["vision"][0].placement == "post"


def test_meta_weights_are_refused_and_nothing_is_touched():
    model = build("timm/vit-augreg").to("meta")
    before = testing.snapshot(model)
    with pytest.raises(saint.UnsupportedModelError, match="meta"):
        saint.apply(model, saint.Saint())
    assert testing.snapshot(model) == before


def test_a_changed_block_is_an_error_not_a_wrong_number(monkeypatch):
    from timm.models.vision_transformer import Block

    real = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, attn_mask=None, is_causal=False: real(self, x) + 0.01)
    model = build("timm/vit-augreg")
    before = testing.snapshot(model)
    with pytest.raises(saint.ParityError, match="differs from its own forward"):
        saint.apply(model, saint.Saint())
    assert testing.snapshot(model) == before
    saint.apply(model, Stage(saint.Saint(), placement="post")).remove()


def test_keys_that_never_appear_are_an_error(monkeypatch):
    model = build("timm/vit-augreg")
    saint.apply(model, Stage(saint.Saint(), layers=[1]))
    hooks = model.blocks[1].attn.k_norm._forward_hooks
    hooks.clear()
    with pytest.raises(saint.HookNeverFiredError, match=r"blocks\.1\.attn\.k_norm"):
        model(torch.randn(1, 3, 96, 96))
    saint.remove(model)
