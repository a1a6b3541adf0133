"""Token maps, gathers, graphs, schedules and plans against literal loops, over inputs that hypothesis makes up.

Always the same examples (``derandomize``), so a failure here is a failure everywhere.
"""

import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saint import gathers, graph, greedy, methods, tokens
from saint.methods.base import check_steps, final_keep, floored, goals, host_counts, scheduled_keep
from saint.plans import Plan, Stage
from saint.runtime.state import packed_groups, squares
from saint.tokens import Candidates, Selection, TokenMap

CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def maps(draw, least: int = 1) -> TokenMap:
    """The model's own padding, and up to two earlier drops."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(max(2, least), 12))
    total = [draw(st.integers(least, width)) for _ in range(batch)]
    total[draw(st.integers(0, batch - 1))] = width
    valid = None if min(total) == width else torch.arange(width) < torch.tensor(total).unsqueeze(1)
    current = TokenMap.full(batch, width, CPU, valid)
    for _ in range(draw(st.integers(0, 2))):
        lengths = tuple(draw(st.integers(min(least, n), n)) for n in current.lengths)
        score = noise(batch, current.slots, seed=draw(st.integers(0, 99)))
        current = current.select(Selection.from_scores(score, lengths, current))
    return current


@st.composite
def choices(draw, least: int = 1) -> tuple[TokenMap, Selection]:
    """A map and a selection of its slots."""
    current = draw(maps(least))
    lengths = tuple(draw(st.integers(min(least, n), n)) for n in current.lengths)
    score = noise(current.index.shape[0], current.slots, seed=draw(st.integers(0, 99)))
    return current, Selection.from_scores(score, lengths, current)


def slots_of(current: TokenMap) -> list[list[int]]:
    return [
        list(range(current.slots)) if current.valid is None else current.valid[b].nonzero().flatten().tolist()
        for b in range(current.index.shape[0])
    ]


def rows_of(selection: Selection) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(selection.slots, selection.lengths, strict=True)]


def stays(selection: Selection) -> None:
    """What every selection is: ascending, padded on the right only, and without a mask where nothing is padded."""
    assert selection.slots.shape[1] == max(selection.lengths)
    assert all(row == sorted(set(row)) for row in rows_of(selection))
    even = len(set(selection.lengths)) == 1
    assert (selection.valid is None) == even
    if not even:
        want = [[i < n for i in range(max(selection.lengths))] for n in selection.lengths]
        assert selection.valid.tolist() == want


# -- selections and maps ------------------------------------------------------------------------------------------------


@few
@given(choices(), st.data())
def test_selections_keep_what_they_say(made, data):
    current, chosen = made
    stays(chosen)
    here = slots_of(current)
    assert all(set(row) <= set(own) for row, own in zip(rows_of(chosen), here, strict=True))
    after = current.select(chosen)
    assert (after.lengths, after.total, after.width) == (chosen.lengths, current.total, current.width)
    assert after.nothing_dropped == (chosen.lengths == current.total)
    assert after.slots == max(chosen.lengths)
    for kept, row, index in zip(after.kept(), rows_of(chosen), current.index, strict=True):
        assert kept.tolist() == [int(index[slot]) for slot in row]
    # the other ways to say the same
    keep = torch.zeros(len(here), current.slots, dtype=torch.bool)
    for b, row in enumerate(rows_of(chosen)):
        keep[b, row] = True
    same = Selection.from_mask(keep, chosen.lengths)
    stays(same)
    assert rows_of(same) == rows_of(chosen)
    drop = tuple(n - k for n, k in zip(current.lengths, chosen.lengths, strict=True))
    orders = []
    for b, own in enumerate(here):
        gone = data.draw(st.permutations([slot for slot in own if not keep[b, slot]]))
        rest = [slot for slot in own if keep[b, slot]]
        orders.append([*gone, *rest, *(s for s in range(current.slots) if s not in own)])
    ordered = Selection.from_order(torch.tensor(orders), drop, current)
    stays(ordered)
    assert rows_of(ordered) == rows_of(chosen)


@few
@given(maps(), st.data())
def test_the_highest_scores_stay_and_the_earlier_of_equals(current, data):
    batch = current.index.shape[0]
    score = torch.tensor(
        [[data.draw(st.integers(0, 3)) for _ in range(current.slots)] for _ in range(batch)], dtype=torch.int64
    )
    lengths = tuple(data.draw(st.integers(1, n)) for n in current.lengths)
    chosen = Selection.from_scores(score, lengths, current)
    stays(chosen)
    for b, (own, n) in enumerate(zip(slots_of(current), lengths, strict=True)):
        assert rows_of(chosen)[b] == sorted(sorted(own, key=lambda s: (-int(score[b, s]), s))[:n])


@few
@given(choices(), st.integers(0, 3), st.integers(0, 99))
def test_gathers_are_the_rows_one_by_one(made, prefix, seed):
    current, chosen = made
    after = current.select(chosen)
    batch, slots, width = after.index.shape[0], current.slots, current.width
    x = noise(batch, prefix + slots, 3, seed=seed)
    short = gathers.gather_tokens(x, chosen.slots, prefix)
    entries = gathers.gather_along(x[:, None, prefix:].expand(-1, 2, -1, -1), chosen.slots, 2)
    assert short.shape == (batch, prefix + max(chosen.lengths), 3)
    table, per_head = noise(width, 4, seed=seed), noise(2, width, 4, seed=seed)
    shared, headed = gathers.gather_table(table, after), gathers.gather_table(per_head, after)
    mask = noise(batch, 1, prefix + width, prefix + width, seed=seed)
    columns_only = gathers.gather_mask(mask[:, :, :1], after, prefix)
    both = gathers.gather_mask(mask, after, prefix)
    one_for_all = gathers.gather_mask(mask[:1], after, prefix)
    full = gathers.full_length(short, after, prefix, -7.0)
    lost = ~after.here
    seen = gathers.visible(after, prefix)
    for b, (row, kept) in enumerate(zip(rows_of(chosen), after.kept(), strict=True)):
        n = prefix + len(row)
        assert torch.equal(short[b, :n], x[b, [*range(prefix), *(prefix + slot for slot in row)]])
        assert torch.equal(entries[b, 1, : len(row)], x[b, [prefix + slot for slot in row]])
        rotary, heads = (shared, headed) if batch == 1 else (shared[b, 0], headed[b])
        assert torch.equal(rotary[: len(row)], table[kept])
        assert torch.equal(heads[:, : len(row)], per_head[:, kept])
        places = [*range(prefix), *(prefix + kept).tolist()]
        assert torch.equal(both[b, 0, :n, :n], mask[b, 0][places][:, places])
        assert torch.equal(one_for_all[b, 0, :n, :n], mask[0, 0][places][:, places])
        assert torch.equal(columns_only[b, 0, 0, :n], mask[b, 0, 0][places])
        for index in range(width):
            where = kept.tolist().index(index) if index in kept else None
            assert bool(lost[b, index]) == (where is None)
            assert torch.equal(
                full[b, prefix + index], torch.full((3,), -7.0) if where is None else short[b, prefix + where]
            )
        assert torch.equal(full[b, :prefix], x[b, :prefix])
        if seen is not None:
            assert seen[b].tolist() == [i < n for i in range(short.shape[1])]
    assert (seen is None) == (after.valid is None)


@few
@given(choices(), st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_padding_is_the_mean_of_what_is_real(made, prefix, with_prefix, seed):
    current, chosen = made
    after = current.select(chosen)
    x = noise(after.index.shape[0], prefix + after.slots, 3, seed=seed)
    filled = gathers.fill_padding(x, after, prefix, with_prefix=with_prefix)
    for b, n in enumerate(after.lengths):
        assert torch.equal(filled[b, : prefix + n], x[b, : prefix + n])
        if n < after.slots:
            want = x[b, 0 if with_prefix else prefix : prefix + n].mean(0)
            assert torch.allclose(filled[b, prefix + n :], want.expand(after.slots - n, -1), atol=1e-6)


@few
@given(choices(), st.integers(1, 4), st.integers(0, 99))
def test_survivors_stand_for_the_dropped(made, columns, seed):
    current, chosen = made
    after = current.select(chosen)
    if after.width % columns == 0:
        owner = gathers.nearest_survivor(after, (after.width // columns, columns))
        for b, kept in enumerate(after.kept()):
            for cell in range(after.width):
                far = [
                    (cell // columns - k // columns) ** 2 + (cell % columns - k % columns) ** 2 for k in kept.tolist()
                ]
                assert int(owner[b, cell]) == far.index(min(far))
    points = graph.metric(noise(after.index.shape[0], current.slots, 5, seed=seed))
    similar = gathers.similar_survivor(points, chosen)
    for b, row in enumerate(rows_of(chosen)):
        for slot in slots_of(current)[b]:
            best = [float(points[b, slot].double() @ points[b, k].double()) for k in row]
            assert int(similar[b, slot]) == (row.index(slot) if slot in row else best.index(max(best)))


@few
@given(maps(least=2), st.data())
def test_merging_is_a_weighted_mean(current, data):
    batch, slots = current.index.shape
    into = torch.arange(slots).expand(batch, -1).clone()
    lengths = []
    for b, own in enumerate(slots_of(current)):
        targets = data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True))
        for slot in own:
            into[b, slot] = slot if slot in targets else data.draw(st.sampled_from(targets))
        lengths.append(len(targets))
    chosen = Selection.merging(into, tuple(lengths), current)
    stays(chosen)
    x, sizes = noise(batch, 1 + slots, 3, seed=slots), torch.zeros(batch, slots)
    for b, own in enumerate(slots_of(current)):
        sizes[b, own] = torch.tensor([float(data.draw(st.integers(1, 4))) for _ in own])
    merged, total = gathers.merge_tokens(x, sizes, chosen, 1)
    assert torch.equal(merged[:, :1], x[:, :1])
    for b, row in enumerate(rows_of(chosen)):
        for new, slot in enumerate(row):
            group = [s for s in slots_of(current)[b] if int(into[b, s]) == slot]
            weight = sizes[b, group]
            want = (x[b, [1 + s for s in group]] * weight.unsqueeze(1)).sum(0) / weight.sum()
            assert torch.allclose(merged[b, 1 + new], want, atol=1e-5)
            assert float(total[b, new]) == float(weight.sum())
            assert all(int(chosen.owner[b, s]) == new for s in group)


# -- groups -------------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_groups_stay_and_go_together(counts, size, data):
    """Packed, in any order of places; twice, the second time counted in what is left."""
    total = sum(counts)
    order = data.draw(st.permutations(range(total)))  # group at each place
    places = {group: place for place, group in enumerate(order)}
    state = packed_groups([n * size for n in counts], size, torch.tensor(order), CPU)
    members = state.places
    first = [sum(counts[:i]) for i in range(len(counts))]
    for b, n in enumerate(counts):
        for g in range(n):
            start = places[first[b] + g] * size
            assert members[b, g].tolist() == list(range(start, start + size))
    left = [list(range(n)) for n in counts]
    for _ in range(2):
        current = state.candidates
        left = [sorted(data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True))) for own in left]
        score = torch.zeros(len(counts), current.slots)
        for b, own in enumerate(left):
            score[b] = torch.isin(current.index[b], torch.tensor(own)).float()
        chosen = Selection.from_scores(score, tuple(map(len, left)), current)
        held = state.tokens.kept()[0].tolist()
        for b, kept in enumerate(current.kept()):
            for g, group in enumerate(kept.tolist()):
                assert [held[s] for s in state.places[b, g].tolist()] == members[b, group].tolist()
        state, _ = state.after(chosen)
        sequence = state.tokens
        assert [k.tolist() for k in state.candidates.kept()] == left
        want = sorted(places[first[b] + g] * size + i for b, own in enumerate(left) for g in own for i in range(size))
        assert sequence.kept()[0].tolist() == want
    ends = sorted({0, total * size, *(data.draw(st.lists(st.integers(0, total * size), max_size=3)))})
    short = gathers.shorter(torch.tensor(ends, dtype=torch.int32), sequence)
    counted = [sum(t < end for t in sequence.kept()[0].tolist()) for end in ends]
    assert short.dtype == torch.int32
    assert short.tolist() == sorted(set(counted))


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_squares_are_squares(side, across, batch):
    edge = side * across
    state = squares(batch, edge * edge, side, CPU)
    assert state.candidates.lengths == (across * across,) * batch
    for g, members in enumerate((state.places[-1] - (batch - 1) * edge * edge).tolist()):
        top, left = g // across * side, g % across * side
        assert members == [(top + i) * edge + left + j for i in range(side) for j in range(side)]


@few
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 7))
def test_leading(counts, width):
    want = [[place < n for place in range(width)] for n in counts]
    got = tokens.leading(counts, width, CPU)
    assert got.expand(len(counts), -1).tolist() == want
    assert got.ndim == (1 if len(set(counts)) == 1 else 2)
    assert torch.equal(tokens.leading(counts, width, CPU, value=False), ~got)


# -- graphs -------------------------------------------------------------------------------------------------------------


def unit(keys: torch.Tensor, center: bool = False) -> list[torch.Tensor]:
    """[H, N, D] or [N, D], real tokens only -> unit vectors, float64."""
    mean = keys.double().mean(0) if keys.ndim == 3 else keys.double()
    mean = mean - mean.mean(0) if center else mean
    return [row / max(float(row.norm()), 1e-12) for row in mean]


padded = st.tuples(st.integers(2, 11), st.integers(2, 11), st.integers(0, 99), st.booleans(), st.booleans())


def ragged(made: tuple[int, int, int, bool, bool]) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Keys of two samples, [2, 2, N, 4] or [2, N, 4], their padding, and their lengths."""
    one, two, seed, even, heads = made
    lengths = [one, one] if even else [one, two]
    keys = noise(2, 2, max(lengths), 4, seed=seed) + 0.5
    valid = None if lengths[0] == lengths[1] else torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return keys if heads else keys[:, 0], valid, lengths


@few
@given(
    padded,
    st.booleans(),
    st.sampled_from([-0.4, 0.0, 0.3, 0.6, 0.9]),
    st.integers(1, 4),
    st.sampled_from([0.0, 3.0, 10]),
)
def test_the_vote_is_the_formula(made, center, threshold, neighbors, gamma):
    keys, valid, lengths = ragged(made)
    got = graph.vote(keys, threshold, neighbors, gamma, center=center, valid=valid)
    assert got.sources.tolist() == list(range(0, max(lengths), 2))
    order = graph.drop_order(got)
    for b, n in enumerate(lengths):
        points, votes, scores = unit(keys[b][..., :n, :], center), 0, []
        for place, source in enumerate(points[0::2]):
            similar = [float(source @ target) for target in points[1::2]]
            edges = [s for s in similar if s >= threshold]
            assert int(got.degree[b, place]) == len(edges)
            votes += len(edges) >= neighbors
            over = len(edges) * math.exp(gamma * (sum(edges) / len(edges) - threshold)) if edges else 0
            scores.append(over if edges else sum(similar) / max(1, len(similar)))
            assert float(got.score[b, place]) == pytest.approx(scores[-1], rel=1e-4, abs=1e-5)
        assert int(got.votes[b]) == votes
        assert order[b, : len(scores)].tolist() == [
            2 * i for i in sorted(range(len(scores)), key=lambda i: (-float(got.score[b, i]), i))
        ]
        assert torch.isneginf(got.score[b, len(scores) :]).all()


@few
@given(padded, st.booleans(), st.integers(1, 6), st.data())
def test_elimination_is_the_loop(made, center, step, data):
    keys, valid, lengths = ragged(made)
    keep = [data.draw(st.integers(2, n)) for n in lengths]
    alive = graph.eliminate(keys, keep, step, center=center, valid=valid)
    for b, n in enumerate(lengths):
        points, left = unit(keys[b][..., :n, :], center), list(range(n))
        while len(left) > keep[b]:
            score = {i: sum(float(points[i] @ points[j]) for j in left) for i in left}
            for i in sorted(left, key=lambda i: (-score[i], i))[: min(len(left) - keep[b], max(1, len(left) // step))]:
                left.remove(i)
        assert alive[b].nonzero().flatten().tolist() == left
    if valid is None:
        same = graph.eliminate(keys, keep[0], step, center=center)
        assert torch.equal(same, graph.eliminate(keys, [keep[0]] * 2, step, center=center))


@few
@given(padded, st.data())
def test_farthest_points_are_the_loop(made, data):
    keys, valid, lengths = ragged(made)
    keep = tuple(data.draw(st.integers(1, n)) for n in lengths)
    current = tokens.TokenMap.full(2, max(lengths), CPU, valid)
    got = rows_of(greedy.subset(greedy.farthest(keys, valid=valid), keep, current))
    for b, n in enumerate(lengths):
        points = unit(keys[b][..., :n, :])
        near = [max((float(p @ q) for j, q in enumerate(points) if j != i), default=0) for i, p in enumerate(points)]
        chosen = [near.index(min(near))]
        while len(chosen) < keep[b]:
            rest = [i for i in range(n) if i not in chosen]
            chosen.append(min(rest, key=lambda i: (max(float(points[i] @ points[j]) for j in chosen), i)))
        assert got[b] == sorted(chosen)


@few
@given(padded)
def test_matching_is_the_loop(made):
    keys, valid, lengths = ragged(made)
    edges = graph.match(keys, valid=valid)
    assert edges.sources.tolist() == list(range(0, max(lengths), 2))
    for b, n in enumerate(lengths):
        points = unit(keys[b][..., :n, :])
        for place, source in enumerate(points[0::2]):
            similar = [float(source @ target) for target in points[1::2]]
            assert int(edges.targets[b, place]) == 2 * similar.index(max(similar)) + 1
            assert float(edges.similarity[b, place]) == pytest.approx(max(similar), abs=1e-5)
        assert torch.isneginf(edges.similarity[b, (n + 1) // 2 :]).all()


def test_metric_of_zero_and_of_low_precision():
    keys = noise(1, 3, 5, 4, seed=0)
    keys[:, :, 2] = 0
    points = graph.metric(keys)
    assert points[0, 2].tolist() == [0] * 4
    assert torch.allclose(points[0, [0, 1, 3, 4]].norm(dim=-1), torch.ones(4))
    assert graph.metric(keys.half()).dtype == torch.float32
    assert torch.allclose(graph.metric(keys.half()), graph.metric(keys), atol=2e-3)


# -- schedules and budgets ----------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 400), st.integers(1, 8), st.data())
def test_the_schedule_is_geometric_and_rounded_up(total, steps, data):
    keep = data.draw(st.integers(1, total))
    got = [scheduled_keep(keep, total, step, steps) for step in range(steps)]
    for step, n in enumerate(got[:-1]):
        exact = total * (keep / total) ** ((step + 1) / steps)
        assert exact <= n < exact + 1
    assert got[-1] == keep
    assert got == sorted(got, reverse=True)


def test_fractions_are_rounded_half_up_and_at_least_one():
    assert [final_keep(f, 10) for f in (0.25, 0.35, 0.34, 0.05, 0.01, 1.0)] == [3, 4, 3, 1, 1, 10]
    assert [final_keep(f, 7) for f in (0.5, 0.07, 0.9)] == [4, 1, 6]
    assert final_keep(7, 7) == 7
    with pytest.raises(ValueError, match="only 7 candidates"):
        final_keep(8, 7)
    assert [scheduled_keep(50, 100, step, 2) for step in (0, 1)] == [71, 50]
    assert [scheduled_keep(10, 100, step, 3) for step in (0, 1, 2)] == [47, 22, 10]


def shown(
    current: TokenMap, step: int = 0, steps: int = 1, keys: torch.Tensor | None = None, attention=None
) -> Candidates:
    keys = noise(*current.index.shape, 4, seed=1) if keys is None else keys
    return Candidates(keys, keys, current, step, steps, attention)


def whole(*lengths: int) -> TokenMap:
    width = max(lengths)
    valid = None if min(lengths) == width else torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return TokenMap.full(len(lengths), width, CPU, valid)


def test_goals_are_of_each_sample_and_drop_point():
    assert goals(0.5, shown(whole(100, 30))) == (50, 15)
    assert goals(0.5, shown(whole(100, 30), 0, 2)) == (71, 22)
    assert goals(0.5, shown(whole(100, 30), 1, 2)) == (50, 15)
    assert goals(12, shown(whole(100, 30), 0, 2)) == (35, 19)


def test_the_floor_is_rounded_up_and_is_of_the_original_candidates():
    eleven = whole(11, 11)
    with pytest.warns(UserWarning, match="floor of 0.1"):
        assert floored((10, 3), shown(eleven), 0.1) == (9, 3)  # ceil(1.1) = 2 stay
    later = eleven.select(Selection.from_scores(noise(2, 11, seed=0), (5, 11), eleven))
    with pytest.warns(UserWarning, match="floor"):
        assert floored((4, 10), shown(later), 0.35) == (1, 7)  # ceil(3.85) = 4 of the first eleven stay
    few_left = eleven.select(Selection.from_scores(noise(2, 11, seed=0), (3, 11), eleven))
    with pytest.warns(UserWarning, match="floor"):
        assert floored((2, 0), shown(few_left), 0.35) == (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert floored((9, 9), shown(eleven), 0.1) == (9, 9)
        assert floored((0, 11), shown(eleven), 0.0) == (0, 11)


def alike(current: TokenMap, groups: list[int]) -> torch.Tensor:
    """Keys under which sample b has ``groups[b]`` sources that vote, at a threshold of 0.9 with one neighbour."""
    keys = torch.zeros(*current.index.shape, 64)
    for b, votes in enumerate(groups):
        for slot in range(current.slots):
            keys[b, slot, slot] = 1
        for source in range(votes):
            keys[b, 2 * source] = keys[b, 2 * source + 1]
    return keys


def test_the_batch_budget_is_the_mean_rounded_down_and_capped_by_sources():
    saint = methods.Saint(threshold=0.9, neighbors=1, budget="batch", floor=0.0)
    even = whole(12, 12, 12)
    assert saint.select(shown(even, keys=alike(even, [5, 3, 3]))).lengths == (9, 9, 9)  # 11 // 3
    assert saint.select(shown(even, keys=alike(even, [1, 1, 0]))) is None  # 2 // 3
    padded_map = whole(30, 3, 30)
    got = saint.select(shown(padded_map, keys=alike(padded_map, [15, 0, 9])))  # the mean is 8
    assert got.lengths == (22, 1, 22)  # of three tokens only the two sources can go
    assert rows_of(got)[1] == [1]
    sample = methods.Saint(threshold=0.9, neighbors=1, floor=0.0)
    assert sample.select(shown(padded_map, keys=alike(padded_map, [15, 1, 9]))).lengths == (15, 2, 21)
    assert sample.select(shown(even, keys=alike(even, [5, 0, 3]))).lengths == (7, 12, 9)  # one sample without votes
    assert sample.select(shown(even, keys=alike(even, [0, 0, 0]))) is None
    held = methods.Saint(threshold=0.9, neighbors=1, floor=1.0)
    with pytest.warns(UserWarning, match="floor of 1 "):
        assert held.select(shown(even, keys=alike(even, [5, 0, 3]))) is None
    some = methods.Saint(threshold=0.9, neighbors=1, floor=0.75)
    with pytest.warns(UserWarning, match="floor of 0.75"):
        assert some.select(shown(even, keys=alike(even, [5, 0, 3]))).lengths == (9, 12, 9)
    assert host_counts(torch.tensor([3, 1])) == (3, 1)


def test_a_fixed_budget_of_saint_ignores_the_votes():
    current = whole(20, 9)
    got = methods.Saint(keep=0.6).select(shown(current))
    assert got.lengths == (12, 5)
    ballot = graph.vote(shown(current).keys, 0.75, 5, 10.0, valid=current.valid)
    for b, (n, k) in enumerate(zip((20, 9), (12, 5), strict=True)):
        gone = set(graph.drop_order(ballot)[b, : n - k].tolist())
        assert rows_of(got)[b] == [s for s in range(n) if s not in gone]
    assert methods.Saint(keep=1.0).select(shown(current)) is None
    uneven = methods.Saint(keep=0.6).select(shown(whole(20, 1)))
    assert uneven.lengths == (12, 1)  # the one token of a sample stays


@pytest.mark.parametrize("most", [lambda n: (n + 1) // 2, lambda n: n // 2], ids=["sources", "pairs"])
def test_what_a_drop_point_can_drop_is_checked(most):
    for total in (9, 10):
        for keep in range(1, total + 1):
            if total - keep <= most(total):
                check_steps(keep, total, 1, most, "drop")
            else:
                with pytest.raises(ValueError, match="at most half"):
                    check_steps(keep, total, 1, most, "drop")
    check_steps(25, 100, 2, most, "drop")
    with pytest.raises(ValueError, match="keep at least 25"):
        check_steps(20, 100, 2, most, "drop")


@few
@given(choices(), st.sampled_from([0.3, 0.5, 0.9]), st.integers(0, 1))
def test_grid_and_random_on_any_map(made, keep, step):
    current = made[0].select(made[1])
    fresh = TokenMap(current.index, current.lengths, current.lengths, current.width, current.valid)
    given_ = shown(fresh, step, 2)
    goal = goals(keep, given_)
    for method in (methods.Grid(keep), methods.Random(keep, seed=5)):
        got = method.select(given_)
        if goal == fresh.lengths:
            assert got is None
            continue
        stays(got)
        assert got.lengths == goal
        for b, own in enumerate(slots_of(fresh)):
            assert set(rows_of(got)[b]) <= set(own)
            if isinstance(method, methods.Grid):
                n, k = len(own), goal[b]
                assert rows_of(got)[b] == [own[((2 * i + 1) * n) // (2 * k)] for i in range(k)]


def test_fastv_keeps_what_is_attended_to():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0], [0.5, 0.1, 0.4, 0.9, 0.9]])
    got = methods.FastV(0.5).choose(shown(whole(5, 3), attention=attention), (2, 2))
    assert rows_of(got) == [[1, 3], [0, 2]]


@few
@given(padded, st.integers(1, 4))
def test_tome_merges_the_best_pairs(made, r):
    keys, valid, lengths = ragged(made)
    keys = keys if keys.ndim == 3 else keys.mean(1)
    current = TokenMap.full(2, max(lengths), CPU, valid)
    got = methods.ToMe(r=r).select(shown(current, keys=keys))
    assert got.lengths == tuple(n - min(r, n // 2) for n in lengths)
    for b, n in enumerate(lengths):
        points = unit(keys[b, :n])
        best = []
        for source in range(0, n, 2):
            similar = [float(points[source] @ points[t]) for t in range(1, n, 2)]
            best.append((-max(similar), source, 2 * similar.index(max(similar)) + 1))
        pairs = {source: target for _, source, target in sorted(best)[: min(r, n // 2)]}
        stay = [s for s in range(n) if s not in pairs]
        assert rows_of(got)[b] == stay
        assert got.owner[b, :n].tolist() == [stay.index(pairs.get(s, s)) for s in range(n)]


# -- plans --------------------------------------------------------------------------------------------------------------

fractions = st.floats(0.01, 1.0)
budgets = st.one_of(st.integers(1, 999), fractions)
saints = st.builds(
    methods.Saint, threshold=st.floats(-0.99, 1.0), neighbors=st.integers(1, 99), gamma=st.floats(0, 32),
    budget=st.one_of(budgets, st.sampled_from(["sample", "batch"])), center=st.booleans(), floor=st.floats(0, 1),
)  # fmt: skip
full_graphs = st.builds(methods.SaintFullGraph, keep=budgets, step=st.integers(1, 64), center=st.booleans())
grids, randoms = (
    st.builds(methods.Grid, keep=budgets),
    st.builds(methods.Random, keep=budgets, seed=st.integers(0, 2**40)),
)
tomes = st.one_of(
    st.builds(methods.ToMe, r=st.integers(1, 99), beta=st.floats(0, 9)),
    st.builds(methods.ToMe, keep=budgets),
    st.builds(methods.PiToMe, keep=budgets, margin=st.floats(0, 1)),
    st.builds(methods.PPT, keep=budgets, threshold=st.floats(0, 1)),
)
layers = st.one_of(
    st.none(), st.sampled_from(["first_half", "all"]), st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True)
)
vision = st.builds(
    Stage, st.one_of(saints, full_graphs, grids, randoms, tomes), layers=layers,
    placement=st.sampled_from([None, "mid", "post"]), output=st.sampled_from(["survivors", "nearest", "similar"]),
)  # fmt: skip
connector = st.builds(Stage, st.one_of(full_graphs, grids, st.builds(methods.DivPrune, keep=budgets)))
language = st.builds(
    Stage, st.one_of(saints, grids, st.builds(methods.FastV, keep=budgets)), layers=layers, evict=st.booleans()
)
plans = st.builds(Plan, vision=st.none() | vision, connector=st.none() | connector, language=st.none() | language)


@few
@given(plans)
def test_plans_survive_json(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == plan.to_dict()
    again = Plan.from_dict(data)
    assert again == plan
    assert Plan.from_json(json.dumps(data)) == plan
    assert list(again.slots) == [name for name in ("vision", "connector", "language") if getattr(plan, name)]
    assert data["version"] == 1
    for name, (stage,) in plan.slots.items():
        for key, value in vars(stage.method).items():
            assert data[name][0]["method"][key] == value


# -- plan data that may be anything ------------------------------------------------------------------------------------

words = st.sampled_from([
    "version", "vision", "connector", "language", "method", "layers", "placement", "output", "evict", "saint", "tome", "keep",
    "budget", "threshold", "r", "mid", "first_half", "sample", "NaN", "",
])  # fmt: skip
atoms = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 40), st.floats(), st.text(max_size=8), words)
anything = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(words, st.text(max_size=4)), inner, max_size=4)
    ),
    max_leaves=8,
)


lists = st.lists(st.one_of(st.booleans(), st.floats(0, 9), st.integers(0, 9)), min_size=1, max_size=2)


def places(data: dict) -> list[tuple[dict, str]]:
    """Every entry of nested dictionaries: (dictionary, key)."""
    return [(data, key) for key in data] + [
        p for inner in data.values() if isinstance(inner, dict) for p in places(inner)
    ]


@st.composite
def spoiled(draw):
    """Data of a plan with one or two entries, at any depth, replaced, taken out or added."""
    data = json.loads(json.dumps(draw(plans).to_dict()))
    for _ in range(draw(st.integers(1, 2))):
        if not (found := places(data)):
            return data
        place, key = draw(st.sampled_from(found))
        what = draw(st.sampled_from(["replace", "replace", "list", "take out", "add"]))
        if what == "take out":
            del place[key]
        else:
            place[draw(words) if what == "add" else key] = draw(lists if what == "list" else anything)
    return data


def refused_or_a_plan(read, given) -> str:
    """The message of the refusal; "" where a plan was made, which then survives a round trip."""
    try:
        plan = read(given)
    except ValueError as error:
        return str(error) or "an error without words"
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_json(json.dumps(plan.to_dict())) == plan
    for (stage,) in plan.slots.values():
        assert stage.layers in (None, "first_half", "all") or {type(layer) for layer in stage.layers} == {int}
    return ""


@settings(few, max_examples=500)
@given(st.one_of(spoiled(), anything))
def test_data_is_refused_in_words_or_is_a_plan(data):
    message = refused_or_a_plan(Plan.from_dict, data)
    assert message != "an error without words"
    text = json.dumps(data)
    if data == json.loads(text):  # NaN is not
        assert bool(refused_or_a_plan(Plan.from_json, text)) == bool(message)


@few
@given(st.text(max_size=40), st.integers(0, 200), st.booleans())
def test_text_is_refused_in_words_or_is_a_plan(junk, cut, whole):
    text = junk if whole else json.dumps(Plan(vision=methods.Saint(threshold=0.5)).to_dict())[:cut] + junk
    assert refused_or_a_plan(Plan.from_json, text) != "an error without words"


@pytest.mark.parametrize("depth", [10, 300, 900, 5_000, 100_000])
def test_data_nested_too_deeply_is_refused_in_words(depth):
    for opening, closing in (("[", "]"), ('{"version": 1, "vision": ', "}")):
        with pytest.raises(ValueError, match=r"plan|stage|method"):
            Plan.from_json(opening * depth + "null" + closing * depth)


def test_default_layers():
    """Saint: the first half of an encoder, layers 7 to 16 of a language model; the full graph at four fifths; ToMe everywhere."""
    for method in (methods.Saint(), methods.Grid(), methods.Random()):
        assert [method.layers("vision", depth) for depth in (1, 2, 5, 12)] == [[0], [0], [0, 1], [*range(6)]]
        assert method.layers("language", 32) == method.layers("language", 40) == list(range(7, 17))
        assert [method.layers("language", depth) for depth in (1, 5, 8, 12)] == [[0], [4], [7], [*range(7, 12)]]
    assert [methods.SaintFullGraph().layers("vision", depth) for depth in (24, 12, 4, 1)] == [[19], [9], [3], [0]]
    assert methods.ToMe().layers("vision", 4) == [0, 1, 2, 3]
    assert [methods.FastV().layers("language", depth) for depth in (1, 2, 32)] == [[0], [1], [1]]
    first_half = Stage(methods.Saint(), layers="first_half")
    assert [first_half.resolve_layers("vision", depth) for depth in (1, 3, 12)] == [[0], [0], [*range(6)]]
    assert Stage(methods.Saint(), layers=[3, 1]).resolve_layers("vision", 4) == [1, 3]
    with pytest.raises(ValueError, match=r"layer 3 is out of range.*0\.\.2"):
        Stage(methods.Saint(), layers=[1, 3]).resolve_layers("vision", 3)


def test_published_settings():
    saint = methods.Saint()
    assert (saint.threshold, saint.neighbors, saint.gamma, saint.budget, saint.center, saint.floor) == (
        0.75, 5, 10.0, "sample", False, 0.1,
    )  # fmt: skip
    full = methods.SaintFullGraph()
    assert (final_keep(full.keep, 576), full.step, full.center) == (375, 16, False)
    assert (methods.ToMe().r, methods.ToMe().beta, methods.ToMe(keep=0.5).r) == (8, 1.0, None)
    assert methods.DivPrune().keep == 0.25
    assert methods.Grid().keep == methods.Random().keep == methods.FastV().keep == 0.5
    assert (methods.ToMe(beta=2).size_bias(), saint.size_bias()) == (2, 0)


def test_the_least_settings():
    methods.SaintFullGraph(keep=1, step=1)
    methods.Saint(neighbors=1, gamma=0, floor=0, keep=1)
    methods.ToMe(r=1, beta=0)
    methods.Random(keep=1, seed=0)
    graph.eliminate(noise(1, 3, 2, seed=0), 1, step=1)
    for bad in (lambda: methods.SaintFullGraph(step=0), lambda: methods.Saint(neighbors=0), lambda: methods.ToMe(r=0)):
        with pytest.raises(ValueError, match=">= 1"):
            bad()


def test_equal_pairs_merge_from_the_front():
    current = whole(200)
    got = methods.ToMe(r=30).select(shown(current, keys=torch.ones(1, 200, 4)))
    gone = sorted(set(range(200)) - set(rows_of(got)[0]))
    assert gone == list(range(0, 60, 2))
    ballot = graph.vote(torch.ones(1, 200, 4), 0.5, 1)
    assert graph.drop_order(ballot)[0].tolist() == list(range(0, 200, 2))
    scores = torch.zeros(1, 200)
    assert rows_of(Selection.from_scores(scores, (70,), current)) == [list(range(70))]
