"""PPT: a float64 reference, the formula as a literal loop, the oracles of both fates, samples of a batch, refusals."""

import copy
import dataclasses
import itertools
import math
import statistics

import pytest
import torch

import saint
from saint import testing
from saint.methods import PPT, Grid, ToMe
from saint.needs import TOWER_CLASS, TOWER_VALUES
from saint.plans import Plan, Stage
from saint.runtime.points import select_some
from saint.runtime.state import some_tokens
from saint.tokens import Candidates, Selection, TokenMap
from saint.vision.locate import locate
from support.families import FAMILIES
from support.models import build

WITH_CLASS = ["timm/vit-augreg", "timm/deit-distilled", "timm/dinov2-reg", "timm/dinov3", "transformers/clip"]
OTHERS = [
    "timm/siglip",
    "transformers/siglip2",
    "open_clip/vit",
    "open_clip/vit-custom-attention",
    "transformers/dinov3",
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def variance(weights):
    """Of shares of a whole."""
    return statistics.variance([w / sum(weights) for w in weights])


# -- an independent reference -----------------------------------------------------------------------------------------


def reference(model, image, layers, r, threshold, beta=1.0):
    """timm's ViT on one image, token by token, in float64; shares no code with saint.

    Returns:
        Logits; for each drop point the groups of patches; the variances there; how clear the closest decision was.
    """
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image.double()))))[0]
        prefix = model.num_prefix_tokens
        groups = [[i] for i in range(len(x) - prefix)]
        trace, spread, margins = [], [], [1.0]
        for layer, block in enumerate(model.blocks):
            attn, count = block.attn, len(x)
            qkv = attn.qkv(block.norm1(x)).reshape(count, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
            sizes = torch.tensor([1.0] * prefix + [float(len(g)) for g in groups]).double()
            weights = (q @ k.mT / math.sqrt(attn.head_dim) + beta * sizes.log()).softmax(-1)
            x = x + block.ls1(attn.proj((weights @ v).transpose(0, 1).reshape(count, -1)))
            if layer in layers:
                first, lengths = weights[:, 0].sum(0)[prefix:], v.transpose(0, 1).flatten(1).norm(dim=1)[prefix:]
                matters = [float(a * n) for a, n in zip(first, lengths, strict=True)]
                spread.append(variance(matters))
                margins.append(abs(spread[-1] / threshold - 1) if threshold else 1.0)
                leave, total = min(r, len(groups) // 2), {i: x[prefix + i] for i in range(len(groups))}
                if spread[-1] >= threshold:
                    order = sorted(range(len(groups)), key=lambda i: matters[i])
                    margins.append(matters[order[leave]] / matters[order[leave - 1]] - 1)
                    for i in order[:leave]:
                        del total[i]
                else:
                    metric, edges = torch.nn.functional.normalize(k.mean(0)[prefix:], dim=-1), []
                    for a in range(0, len(groups), 2):
                        cosines = [float(metric[a] @ metric[b]) for b in range(1, len(groups), 2)]
                        edges.append((max(cosines), a, 2 * cosines.index(max(cosines)) + 1))
                        margins += [high - low for high, low in [sorted(cosines)[:-3:-1]]]
                    edges.sort(reverse=True)
                    margins += [edges[leave - 1][0] - edges[leave][0]] if leave < len(edges) else []
                    total = {i: row * len(groups[i]) for i, row in total.items()}
                    for _, a, b in edges[:leave]:
                        total[b] = total[b] + total.pop(a)
                        groups[b] = groups[b] + groups[a]
                    total = {i: row / len(groups[i]) for i, row in total.items()}
                x, groups = torch.cat([x[:prefix], torch.stack(list(total.values()))]), [groups[i] for i in total]
                trace.append(list(groups))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x)[None])[0], trace, spread, min(margins)


def between(model, images, layers, r):
    """A threshold by which some samples drop and others merge at the first of ``layers``."""
    found = sorted(reference(model, image[None], layers, r, 0.0)[2][0] for image in images)
    return max(((high / low, math.sqrt(high * low)) for low, high in itertools.pairwise(found)))[1]


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/vit-qknorm", "timm/dinov2-reg", "timm/deit-distilled"])
@pytest.mark.parametrize(("r", "beta", "layers"), [(5, 1.0, [0, 1, 3]), (30, 1.5, [1, 2]), (7, 0.0, [0, 2])])
def test_equal_to_a_float64_reference(name, r, beta, layers):
    model = build(name)
    images = testing.example_inputs(model, 6)["x"]
    threshold = between(model, images, layers, r)
    stage = Stage(PPT(r=r, beta=beta, threshold=threshold), layers=layers)
    with saint.pruned(model, stage) as session, torch.no_grad():
        out, trace = model(images), session.trace
    fates = set()
    for sample, image in enumerate(images):
        want, groups, spread, margin = reference(model, image[None], layers, r, threshold, beta)
        if margin < 1e-6:
            continue  # a decision that float32 cannot tell apart
        fates.add(spread[0] >= threshold)
        assert (out[sample] - want).abs().max() < 1e-5 * max(1, want.abs().max())
        for entry, group in zip(trace, groups, strict=True):
            assert entry.tokens_out[sample] == len(group)
            into = torch.full_like(entry.into[sample], -1)
            for i, members in enumerate(group):
                into[members] = entry.kept[sample][i]
            assert torch.equal(entry.into[sample], into)
    assert fates == {True, False}


# -- the formula ------------------------------------------------------------------------------------------------------


def shown(lengths, seed=0):
    """What a method sees; padding matters most of all, and is all keys' neighbour."""
    batch, count = len(lengths), max(lengths)
    here = torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    keys = noise(batch, count, 6, seed=seed).masked_fill(~here.unsqueeze(-1), 3.0)
    strength = torch.tensor([0.1, 2.0])[torch.arange(batch) % 2].unsqueeze(1)  # alike or not
    rows = {
        TOWER_CLASS: (strength * noise(batch, count, seed=seed + 1)).softmax(1).masked_fill(~here, 9.0),
        TOWER_VALUES: (strength * noise(batch, count, seed=seed + 2)).exp().masked_fill(~here, 9.0),
    }
    tokens = TokenMap.full(batch, count, torch.device("cpu"), None if bool(here.all()) else here)
    return Candidates(keys, keys, tokens, 0, 1, rows=rows)


def alone(given, sample):
    """The same of one sample, without padding."""
    n = given.tokens.lengths[sample]
    keys, rows = given.keys[sample : sample + 1, :n], {k: v[sample : sample + 1, :n] for k, v in given.rows.items()}
    return Candidates(keys, keys, TokenMap.full(1, n, torch.device("cpu")), 0, 1, rows=rows)


@pytest.mark.parametrize("lengths", [(31,) * 4, (31, 24, 7, 30), (2, 40), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 99}, {"keep": 0.7}], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 1.0])
def test_each_sample_drops_or_merges_by_the_formula(lengths, settings, threshold):
    given = shown(lengths)
    got = PPT(threshold=threshold, **settings).select(given)
    for sample, total in enumerate(lengths):
        own = alone(given, sample)
        matters = [float(a) * float(v) for a, v in zip(*(row[0].double() for row in own.rows.values()), strict=True)]
        leave = PPT(**settings).merged(own)[0]
        stays = got.slots[sample, : got.lengths[sample]].tolist()
        assert len(stays) == total - leave
        owner, gone = got.owner[sample, :total].tolist(), got.gone[sample].nonzero().flatten().tolist()
        if leave and variance(matters) >= threshold:
            least = sorted(range(total), key=lambda i: matters[i])[:leave]
            assert gone == sorted(least)
            assert stays == [i for i in range(total) if i not in least]
            assert [owner[i] for i in stays] == list(range(len(stays)))
        else:
            merged = ToMe(**settings).select(own)
            assert not gone
            assert stays == (list(range(total)) if merged is None else merged.slots[0].tolist())
            assert owner == (list(range(total)) if merged is None else merged.owner[0].tolist())


def test_of_equal_tokens_the_later_ones_drop():
    given = shown((9,))
    rows = {name: torch.ones_like(row) for name, row in given.rows.items()}
    got = PPT(r=3, threshold=0.0).select(dataclasses.replace(given, rows=rows))
    assert got.slots.tolist() == [[0, 1, 2, 3, 4, 5]]
    none = {name: torch.zeros_like(row) for name, row in given.rows.items()}  # no attention at all
    assert PPT(r=3, threshold=0.0).select(dataclasses.replace(given, rows=none)).slots.tolist() == got.slots.tolist()


def test_samples_without_tokens_have_nothing_to_drop():
    given = shown((8, 5))
    tokens = TokenMap(given.tokens.index, (0, 5), (0, 5), 8, given.tokens.valid & torch.tensor([[False], [True]]))
    got = select_some(PPT(r=2, threshold=0.0), dataclasses.replace(given, tokens=tokens), [1])
    want = PPT(r=2, threshold=0.0).select(alone(given, 1))
    assert got.lengths == (0, 3)
    assert got.gone[0].sum() == 0
    assert got.gone[1, :5].tolist() == want.gone[0].tolist()


def test_what_dropped_is_remembered_among_other_tokens():
    """Candidates 0 to 4 at places 1, 2, 4, 5, 6: 1 goes into 2, 3 drops, then 0 drops with nothing in it."""
    state = some_tokens(torch.tensor([[False, True, True, False, True, True, True]]), (5,))
    chosen = Selection.joining(torch.tensor([[1, 3]]), torch.tensor([[2, 0]]), (2,), state.candidates)
    once, _ = state.after(dataclasses.replace(chosen, gone=torch.tensor([[False, False, False, True, False]])))
    assert once.gone.tolist() == [[False, False, False, True, False]]
    chosen = Selection.joining(torch.tensor([[0, 1]]), torch.tensor([[2, 2]]), (2,), once.candidates)
    twice, _ = once.after(dataclasses.replace(chosen, gone=torch.tensor([[True, False, False]])))
    assert twice.gone.tolist() == [[True, False, False, True, False]]
    assert twice.tokens.index.tolist() == [[0, 3, 6]]


# -- what an encoder shows --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spy(PPT):
    """PPT that keeps what it was shown."""

    seen = []  # noqa: RUF012

    def select(self, candidates):
        self.seen.append(candidates)
        return super().select(candidates)


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/siglip", "open_clip/vit", "transformers/clip"])
def test_what_is_shown_is_what_the_attention_computes(name):
    """Where tokens have left before; open_clip projects inside nn.MultiheadAttention."""
    model = build(name)
    inputs, calls = testing.example_inputs(model), []
    encoder, spec = locate(model)[1:]
    Spy.seen.clear()
    with saint.pruned(model, Stage(Spy(r=5, threshold=1.0, beta=0.0), layers=[0, 2])) as session:
        prefix = session._stacks[0].prefix
        attention = dict(encoder.named_modules())[f"{spec.blocks}.2"]
        hook = attention.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
        testing.run(model, inputs)
        hook.remove()
        rows = Spy.seen[-1].rows
    (x,) = calls
    weights, values = literal(name, attention, x)
    want = weights.mean(1)[:, 0] if prefix else weights.mean((1, 2))
    torch.testing.assert_close(rows[TOWER_CLASS].double(), want[:, prefix:], rtol=1e-4, atol=1e-7)
    lengths = values.transpose(1, 2).flatten(2).norm(dim=2)
    torch.testing.assert_close(rows[TOWER_VALUES].double(), lengths[:, prefix:], rtol=1e-4, atol=1e-7)


def literal(name, block, x):
    """Attention [B, H, N, N] and values [B, H, N, D] of a block on its input, from its weights."""
    block = copy.deepcopy(block).double()
    if name == "transformers/clip":
        attn, y = block.self_attn, block.layer_norm1(x.double())
        q, k, v = (getattr(attn, f"{part}_proj")(y) for part in "qkv")
        heads = attn.num_heads
    elif name == "open_clip/vit":
        attn, y = block.attn, block.ln_1(x.double())
        q, k, v = torch.nn.functional.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        heads = attn.num_heads
    else:
        attn, y = block.attn, block.norm1(x.double())
        q, k, v = attn.qkv(y).chunk(3, -1)
        heads = attn.num_heads
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), v


# -- contracts --------------------------------------------------------------------------------------------------------


def fates(trace):
    """Whether each sample dropped something at all, and merged something at all."""
    last = [into for into in trace[-1].into]
    dropped = [bool((into < 0).any()) for into in last]
    merged = [len(into[into >= 0]) > len(kept) for into, kept in zip(last, trace[-1].kept, strict=True)]
    return dropped, merged


def splitting(model, inputs, **settings):
    """A stage whose threshold lets some samples drop and others merge at its first layer."""
    Spy.seen.clear()
    stage = Stage(Spy(threshold=1.0, r=6), **settings)
    with saint.pruned(model, stage):
        testing.run(model, inputs)
    given = Spy.seen[0]
    found = []
    for sample in range(len(given.tokens.lengths)):
        rows = alone(given, sample).rows
        found.append(variance((rows[TOWER_CLASS] * rows[TOWER_VALUES])[0].tolist()))
    found.sort()
    low, high = max(itertools.pairwise(found), key=lambda pair: pair[1] / pair[0])
    return dataclasses.replace(stage, method=PPT(r=6, threshold=math.sqrt(low * high)))


@pytest.mark.parametrize("name", [*WITH_CLASS, *OTHERS])
def test_contracts(name):
    model = build(name)
    inputs = testing.example_inputs(model, 4)
    plan = Plan(vision=splitting(model, inputs, layers=[0, 2]))
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        dropped, merged = fates(session.trace)
    assert any(dropped)
    assert any(merged)
    assert "merged oracle" in testing.check_oracle(model, plan, inputs)
    # attention of all tokens, and what nn.MultiheadAttention projects once more, are FLOPs beside those of the blocks
    for contract in ("exact undo", "batch independence", *(["really on"] if name in WITH_CLASS else [])):
        testing.CONTRACTS[contract](model, plan, inputs)


@pytest.mark.parametrize("stage", [{"placement": "post"}, {"output": "similar"}, {"output": "carried"}], ids=str)
@pytest.mark.parametrize("name", ["timm/vit-avg", "timm/dinov3", "transformers/siglip2"])
def test_other_placements_and_outputs(name, stage):
    model = build(name)
    inputs = testing.example_inputs(model, 4)
    plan = Plan(vision=splitting(model, inputs, layers=[0, 2], **stage))
    if "output" not in stage:  # a pool behind full length averages what stands for dropped tokens too
        testing.check_oracle(model, plan, inputs)
    testing.check_batch(model, plan, inputs)


@pytest.mark.parametrize("name", ["timm/vit-augreg", "timm/dinov3", "transformers/siglip2", "open_clip/vit"])
def test_one_fate_alone(name):
    """What only drops equals the masked oracle, what only merges is ToMe."""
    model = build(name)
    inputs = testing.example_inputs(model)
    for beta in (1.0, 0.5):
        drops = Plan(vision=Stage(PPT(r=6, threshold=0.0, beta=beta), layers=[0, 2]))
        want, trace = testing.masked_oracle(model, drops, inputs)
        with saint.pruned(model, drops):
            got = testing.run(model, inputs)
        assert all(fates(trace)[0])
        assert not any(fates(trace)[1])
        for key, value in want.items():
            for sample, kept in enumerate(trace[-1].kept):
                own, whole = got[key][sample], value[sample]
                if own.shape != whole.shape:  # tokens, in front of which nothing stands
                    own, whole = own[: len(kept)], whole[kept]
                assert torch.allclose(own, whole, rtol=1e-5, atol=1e-5 * max(1, float(value.abs().max())))
        out = []
        for method in (PPT(r=6, threshold=1.0, beta=beta), ToMe(r=6, beta=beta)):
            with saint.pruned(model, Stage(method, layers=[0, 2])):
                out.append(testing.run(model, inputs))
        assert all(torch.equal(out[0][key], out[1][key]) for key in want)


def test_full_length_shows_a_dropped_token_as_the_survivor_with_the_most_similar_key():
    model = build("transformers/clip")
    inputs = testing.example_inputs(model)
    outputs = []
    with saint.pruned(model, Stage(PPT(r=6, threshold=0.0), layers=[1], output="similar")) as session:
        outputs.append(testing.run(model, inputs)["last_hidden_state"])
        kept = session.trace[-1].kept
    Spy.seen.clear()
    with saint.pruned(model, Stage(Spy(r=6, threshold=1.0), layers=[1])):
        testing.run(model, inputs)
    points = torch.nn.functional.normalize(Spy.seen[0].keys, dim=-1)
    for sample, index in enumerate(kept):
        full = outputs[0][sample, 1:]
        for token in range(len(full)):
            near = token if token in index else int(index[(points[sample, index] @ points[sample, token]).argmax()])
            assert torch.equal(full[token], full[near])


def test_what_merges_behind_it_keeps_what_dropped_apart():
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model, 4)
    first = splitting(model, inputs, layers=[0])
    plan = Plan(vision=[first, Stage(ToMe(r=4), layers=[2])])
    with saint.pruned(model, plan) as session:
        testing.run(model, inputs)
        before, after = (fates([entry])[0] for entry in session.trace)
    assert before == after
    testing.check_oracle(model, plan, inputs)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_published_settings():
    method = PPT()
    assert (method.r, method.threshold, method.beta, method.size_bias()) == (50, 7e-5, 1.0, 1.0)
    assert [method.layers("vision", depth) for depth in (12, 24, 4, 3, 1)] == [
        [3, 6, 9], [6, 12, 18], [1, 2, 3], [0, 1, 2], [0],
    ]  # fmt: skip
    assert ToMe().r == 8
    for one in (method, PPT(r=3, beta=0), PPT(keep=0.5, threshold=1)):
        assert Plan.from_dict(Plan(vision=one).to_dict()) == Plan(vision=one)


def test_published_work():
    """2.944 GMACs of DeiT-S are what the authors measure: 146, 96 and 48 patches behind blocks 3, 6 and 9."""
    method, tokens, width, macs = PPT(), 197, 384, 196 * 16 * 16 * 3 * 384
    for layer in range(12):
        macs += 4 * tokens * width**2 + 2 * tokens**2 * width
        if layer in method.layers("vision", 12):
            tokens -= method.merged(shown((tokens - 1,)))[0]
        macs += 8 * tokens * width**2
    assert tokens == 49
    assert macs / 1e9 == pytest.approx(2.944, rel=0.002)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPT(threshold=1.5), r"threshold must be a number in \[0, 1\], got 1\.5; the published value is 7e-5"),
        (lambda: PPT(threshold=float("nan")), "threshold.*nan"),
        (lambda: PPT(r=0), "r must be an integer >= 1.*0"),
        (lambda: PPT(r=4, keep=9), "give r .*r=4.*9"),
        (lambda: Plan(language=PPT()), "PPT is not defined for the language.*vision"),
        (lambda: Plan(vision=Stage(PPT(), placement="input")), 'PPT looks at the attention.*use "mid" or "post"'),
        (lambda: PPT(keep=9).validate(37, 2), "merge at most half.*at least 10"),
    ],
)
def test_bad_settings_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_attention_that_is_not_seen_is_refused():
    model = build("transformers/clip")
    before = testing.snapshot(model)
    model.set_attn_implementation("eager")
    with pytest.raises(saint.UnsupportedModelError, match='not seen with attn_implementation="eager"'):
        saint.apply(model, PPT(r=5))
    model.set_attn_implementation("sdpa")
    assert testing.snapshot(model) == before


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3"])
def test_towers_that_join_patches_are_refused(name):
    model = FAMILIES[name].build()
    with pytest.raises(saint.UnsupportedModelError, match="PPT merges patches of different squares"):
        saint.apply(model, Plan(vision=PPT(r=3)))


def test_in_front_of_a_language_model():
    """The tower of LLaVA, whose features are read behind a layer before the last; the rest is the decoder's."""
    from support.families import prompts

    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 3], [2, "1", 3]])
    plan = Plan(vision=Stage(PPT(r=3), layers=[0, 1]), language=Stage(Grid(0.5), layers=[1]))
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**inputs)
        trace = session.trace
    assert [entry.stage for entry in trace] == ["vision", "vision", "language"]
    assert trace[0].into is not None
    assert trace[2].tokens_in.tolist() == trace[1].tokens_out.tolist()
