"""What a method is shown: exactly the keys that attention received, the residual stream at the drop point, the attention row.

The masked oracle takes its decisions from the pruned run, so it holds for any keys. Here torch's own
``scaled_dot_product_attention`` is listened to: the head mean of its key argument is what a method must get.

Keys are those *before* rotary embedding in encoders (it would make the same patch look different at every place), and those
*after* it in language models (they are what is cached).
"""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

import saint
from saint import testing
from saint.methods import Random
from saint.plans import Plan, Stage
from saint.testing.blocks import block_spec
from saint.vision.locate import locate
from support.families import FAMILIES, IMAGE, prompts
from support.models import BUILDERS, build, enliven
from support.oracles import Oracle, members, nearest

TOWERS = [name for name, family in FAMILIES.items() if family.tower]


@dataclasses.dataclass(frozen=True)
class Spy(Random):
    """Drops like its parent, and keeps what it was shown."""

    seen: list = dataclasses.field(default_factory=list, compare=False)
    needs = frozenset()

    def select(self, candidates):
        self.seen.append(candidates)
        return super().select(candidates)


class AttentionSpy(Spy):
    stages = frozenset({"language"})
    needs = frozenset({"last_query"})


@dataclasses.dataclass
class Call:
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scale: float | None


@contextmanager
def listening(monkeypatch, layers: nn.ModuleList) -> Iterator[dict[int, list[Call]]]:
    """Every call of torch's attention, by the layer that made it."""
    calls: dict[int, list[Call]] = {}
    current: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def listen(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if current:
            calls.setdefault(current[-1], []).append(Call(query, key, attn_mask, is_causal, scale))
        return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack, monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", listen)
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel is not listened to
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for index, layer in enumerate(layers):
            enter = layer.register_forward_pre_hook(lambda *_, index=index: current.append(index))
            leave = layer.register_forward_hook(lambda *_: current.clear())
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield calls


def unrotated(kwargs: dict) -> dict | None:
    """The arguments of an attention with rotary tables that turn nothing; None where there is no table."""
    if isinstance(table := kwargs.get("rope"), torch.Tensor):
        half = table.shape[-1] // 2
        return {
            **kwargs,
            "rope": torch.cat([torch.zeros_like(table[..., :half]), torch.ones_like(table[..., half:])], -1),
        }
    if isinstance(tables := kwargs.get("position_embeddings"), tuple):
        return {**kwargs, "position_embeddings": (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))}
    return None


def attention_of(block: nn.Module) -> nn.Module:
    if hasattr(block, "attns"):  # parallel attentions
        return block.attns[0].attn
    found = (getattr(block, name, None) for name in ("attn", "self_attn", "attention"))
    return next((part for part in found if isinstance(part, nn.Module)), block)


def second_half(block: nn.Module) -> nn.Module:
    """The module whose input is the residual stream between the halves: the second norm, or the MLP of a post-norm block; the
    block itself where there is no place between them."""
    if hasattr(block, "ffns"):  # parallel MLPs
        return block.ffns[0].norm
    names = ("mlp",) if "Post" in type(block).__name__ else ("norm2", "ln_2", "layernorm_after", "layer_norm2")
    return next((part for name in names if isinstance(part := getattr(block, name, None), nn.Module)), block)


class Watched:
    """One pruned forward: keys per layer [B, P + N, D], before rotary, and the residual stream behind each half."""

    def __init__(self, monkeypatch, blocks: nn.ModuleList, run, packed: bool = False) -> None:
        self.packed = packed
        given: dict[int, tuple] = {}
        self.middle: dict[int, torch.Tensor] = {}
        self.entering: dict[int, torch.Tensor] = {}
        self.rotated: dict[int, torch.Tensor] = {}
        with ExitStack() as stack:
            calls = stack.enter_context(listening(monkeypatch, blocks))
            for index, block in enumerate(blocks):
                hooks = [
                    attention_of(block).register_forward_pre_hook(
                        lambda m, a, k, index=index: given.__setitem__(index, (m, a, k)), with_kwargs=True
                    ),
                    second_half(block).register_forward_pre_hook(
                        lambda _m, a, index=index: self.middle.__setitem__(index, a[0].detach().clone())
                    ),
                    block.register_forward_pre_hook(
                        lambda _m, a, k, index=index: self.entering.__setitem__(
                            index, (a or tuple(k.values()))[0].detach().clone()
                        ),
                        with_kwargs=True,
                    ),
                ]
                for hook in hooks:
                    stack.callback(hook.remove)
            with torch.no_grad():
                run()
            self.keys = {index: self._mean(made) for index, made in calls.items()}
            for index, (module, args, kwargs) in given.items():
                if (plain := unrotated(kwargs)) is not None:
                    self.rotated[index] = self.keys[index]
                    with listening(monkeypatch, nn.ModuleList([module])) as again, torch.no_grad():
                        module(*args, **plain)
                    self.keys[index] = self._mean(again[0])

    def _mean(self, calls: list[Call]) -> torch.Tensor:
        """Head means; segments of a packed sequence follow one another, heads of parallel attentions are heads as well."""
        means = [call.key.detach().double().mean(1) for call in calls]
        return (torch.cat(means, 1) if self.packed else torch.stack(means).mean(0)).float()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max())))


# -- encoders -----------------------------------------------------------------------------------------------------------


def _post_norm(name: str, **more: object) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=48, depth=4, num_heads=3, img_size=96, num_classes=7, **more)
    return enliven(model.eval())


def _res_post() -> nn.Module:
    import timm

    return _post_norm("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock)


EXTRA = {
    "timm/res-post": _res_post,
    "timm/eva-post": lambda: _post_norm("eva02_base_patch16_clip_224", use_post_norm=True),
    "timm/eva-qk-norm-bias": lambda: _post_norm("vit_small_patch16_rope_mixed_224", qkv_bias=True, qk_norm=True),
    "timm/vit-without-bias": lambda: _post_norm("vit_tiny_patch16_224", qkv_bias=False),
}


@functools.cache
def prepared(name: str):
    try:
        model = build(name) if name in BUILDERS else EXTRA[name]()
    except TypeError as error:
        pytest.skip(f"an older timm: {error}")
    return model, testing.example_inputs(model)


@pytest.mark.parametrize("placement", ["mid", "post"])
@pytest.mark.parametrize("name", [*BUILDERS, *EXTRA])
def test_an_encoder_scores_the_keys_that_attention_received(name, placement, monkeypatch):
    model, inputs = prepared(name)
    _, encoder, row = locate(model)
    blocks, prefix = encoder.get_submodule(row.blocks), row.prefix(encoder)
    if placement == "mid" and not all(block_spec(block, row).seam for block in blocks):
        pytest.skip("tokens cannot go between attention and MLP of this block")
    spy = Spy(0.5, seed=1)

    with saint.pruned(model, Stage(spy, layers=[0, 2], placement=placement)) as session:
        watched = Watched(monkeypatch, blocks, lambda: model(**inputs))
        trace = session.trace

    assert [given.step for given in spy.seen] == [0, 1]
    assert {given.steps for given in spy.seen} == {2}
    for given, layer, entry in zip(spy.seen, (0, 2), trace, strict=True):
        keys, tokens = watched.keys[layer][:, prefix:], given.tokens
        where = watched.middle[layer] if placement == "mid" else watched.entering[layer + 1]
        for sample, kept in enumerate(entry.kept):
            here = torch.arange(tokens.slots) if tokens.valid is None else tokens.valid[sample].nonzero().flatten()
            assert close(given.keys[sample, here], keys[sample, here])
            # of the residual stream the survivors can be seen
            slots = torch.isin(tokens.index[sample, here], kept).nonzero().flatten()
            assert len(slots) == len(kept) < len(here)
            assert close(given.features[sample, here[slots]], where[sample, prefix : prefix + len(kept)])
        if layer in watched.rotated:
            assert not close(given.keys, watched.rotated[layer][:, prefix:]), "the keys are those behind rotary"


@pytest.mark.parametrize("name", ["timm/vit-augreg", "open_clip/vit", "transformers/clip", "timm/dinov3"])
def test_every_token_of_the_residual_stream_is_shown(name):
    """The first drop point sees the unpruned stream, dropped tokens included."""
    model, inputs = prepared(name)
    _, encoder, row = locate(model)
    block, prefix = encoder.get_submodule(row.blocks)[1], row.prefix(encoder)
    stream = {}
    hooks = [
        second_half(block).register_forward_pre_hook(lambda _m, a: stream.__setitem__("mid", a[0].detach())),
        block.register_forward_hook(lambda _m, _a, y: stream.__setitem__("post", y.detach())),
    ]
    testing.run(model, inputs)
    for hook in hooks:
        hook.remove()
    for placement, want in stream.items():
        spy = Spy(0.5)
        with saint.pruned(model, Stage(spy, layers=[1], placement=placement)):
            testing.run(model, inputs)
        assert close(spy.seen[0].features, want[:, prefix:])
        assert spy.seen[0].attention is None


# -- towers -------------------------------------------------------------------------------------------------------------

SAMPLES = [[4, "0", 3, "1", 2], [9], [2, "1", 3]]  # several images, none, one


@functools.cache
def family_model(name: str) -> nn.Module:
    return FAMILIES[name].build()


def patches_of_groups(family, model, inputs, total: tuple[int, ...]) -> list[torch.Tensor]:
    """For each image, the places in the tower's sequence of the patches of each visual token, int64 [N, M]."""
    if family.merge_size == 1:
        return [torch.arange(n).unsqueeze(1) + family.prefix for n in total]
    if "image_grid_thw" not in inputs:
        return [members(family, n) + family.prefix for n in total]
    size = family.merge_size**2
    order = Oracle(family, model, [], inputs).in_sequence(torch.arange(sum(total)))  # group at each place
    places = torch.argsort(order, stable=True).view(-1, size)
    return list(places.split(list(total)))


@pytest.mark.parametrize("placement", ["mid", "post"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_scores_the_keys_that_attention_received(name, placement, monkeypatch):
    family, model = FAMILIES[name], family_model(name)
    inputs = prompts(family, model, SAMPLES)
    packed = "image_grid_thw" in inputs
    spy = Spy(0.5, seed=2)

    plan = Plan(vision=Stage(spy, layers=[0, 2], placement=placement))
    with saint.pruned(model, plan) as session:
        watched = Watched(
            monkeypatch, model.get_submodule(family.tower), lambda: model(**inputs), packed="qwen" in family.name
        )
        trace = session.trace

    assert [given.step for given in spy.seen] == [0, 1]
    groups = patches_of_groups(family, model, inputs, spy.seen[0].tokens.total)

    def rows(kept: list[torch.Tensor]) -> list[torch.Tensor]:
        """Where, in a sequence of what is left, the patches of each group that is left stand: int64 [K, M] per image."""
        own = [places[index] for places, index in zip(groups, kept, strict=True)]
        together = torch.cat([part.flatten() for part in own]).sort().values
        if packed:
            return [torch.searchsorted(together, part) for part in own]
        return [torch.searchsorted(part.flatten().sort().values, part) + family.prefix for part in own]

    every = [torch.arange(n) for n in spy.seen[0].tokens.total]
    for given, layer, before, entry in zip(spy.seen, (0, 2), (every, trace[0].kept), trace, strict=True):
        stream = watched.middle[layer] if placement == "mid" else watched.entering[layer + 1]
        stream = stream.view(1, -1, stream.shape[-1]) if packed else stream
        restored = (
            placement == "post" and name == "qwen3-vl"
        )  # full length between blocks, for the mergers of DeepStack
        behind = rows(every) if restored else rows(entry.kept)
        for image, (index, slots) in enumerate(zip(before, rows(before), strict=True)):
            row = 0 if packed else image
            assert given.tokens.index[image, : len(index)].tolist() == index.tolist()
            assert close(given.keys[image, : len(index)], watched.keys[layer][row][slots].mean(1))
            # of the residual stream the survivors can be seen
            stay = entry.kept[image]
            after = behind[image][stay] if restored else behind[image]
            assert close(given.features[image, torch.searchsorted(index, stay)], stream[row][after].mean(1))
    if watched.rotated:
        assert not close(watched.keys[0], watched.rotated[0])


# -- language models ----------------------------------------------------------------------------------------------------


def probabilities(call: Call, queries: list[int]) -> torch.Tensor:
    """Attention of one query per sample, averaged over heads, float64 [B, T]."""
    query, key = call.query.double(), call.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = call.scale if call.scale is not None else query.shape[-1] ** -0.5
    logits = query @ key.mT * scale
    if call.causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if call.mask is not None:
        hidden = ~call.mask if call.mask.dtype == torch.bool else call.mask < -1e30
        logits = logits.masked_fill(hidden, -torch.inf)
    rows = logits[torch.arange(len(queries)), :, torch.tensor(queries)]
    return rows.softmax(-1).mean(1)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "no mask"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_language_model_scores_the_keys_and_the_row_that_attention_computed(name, padded, monkeypatch):
    family, model = FAMILIES[name], family_model(name)
    batch = [[4, "0", 7], [3, "1", 2, "0", 3], [2, "0", 12]] if padded else [[4, "0", 7]]
    inputs = prompts(family, model, batch)
    layers = model.get_submodule(family.decoder)
    spy = AttentionSpy(0.5, seed=3)
    entering = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, a, k, index=index: entering.__setitem__(index, (a or tuple(k.values()))[0].clone()),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]

    with saint.pruned(model, Plan(language=Stage(spy, layers=[1, 3]))) as session, torch.no_grad():
        with listening(monkeypatch, layers) as calls:
            model(**inputs)
        trace = session.trace
    for hook in hooks:
        hook.remove()

    assert [(given.step, given.steps) for given in spy.seen] == [(0, 2), (1, 2)]
    seen = (inputs["input_ids"] == IMAGE).tolist()
    length = len(seen[0])
    for given, layer, before in zip(spy.seen, (1, 3), (None, trace[0]), strict=True):
        call = calls[layer][0]  # the layer's own; the row is computed by eager attention, without this function
        keys = call.key.double().mean(1).float()
        sequences, slots = [], []
        for sample, row in enumerate(seen):
            visual = [place for place in range(length) if row[place]]
            kept = range(len(visual)) if before is None else before.kept[sample].tolist()
            there = {visual[i] for i in kept}
            left = [place for place in range(length) if not row[place] or place in there]
            sequences.append(left)
            slots.append([left.index(visual[i]) for i in kept])
        attention = probabilities(call, [len(left) - 1 for left in sequences])
        for sample, own in enumerate(slots):
            count = len(own)
            assert close(given.keys[sample, :count], keys[sample, own])
            assert (given.attention[sample, :count] - attention[sample, own].float()).abs().max() < 1e-6
            assert given.attention.dtype == torch.float32
            stay = trace[0 if layer == 1 else 1].kept[sample]
            index = given.tokens.index[sample, :count]
            picked = torch.isin(index, stay).nonzero().flatten()
            nxt = [place for place in sequences[sample] if not seen[sample][place]]
            nxt += [sequences[sample][own[i]] for i in picked.tolist()]
            nxt = sorted(nxt)
            after = [nxt.index(sequences[sample][own[i]]) for i in picked.tolist()]
            if entering[layer + 1].shape[1] < length:  # DeepStack hands on full length between its layers
                assert close(given.features[sample, picked], entering[layer + 1][sample, after])


def test_the_last_token_of_a_ragged_prompt_without_any_mask(monkeypatch):
    """Prompts of one length with different numbers of visual tokens: behind a drop point the shorter ones are padded by us."""
    family, model = FAMILIES["llava-llama"], family_model("llava-llama")
    inputs = prompts(family, model, [[4, "0", 43], [4, "0", 3, "0", 4], [20, "0", 27]])
    assert bool(inputs.pop("attention_mask").all())
    layers = model.get_submodule(family.decoder)
    spy = AttentionSpy(0.3, seed=4)
    plan = Plan(language=Stage(spy, layers=[1, 3]))
    with saint.pruned(model, plan), torch.no_grad(), listening(monkeypatch, layers) as calls:
        model(**inputs)
    given, first = spy.seen[1], spy.seen[0]
    lengths = [83 - n + k for n, k in zip(first.tokens.lengths, given.tokens.lengths, strict=True)]
    assert len(set(lengths)) == 2
    call = calls[3][0]
    attention = probabilities(call, [n - 1 for n in lengths])
    keys = call.key.double().mean(1).float()
    for sample, (length, count) in enumerate(zip(lengths, given.tokens.lengths, strict=True)):
        # among the keys of this sample those of its visual tokens are found by value
        own = torch.cdist(given.keys[sample, :count], keys[sample, :length]).argmin(1)
        assert own.tolist() == sorted(set(own.tolist()))
        assert close(given.keys[sample, :count], keys[sample, own])
        assert (given.attention[sample, :count] - attention[sample, own].float()).abs().max() < 1e-6


def test_the_connector_is_shown_what_enters_the_language_model():
    for name in ("llava-llama", "qwen3-vl", "gemma3"):
        family, model = FAMILIES[name], family_model(name)
        inputs = prompts(family, model, [[4, "0", 7], [3, "1", 2, "0", 3]])
        embeddings = []
        text = model.get_submodule(family.decoder.rpartition(".")[0])
        hook = text.register_forward_pre_hook(
            lambda _m, _a, k, to=embeddings: to.append(k["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        spy = Spy(0.5)
        with saint.pruned(model, Plan(connector=spy)), torch.no_grad():
            model(**inputs)
        assert [(given.step, given.steps) for given in spy.seen] == [(0, 1)]
        for sample, places in enumerate(inputs["input_ids"] == IMAGE):
            want = embeddings[0][sample, places]
            for got in (spy.seen[0].keys, spy.seen[0].features):
                assert close(got[sample, : len(want)], want)


def test_behind_the_vision_stage_the_connector_is_shown_the_survivors():
    for name in ("llava-llama", "qwen3-vl", "gemma3"):
        family, model = FAMILIES[name], family_model(name)
        inputs = prompts(family, model, [[4, "0", 7], [3, "1", 2, "0", 3]])
        spy, entering = Spy(0.5), []
        text = model.get_submodule(family.decoder.rpartition(".")[0])
        plan = Plan(vision=Stage(Random(0.6), layers=[1]), connector=spy)
        with saint.pruned(model, plan) as session, torch.no_grad():
            hook = text.register_forward_pre_hook(
                lambda _m, _a, k, to=entering: to.append(k["inputs_embeds"]), with_kwargs=True
            )
            model(**inputs)
            hook.remove()
            entry = session.trace[0]  # counts images
        images = iter(zip(entry.tokens_in.tolist(), entry.kept, strict=True))
        for sample, places in enumerate(inputs["input_ids"] == IMAGE):
            rows, own = entering[0][sample, places], []
            while len(rows):
                count, kept = next(images)
                own.append(rows[:count][kept])
                rows = rows[count:]
            want = torch.cat(own)
            for got in (spy.seen[0].keys, spy.seen[0].features):
                assert close(got[sample, : len(want)], want)


# -- the patch grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 160), (160, 32), (64, 96), (128, 64)])
def test_rows_and_columns_of_the_grid(height, width):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=4, num_heads=3, dynamic_img_size=True)
    enliven(model.eval())
    rows, columns = height // 16, width // 16
    images = torch.randn(2, 3, height, width)
    with saint.pruned(model, Stage(Random(5, seed=1), layers=[1])) as session, torch.no_grad():
        short = model.forward_features(images)
        full = session.expand(short)
        maps = model.forward_intermediates(images, intermediates_only=True, norm=True)
        kept = [k.tolist() for k in session.trace[-1].kept]
    for sample, own in enumerate(kept):
        owner = nearest(own, rows, columns)
        assert torch.equal(full[sample, 1:], short[sample, 1:][owner])
        assert maps[-1].shape == (2, 48, rows, columns)
        cells = maps[-1][sample].flatten(1).T
        assert torch.allclose(cells, short[sample, 1:][owner], atol=1e-5)
    with saint.pruned(model, Stage(Random(5, seed=1), layers=[1], output="nearest")), torch.no_grad():
        assert torch.allclose(model.forward_features(images), full, atol=1e-5)


def test_hidden_states_of_every_layer_are_expanded_by_the_map_in_front_of_it():
    model, inputs = prepared("transformers/vit")
    with saint.pruned(model, Stage(Random(9, seed=2), layers=[0, 2])) as session, torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        left = [None, session.trace[0].kept, session.trace[0].kept, session.trace[1].kept, session.trace[1].kept]
        for layer, state in enumerate(states[:4]):  # behind the last block comes a norm
            full = session.expand(state, layer)
            bare = session.expand(state[:, 1:], layer)
            assert full.shape == (3, 37, 48)
            assert torch.equal(bare, full[:, 1:])
            for sample in range(3):
                kept = list(range(36)) if left[layer] is None else left[layer][sample].tolist()
                assert torch.equal(full[sample, 0], state[sample, 0])
                assert torch.equal(full[sample, 1:], state[sample, 1:][nearest(kept, 6, 6)])
