"""ToMe: an independent float64 reference, the merged oracle over the support table, and what merging adds to the frame."""

import copy
import math

import pytest
import torch

import saint
from saint import graph, testing
from saint.gathers import merge_tokens
from saint.methods import ToMe
from saint.plans import Plan, Stage
from saint.tokens import Candidates, Selection, TokenMap
from saint.vision.locate import locate
from support.families import FAMILIES, cache_of, prompts
from support.models import build

ROWS = [
    "timm/vit-augreg",
    "timm/vit-avg",
    "timm/vit-qknorm",
    "timm/deit-distilled",
    "timm/siglip",  # attention pool
    "timm/dinov2-reg",  # LayerScale, registers
    "timm/dinov3",  # RoPE
    "transformers/clip",
    "transformers/siglip2",  # padded by the model
    "transformers/dinov3",
    "open_clip/vit",  # nn.MultiheadAttention
    "open_clip/vit-custom-attention",
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- an independent reference -----------------------------------------------------------------------------------------


def reference(model, image, layers, r, beta):
    """timm's ViT on one image, token by token: logits, and for each layer the groups of patches. Shares no code with saint."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image.double()))))[0]
        prefix = model.num_prefix_tokens
        groups = [[i] for i in range(len(x) - prefix)]
        trace, margins = [], [1.0]
        for layer, block in enumerate(model.blocks):
            attn, count = block.attn, len(x)
            qkv = attn.qkv(block.norm1(x)).reshape(count, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
            sizes = torch.tensor([1.0] * prefix + [float(len(g)) for g in groups]).double()
            logits = q @ k.mT / math.sqrt(attn.head_dim) + beta * sizes.log()
            y = (logits.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
            x = x + block.ls1(attn.proj(y))
            if layer in layers:
                metric = torch.nn.functional.normalize(k.mean(0)[prefix:], dim=-1)
                edges = []
                for a in range(0, len(groups), 2):
                    cosines = [float(metric[a] @ metric[b]) for b in range(1, len(groups), 2)]
                    edges.append((max(cosines), a, 2 * cosines.index(max(cosines)) + 1))
                    margins += [high - low for high, low in [sorted(cosines)[:-3:-1]]]
                edges.sort(reverse=True)
                margins += [edges[r - 1][0] - edges[r][0]] if r < len(edges) else []
                total = {i: x[prefix + i] * len(g) for i, g in enumerate(groups)}
                for _, a, b in edges[: min(r, len(groups) // 2)]:
                    total[b] = total[b] + total.pop(a)
                    groups[b] = groups[b] + groups[a]
                x = torch.cat([x[:prefix], torch.stack([total[i] / len(groups[i]) for i in total])])
                groups = [groups[i] for i in total]
                trace.append(list(groups))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x)[None])[0], trace, min(margins)


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/vit-qknorm", "timm/dinov2-reg", "timm/deit-distilled"])
@pytest.mark.parametrize(("r", "beta", "layers"), [(5, 1.0, [0, 1, 2, 3]), (7, 0.0, [0, 2]), (30, 1.5, [1, 2])])
def test_equal_to_a_float64_reference(name, r, beta, layers):
    model = build(name)
    images = testing.example_inputs(model)["x"]
    with saint.pruned(model, Stage(ToMe(r=r, beta=beta), layers=layers)) as session, torch.no_grad():
        out, trace = model(images), session.trace
    clear = 0
    for sample, image in enumerate(images):
        want, groups, margin = reference(model, image[None], layers, r, beta)
        if margin < 1e-6:
            continue  # two edges that float32 cannot tell apart
        clear += 1
        assert (out[sample] - want).abs().max() < 1e-5 * max(1, want.abs().max())
        for entry, group in zip(trace, groups, strict=True):
            assert entry.tokens_out[sample] == len(group)
            for i, members in enumerate(group):
                assert entry.into[sample][members].unique().tolist() == [entry.kept[sample][i].item()]
    assert clear >= 2


# -- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_contracts(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=ToMe(r=5))
    assert "merged oracle" in testing.check_oracle(model, plan, inputs)
    for contract in ("exact undo", "batch independence", "really on"):
        testing.CONTRACTS[contract](model, plan, inputs)
    testing.check_oracle(model, Plan(vision=Stage(ToMe(r=7, beta=0.5), layers=[0, 2])), inputs)


@pytest.mark.parametrize("name", ROWS)
def test_sizes_and_budgets(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=Stage(ToMe(keep=0.4), layers=[0, 1, 2]))
    testing.check_oracle(model, plan, inputs)
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        trace = session.trace
        sizes = {layer: state.sizes for layer, state in session._stacks[0].forward.states.items()}
    total = trace[0].tokens_in.tolist()
    assert trace[-1].tokens_out.tolist() == [int(0.4 * n + 0.5) for n in total]
    for layer in (1, 2, 3, 4):
        assert sizes[layer].sum(1).tolist() == total
    for entry in trace:
        for sample, (kept, into) in enumerate(zip(entry.kept, entry.into, strict=True)):
            assert len(into) == total[sample]
            assert torch.equal(into.unique(), kept)
            assert torch.equal(into[kept], kept)
            assert torch.equal(into.bincount()[kept].float(), sizes[entry.layer + 1][sample][: len(kept)])


@pytest.mark.parametrize(
    "stage", [{"placement": "post", "layers": [0, 2]}, {"output": "similar"}], ids=["post", "similar"]
)
@pytest.mark.parametrize("name", ["timm/vit-avg", "timm/dinov3", "transformers/clip", "open_clip/vit"])
def test_other_placements_and_outputs(name, stage):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=Stage(ToMe(r=6), **stage))
    testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)


def test_similar_output_shows_the_survivor_a_token_became_part_of():
    model = build("transformers/clip")
    inputs = testing.example_inputs(model)
    with saint.pruned(model, Stage(ToMe(r=6), output="similar")) as session:
        full = testing.run(model, inputs)["last_hidden_state"][:, 1:]
        into = session.trace[-1].into
    for sample, index in enumerate(into):
        assert torch.equal(full[sample], full[sample][index])
        assert len(full[sample].unique(dim=0)) == len(index.unique())


def test_merging_nothing_changes_nothing():
    model = build("timm/dinov2-reg")
    inputs = testing.example_inputs(model)
    base = testing.run(model, inputs)["output"]
    with saint.pruned(model, ToMe(keep=1.0)):
        assert torch.allclose(testing.run(model, inputs)["output"], base, atol=1e-6)


def test_beta_zero_passes_no_mask(monkeypatch):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with saint.pruned(model, ToMe(r=5, beta=0.0)):
        masks.clear()  # of the proof that a block is what we know
        without = testing.run(model, inputs)["output"]
    assert masks == [None] * 4
    with saint.pruned(model, ToMe(r=5)):
        masks.clear()
        assert not torch.allclose(testing.run(model, inputs)["output"], without, atol=1e-3)
    assert masks[0] is None
    assert [m.shape for m in masks[1:]] == [(3, 1, 1, 32), (3, 1, 1, 27), (3, 1, 1, 22)]


def test_check_model_says_which_oracle():
    model = build("timm/vit-augreg")
    results = {r.contract: r for r in testing.check_model(model, Plan(vision=ToMe(r=5)))}
    assert {r.outcome for r in results.values()} == {"passed"}
    assert "nothing is masked" in results["masked oracle"].detail


def test_the_merged_oracle_notices_missing_weights(monkeypatch):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    from saint.vision.encoder import PrunedEncoder

    monkeypatch.setattr(PrunedEncoder, "_bias", lambda self, layer, state, dtype: None)
    with pytest.raises(AssertionError, match="differs"):
        testing.check_oracle(model, Plan(vision=ToMe(r=5)), inputs)


# -- training, compiling, vision-language models ------------------------------------------------------------------------


def test_gradients_flow():
    model = build("timm/dinov2-reg").train()
    images = testing.example_inputs(model)["x"].requires_grad_()
    with saint.pruned(model, ToMe(r=5)):
        model(images).square().sum().backward()
    assert torch.isfinite(images.grad).all()
    assert (images.grad.flatten(2).abs().sum((1, 2)) > 0).all()
    grid = images.grad.unfold(2, 14, 14).unfold(3, 14, 14).abs().sum((1, 4, 5))
    assert (grid > 0).all(), "a merged patch got no gradient"
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_gradient_checkpointing_does_the_same():
    model = build("timm/vit-augreg").train()
    images = testing.example_inputs(model)["x"]
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with saint.pruned(model, ToMe(r=5)):
            model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_compiles_without_a_break_and_agrees():
    model = build("timm/vit-augreg")
    images = testing.example_inputs(model)["x"]
    with saint.pruned(model, Stage(ToMe(keep=0.5), layers=[0, 1])), torch.no_grad():
        eager = model(images)
        breaks = torch._dynamo.explain(model)(images).graph_break_count
        assert torch.allclose(torch.compile(model, backend="eager")(images), eager, atol=1e-5)
    assert breaks == 0


def test_in_the_tower_of_a_language_model():
    model = FAMILIES["llava-llama"].build()
    inputs = prompts(FAMILIES["llava-llama"], model, [[4, "0", 7], [3, "1", 2]])
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(model, Plan(vision=Stage(ToMe(r=6), layers=[0, 1]))) as session:
            out = model(**inputs).logits
            cache = cache_of(model(**inputs))
            assert session.trace[-1].tokens_out.tolist() == [24, 24]
    assert out.shape == base.shape
    assert not torch.allclose(out, base, atol=1e-2)
    assert cache.layers[0].keys.shape[2] == base.shape[1] - 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = build("timm/vit-augreg").to(dtype)
    inputs = testing.example_inputs(model)
    plan = Plan(vision=ToMe(r=5))
    if dtype == torch.bfloat16:
        assert testing.run(model, inputs)["output"].dtype == dtype
        testing.check_batch(model, plan, inputs)
    else:
        testing.check_oracle(model, plan, inputs, atol=1e-10)


# -- the parts --------------------------------------------------------------------------------------------------------


def test_matching_is_the_formula():
    keys = noise(2, 3, 9, 4)
    edges = graph.match(keys)
    metric = torch.nn.functional.normalize(keys.double().mean(1), dim=-1)
    for sample in range(2):
        for i, source in enumerate(edges.sources.tolist()):
            cosines = {b: float(metric[sample, source] @ metric[sample, b]) for b in range(1, 9, 2)}
            assert edges.targets[sample, i] == max(cosines, key=cosines.get)
            assert abs(edges.similarity[sample, i] - max(cosines.values())) < 1e-6


def test_matching_ignores_padding_and_breaks_ties_by_index():
    keys = torch.ones(1, 8, 4)
    valid = torch.tensor([[True] * 5 + [False] * 3])
    edges = graph.match(keys, valid=valid)
    assert edges.targets[0, :3].tolist() == [1, 1, 1]
    assert edges.similarity[0].isinf().tolist() == [False, False, False, True]
    one = graph.match(keys, valid=torch.tensor([[True] + [False] * 7]))
    assert one.similarity.isinf().all()


def test_merging_is_a_weighted_mean_and_leaves_others_alone():
    x, sizes = noise(1, 7, 3), torch.tensor([[1.0, 3.0, 2.0, 1.0, 0.0]])
    tokens = TokenMap.full(1, 5, x.device, torch.tensor([[True] * 4 + [False]]))
    selection = Selection.merging(torch.tensor([[1, 1, 1, 3, 4]]), (2,), tokens)
    merged, left = merge_tokens(x, sizes, selection, 2)
    body = x[0, 2:]
    assert selection.slots.tolist() == [[1, 3]]
    assert left.tolist() == [[6.0, 1.0]]
    assert torch.equal(merged[0, :2], x[0, :2])
    assert torch.allclose(merged[0, 2], (body[0] + 3 * body[1] + 2 * body[2]) / 6)
    assert torch.equal(merged[0, 3], body[3])


def test_r_is_at_most_half_of_a_sample():
    tokens = TokenMap.full(3, 9, torch.device("cpu"), torch.arange(9) < torch.tensor([[9], [1], [4]]))
    keys = noise(3, 9, 4)
    selection = ToMe(r=100).select(Candidates(keys, keys, tokens, 0, 1))
    assert selection.lengths == (5, 1, 2)
    assert selection.slots[1, 0] == 0


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ToMe(r=0), "r must be an integer >= 1.*0"),
        (lambda: ToMe(r=2.5), r"r must be an integer.*2\.5"),
        (lambda: ToMe(r=4, keep=9), "give r .*r=4.*9"),
        (lambda: ToMe(keep=1.5), r"keep.*1\.5"),
        (lambda: ToMe(beta=-1), "beta.*-1"),
        (lambda: ToMe(beta=float("nan")), "beta.*nan"),
        (lambda: Plan(connector=ToMe()), "ToMe is not defined for the connector.*language, vision"),
        (lambda: ToMe(keep=9).validate(37, 2), "at least 10"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_survive_a_round_trip():
    assert ToMe() == ToMe(r=8)
    for method in (ToMe(), ToMe(r=3, beta=0), ToMe(keep=0.5)):
        assert Plan.from_dict(Plan(vision=method).to_dict()) == Plan(vision=method)


def test_attention_without_a_mask_needs_beta_zero():
    model = build("transformers/clip")
    inputs = testing.example_inputs(model)
    encoder = locate(model)[1]
    before = testing.snapshot(model)
    encoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(saint.UnsupportedModelError, match=r"layers\.1 .*beta=1 .*set beta=0"):
        saint.apply(model, ToMe(r=5))
    assert testing.snapshot(model) == before
    saint.apply(
        model, Stage(ToMe(r=5, beta=0), placement="post")
    ).remove()  # "mid" would run a block, here without flash
    encoder.config._attn_implementation_internal = "sdpa"
    with saint.pruned(model, ToMe(r=5)) as session:
        session._stacks[0]._masks = lambda block: False  # attention switched behind our back
        with pytest.raises(saint.UnsupportedModelError, match="beta=1"):
            testing.run(model, inputs)


def test_diffrate_leaves_the_published_numbers_block_by_block():
    """With the class token: 197 behind the first block of DeiT-S, then 194 to 56, and half of these where it leaves 3."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=12).eval()
    images = {"x": noise(2, 3, 224, 224)}
    with saint.pruned(model, "vit/diffrate") as session:
        testing.run(model, images)
        trace = session.trace
    assert [entry.layer for entry in trace] == list(range(1, 12))
    left = [{n + 1 for n in entry.tokens_out.tolist()} for entry in trace]
    assert left == [{n} for n in (194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 29)]
    assert trace[-1].into is not None
    assert "merged oracle" in testing.check_oracle(model, saint.plan("vit/diffrate"), images)


@pytest.mark.parametrize("side", [16, 32, 48, 96])
def test_diffrate_takes_other_numbers_of_patches(side):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=12, img_size=side).eval()
    with saint.pruned(model, "vit/diffrate") as session:
        assert testing.run(model, {"x": noise(1, 3, side, side)})
        assert int(session.trace[-1].tokens_out) >= 1
