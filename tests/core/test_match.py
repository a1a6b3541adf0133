"""Matching of the similarity graph."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import saint
from saint import graph, testing
from saint.methods import Match, ToMe
from saint.tokens import Candidates, Facts, TokenMap
from saint.vision.locate import locate
from support.families import FAMILIES, prompts
from support.models import NAMES, build, prepared

CPU = torch.device("cpu")


def proposals(similarity, rounds=2):
    """The definition, one source at a time: what each source that is taken has got, {source: (target, cosine)}."""
    held = {}
    for _ in range(rounds):
        taken = {i for i, _ in held.values()}
        asked = {}
        for i, row in enumerate(similarity.tolist()):
            open_to = [j for j in range(len(row)) if j not in held or row[j] > held[j][1]]
            if i not in taken and open_to:
                j = max(open_to, key=lambda j: row[j])
                asked.setdefault(j, []).append((i, row[j]))
        for j, proposers in asked.items():
            held[j] = max(proposers, key=lambda pair: pair[1])
    return {i: (j, value) for j, (i, value) in held.items()}


def greedy(similarity):
    """Edges in descending order, each token in one pair at most."""
    count, others = similarity.shape
    edges = sorted(
        ((float(similarity[i, j]), i, j) for i in range(count) for j in range(others)), key=lambda edge: -edge[0]
    )
    found = {}
    for value, i, j in edges:
        if i not in found and j not in {t for t, _ in found.values()}:
            found[i] = (j, value)
    return found


@given(seed=st.integers(0, 10**6))
def test_more_proposals_would_end_in_greedy_matching(seed):
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    assert proposals(similarity, rounds=25) == greedy(similarity)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 17), columns=st.sampled_from([None, 3, 4]))
def test_pairs_are_those_of_two_rounds_of_proposals(seed, count, columns):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, count, 4, generator=generator)
    index = torch.arange(2 * count)[torch.randperm(2 * count, generator=generator)[:count].sort().values]
    pairs = graph.pair(keys, index[None], columns)

    points = torch.nn.functional.normalize(keys[0], dim=-1)
    place = index.tolist() if columns is None else [walk(n, columns) for n in index.tolist()]
    order = sorted(range(count), key=lambda n: place[n])
    source, target = order[0::2], order[1::2]
    expected = proposals(points[source] @ points[target].T)
    crowd = (points @ points.T).sum(1)
    for i, slot in enumerate(source):
        if i not in expected:  # an odd one out: behind all pairs
            assert pairs.similarity[0, i] < -2
            continue
        j, value = expected[i]
        other = target[j]
        assert float(pairs.similarity[0, i]) == pytest.approx(value, abs=1e-5)
        assert {int(pairs.leaves[0, i]), int(pairs.stays[0, i])} == {slot, other}
        if abs(crowd[slot] - crowd[other]) > 1e-4:
            assert int(pairs.leaves[0, i]) == (slot if crowd[slot] > crowd[other] else other)


def walk(place, columns):
    row, column = divmod(place, columns)
    return row * columns + (columns - 1 - column if row % 2 else column)


@pytest.mark.parametrize("columns", [5, 14])
def test_the_snake_makes_a_chessboard(columns):
    places = torch.arange(6 * columns)
    rank = graph.snake(places, columns)
    assert sorted(rank.tolist()) == places.tolist()
    assert rank.tolist() == [walk(n, columns) for n in places.tolist()]
    assert torch.equal(rank % 2, (places // columns + places % columns) % 2)


def shown(keys, lengths, columns=None):
    count = keys.shape[1]
    valid = torch.arange(count) < torch.tensor(lengths).unsqueeze(1)
    tokens = TokenMap(
        torch.arange(count).expand(len(lengths), count),
        tuple(lengths),
        (count,) * len(lengths),
        count,
        None if min(lengths) == count else valid,
    )
    return Candidates(keys, keys, tokens, 0, 1, facts=Facts(columns=columns))


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(3, 16), min_size=1, max_size=4))
def test_samples_and_padding_do_not_meet(seed, lengths):
    keys = torch.randn(len(lengths), max(lengths), 3, generator=torch.Generator().manual_seed(seed))
    method = Match(threshold=0.5, floor=0.0)
    together = method.select(shown(keys, lengths, 4))
    for b, n in enumerate(lengths):
        alone = method.select(shown(keys[b : b + 1, :n], [n], 4))
        mine = list(range(n)) if together is None else together.slots[b, : together.lengths[b]].tolist()
        assert mine == (list(range(n)) if alone is None else alone.slots[0].tolist())


def test_a_token_leaves_only_beside_a_partner_that_stays():
    keys = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    method = Match(threshold=0.9, floor=0.0)
    chosen = method.select(shown(keys, [60, 60], 10))
    pairs = graph.pair(keys, torch.arange(60).expand(2, 60), 10)
    for b in range(2):
        near = pairs.similarity[b] >= 0.9
        assert 5 < int(near.sum()) == 60 - chosen.lengths[b]
        kept = set(chosen.slots[b, : chosen.lengths[b]].tolist())
        assert not kept & set(pairs.leaves[b][near].tolist())
        assert set(pairs.stays[b][near].tolist()) <= kept


def test_equal_tokens_leave_in_order():
    chosen = Match(keep=0.5).select(shown(torch.ones(1, 12, 4), [12]))
    assert chosen.slots[0].tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Match(threshold=2), "threshold must be a cosine"),
        (lambda: Match(keep="batch"), "keep must be"),
        (lambda: Match(center=1), "center must be True or False"),
        (lambda: Match(floor=-1), "floor must be a number"),
        (lambda: Match(fate="keep"), "fate must be one of drop, weigh, merge"),
        (lambda: Match(beta=-1), "beta must be a number"),
        (lambda: Match(keep=0.4).validate(100, 1), "can drop at most half"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=4).eval()


@pytest.mark.parametrize("keep", [None, 0.4])
def test_a_pruned_encoder_equals_its_oracle(vit, keep):
    plan = saint.Plan(vision=saint.Stage(Match(threshold=0.5, keep=keep), layers=[0, 2]))
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, trace = testing.masked_oracle(vit, plan, {"x": x})
        with saint.apply(vit, plan):
            pruned = vit(x)
    assert int(trace[-1].tokens_out.max()) < 190
    assert torch.allclose(pruned, next(iter(expected.values())), atol=1e-5)


def test_the_encoder_says_how_wide_its_grid_is(vit):
    seen = []

    class Look:
        def candidates(self, stage, layer, candidates):
            seen.append(candidates.facts.columns)

    with torch.no_grad(), saint.apply(vit, Match(), observers=[Look()]):
        vit(torch.randn(1, 3, 224, 224))
    assert seen == [14, 14]  # every other of 4 layers


class Places:
    """Notes what a method is shown."""

    def __init__(self):
        self.seen = []

    def candidates(self, stage, layer, candidates):
        self.seen.append((stage, candidates))


@pytest.mark.parametrize("placement", ["input", "post"])
@pytest.mark.parametrize("name", NAMES)
def test_columns_of_every_encoder(name, placement):
    """The side of the grid where pictures lie on one, None where each has its own."""
    model, _, inputs = prepared(name)
    spec = locate(model)[2]
    look = Places()
    layers = None if placement == "input" else [0, 2]
    plan = saint.Stage(Match(keep=0.6), layers=layers, placement=placement)
    with torch.no_grad(), saint.pruned(model, plan, observers=[look]):
        testing.run(model, inputs)
    assert len(look.seen) >= 1
    for _, candidates in look.seen:
        assert candidates.tokens.width == 36
        assert candidates.facts.columns == (None if spec.patch is None else 6)
        assert candidates.facts.cells is None
        assert candidates.attention is None


@pytest.mark.parametrize("name", FAMILIES)
def test_columns_of_every_family(name):
    """Of a tower the side of its patches' grid where a candidate is one patch; of groups, packed towers and prompts none.

    So a match among groups is one along their order, not along the grid of the patches.
    """
    family = FAMILIES[name]
    if family.tower is None:
        pytest.skip("no tower")
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7]])
    look = Places()
    method = Match(keep=0.6)
    plan = saint.Plan(vision=saint.Stage(method, layers=[0]), language=saint.Stage(method, layers=[1]))
    with torch.no_grad(), saint.pruned(model, plan, observers=[look]) as session:
        model(**inputs)
        kept = session.trace[0].kept
    assert {stage for stage, _ in look.seen} == {"vision", "language"}
    for stage, candidates in look.seen:
        alone = stage == "vision" and family.merge_size == 1 and "image_grid_thw" not in inputs
        assert candidates.facts.columns == (round(candidates.tokens.width**0.5) if alone else None)
    shown = look.seen[0][1]
    goal = int(0.6 * shown.tokens.lengths[0] + 0.5)
    pairs = graph.pair(shown.keys, shown.tokens.index, shown.facts.columns, valid=shown.tokens.valid)
    best = pairs.similarity[0].argsort(descending=True, stable=True)[: shown.tokens.lengths[0] - goal]
    gone = set(pairs.leaves[0, best].tolist())
    assert kept[0].tolist() == [i for i in range(shown.tokens.lengths[0]) if i not in gone]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fate", ["weigh", "merge"])
@pytest.mark.parametrize("name", ["timm/dinov2-reg", "transformers/clip", "open_clip/vit", "timm/vit-avg"])
def test_who_stays_counts_for_who_left(name, fate, beta):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = saint.Plan(vision=saint.Stage(Match(keep=0.4, fate=fate, beta=beta), layers=[0, 2]))
    assert "merged oracle" in testing.check_oracle(model, plan, inputs)
    for contract in ("exact undo", "batch independence", "really on"):
        testing.CONTRACTS[contract](model, plan, inputs)


def test_a_weighed_token_keeps_its_features():
    model = build("transformers/clip")
    inputs = testing.example_inputs(model)
    seen = {}

    class Look:
        def layer(self, stage, layer, passed):
            seen[layer] = passed

    rows = {}
    for fate in ("drop", "weigh", "merge"):
        plan = saint.Plan(vision=saint.Stage(Match(keep=0.6, fate=fate), layers=[1], placement="post"))
        with torch.no_grad(), saint.apply(model, plan, observers=[Look()]) as session:
            testing.run(model, inputs)
            rows[fate] = seen[1].after
            into = session.trace[-1].into
        assert (into is None) == (fate == "drop")
    assert torch.equal(rows["drop"], rows["weigh"])
    assert not torch.equal(rows["drop"], rows["merge"])


@pytest.mark.parametrize("method", [Match(keep=0.4), Match(keep=0.4, fate="merge"), ToMe(keep=0.4)], ids=repr)
@pytest.mark.parametrize("placement", ["mid", "post"])
def test_a_dropped_token_is_carried_by_what_stands_for_it(method, placement):
    """Its row when it left, plus what the row that stands for it has changed by since: one token at a time."""
    model = build("timm/dinov2-reg")
    inputs = testing.example_inputs(model)
    shown = []

    class Look:
        def candidates(self, stage, layer, candidates):
            shown.append(candidates.features.clone())

    plain = saint.Plan(vision=saint.Stage(method, layers=[0, 2], placement=placement, output="similar"))
    carried = saint.Plan(vision=saint.Stage(method, layers=[0, 2], placement=placement, output="carried"))
    blocks = []
    hook = model.blocks[-1].register_forward_hook(lambda _m, _a, y: blocks.append(y.detach()))
    with torch.no_grad():
        for plan in (plain, carried):
            with saint.apply(model, plan, observers=[Look()]) as session:
                testing.run(model, inputs)
                states = list(session._stacks[0].forward.drops.values())
    hook.remove()
    similar, found = blocks
    prefix = found.shape[1] - states[0][0].tokens.slots
    assert torch.equal(similar[:, :prefix], found[:, :prefix])
    shown = shown[2:]  # of the second forward, in front of each drop point
    for b in range(len(found)):
        slot = {i: i for i in range(states[0][0].tokens.slots)}  # of each original token, what stands for it now
        offset = {i: 0.0 for i in slot}
        for (before, after), rows in zip(states, shown, strict=True):
            first = after.stand_ins if before.stand_ins is None else None
            kept_now = set(after.tokens.index[b].tolist())
            for i in list(slot):
                now = int(first[b, i]) if first is not None else int(after.stand_ins[b, i])
                kept = after.tokens.index[b, now]
                old = (before.tokens.index[b] == kept).nonzero().item()
                survivor = (
                    rows[b, old] if not method.averages or not method.merges else mean(rows[b], before, after, b, now)
                )
                offset[i] = 0.0 if i in kept_now else offset[i] + rows[b, slot[i]] - survivor
                slot[i] = now
        for i in slot:
            assert torch.allclose(found[b, prefix + i], similar[b, prefix + i] + offset[i], atol=1e-5)


@pytest.mark.parametrize(
    "stages", [[{"layers": [0, 2]}], [{"placement": "input"}, {"layers": [1]}]], ids=["layers", "input"]
)
def test_gradients_reach_what_a_carried_token_was(stages):
    model = build("timm/vit-augreg")
    x = testing.example_inputs(model)["x"]
    found = []
    for output in ("similar", "carried"):
        pixels = x.clone().requires_grad_()
        several = [saint.Stage(saint.methods.Random(keep=0.5), output=output, **stage) for stage in stages]
        with saint.pruned(model, saint.Plan(vision=several)) as session:
            model.forward_features(pixels)[:, 1:].square().sum().backward()
            kept = session.trace[0].kept
        side = x.shape[-1] // model.patch_embed.grid_size[1]
        blocks = pixels.grad.unfold(2, side, side).unfold(3, side, side).abs().sum((1, 4, 5)).flatten(1)  # [B, N]
        gone = torch.ones(blocks.shape, dtype=torch.bool)
        for b, rows in enumerate(kept):
            gone[b, rows] = False
        found.append(float(blocks[gone].min()))
    if stages[0].get("placement") == "input":
        assert found[0] == 0  # dropped in front of everything: nothing of them is in the output
    assert found[1] > 0


def test_gradients_of_carried_tokens_in_checkpointed_blocks():
    model = build("timm/vit-augreg")
    x = testing.example_inputs(model)["x"]
    stage = saint.Stage(Match(keep=0.5), layers=[0, 2], output="carried")
    found = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        pixels = x.clone().requires_grad_()
        with saint.pruned(model, stage):
            model(pixels).square().sum().backward()
        found.append(pixels.grad)
        model.set_grad_checkpointing(False)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def mean(rows, before, after, b, now):
    """Of the slots that became ``now``, weighted by what they stand for."""
    was = torch.arange(before.tokens.width) if before.merged_into is None else before.merged_into[b]
    return torch.stack([rows[int(was[i])] for i in (after.merged_into[b] == now).nonzero().flatten()]).mean(0)


@pytest.mark.parametrize(
    "method", [Match(keep=0.6, fate="weigh"), Match(keep=0.6, fate="merge"), ToMe(keep=0.6)], ids=repr
)
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("timm/dinov2-reg", "survivors"),
        ("timm/dinov2-reg", "carried"),
        ("transformers/clip", "survivors"),
        ("transformers/clip", "carried"),
        ("timm/vit-avg", "survivors"),
    ],
)
def test_tokens_that_become_one_in_front_of_the_layers(name, method, output):
    model = build(name)
    inputs = testing.example_inputs(model)
    first = saint.Stage(method, placement="input", output=output)
    plan = saint.Plan(vision=[first, saint.Stage(method, layers=[1], output=output)])
    assert "merged oracle" in testing.check_oracle(model, plan, inputs)
    for contract in ("exact undo", "batch independence", "really on"):
        testing.CONTRACTS[contract](model, plan, inputs)


@pytest.mark.parametrize("method", [Match(keep=0.5), Match(keep=0.5, fate="merge"), ToMe(keep=0.5)], ids=repr)
def test_maps_of_intermediate_layers_change_nothing_behind_them(method):
    """Each layer's map is expanded to full length, and the next layer goes on with what was there before."""
    model = build("timm/dinov2-reg")
    x = testing.example_inputs(model)["x"]
    plan = saint.Plan(vision=saint.Stage(method, layers=[0, 2], output="carried"))
    with torch.no_grad(), saint.pruned(model, plan):
        last = model.forward_features(x)
        maps = model.get_intermediate_layers(x, n=len(model.blocks), norm=True)
    prefix = last.shape[1] - maps[-1].shape[1]
    assert torch.allclose(maps[-1], last[:, prefix:], atol=1e-5)


@given(seed=st.integers(0, 10**6))
def test_what_leaves_beside_a_token_that_leaves_goes_where_that_goes(seed):
    keys = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(seed))
    chosen = Match(keep=0.5, fate="merge").select(shown(keys, [24], 4))
    pairs = graph.pair(keys, torch.arange(24)[None], 4)
    partner = dict(zip(pairs.leaves[0].tolist(), pairs.stays[0].tolist(), strict=True))  # half leave: all of them
    for slot in range(24):
        into = slot
        while into in partner:
            into = partner[into]
        assert int(chosen.slots[0, chosen.owner[0, slot]]) == into
