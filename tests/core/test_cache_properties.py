"""The ragged KV cache and the masks of shortened sequences against a plain list of positions per sample.

The model of a cache layer is, for each sample, the list of positions it holds. Keys and values say which position they are of,
so what the layer stores can be read off it.
"""

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from saint.language.cache import CacheView, RaggedLayer, check_cache, ragged_layer, stored_bytes
from saint.language.entries import CachePositions, SessionToken, entries, extended, remaining
from saint.language.masks import survivors_mask
from saint.language.positions import gather_ids, gather_rotary
from saint.tokens import Selection, TokenMap

CPU = torch.device("cpu")
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=200)
LOW = torch.finfo(torch.float32).min


def survivors(kept: list[list[int]], width: int) -> TokenMap:
    """A map that keeps these of ``width`` positions."""
    keep = torch.zeros(len(kept), width, dtype=torch.bool)
    for row, own in zip(keep, kept, strict=True):
        row[own] = True
    return TokenMap.full(len(kept), width, CPU).select(Selection.from_mask(keep, tuple(map(len, kept))))


def tagged(samples: list[int], index: Tensor) -> Tensor:
    """Keys [B, 2, S, 3] of positions [B, S]: the sample's name, the position, the head."""
    batch, count = index.shape
    names = torch.tensor(samples).view(batch, 1).expand(batch, count)
    heads = [torch.stack([names, index, torch.full_like(index, head)], -1) for head in range(2)]
    return torch.stack(heads, 1).float()


class Plain:
    """What the layer must do, on lists."""

    def __init__(self, batch: int, window: int | None) -> None:
        self.names = list(range(batch))
        self.window, self.length, self.pruned = window, 0, 0
        self.held: list[list[int]] = [[] for _ in range(batch)]
        self.dropped = False

    def append(self, kept: list[list[int]], width: int) -> None:
        for own, new in zip(self.held, kept, strict=True):
            own += [self.length + i for i in new]
        self.dropped |= any(len(new) < width for new in kept)
        self.length += width
        if self.dropped:
            self.pruned = self.length if any(len(new) < width for new in kept) else self.pruned

    def seen(self, own: list[int]) -> list[int]:
        """Positions that the next query may still see."""
        first = 0 if self.window is None else self.length - self.window + 1
        return [place for place in own if place >= first]


def check(layer: RaggedLayer, plain: Plain) -> None:
    """The layer holds what the model holds, knows where, and has let go of what no query sees."""
    assert layer.get_seq_length() == plain.length == layer.length
    if not plain.length:
        return
    stored = layer.keys.shape[2]
    index, valid = layer.map.columns(plain.length) if layer.map is not None else (None, None)
    if index is None:
        index = torch.arange(stored).expand(len(plain.names), stored)
    assert index.shape == (len(plain.names), stored)
    for b, own in enumerate(plain.held):
        real = list(range(stored)) if valid is None else valid[b].nonzero().flatten().tolist()
        places = index[b, real].tolist()
        seen = plain.seen(own)
        assert places[len(places) - len(seen) :] == seen, (
            "what is still seen is there, in order, and nothing else behind it"
        )
        assert set(places) <= set(own)
        assert layer.keys[b, 1][real].tolist() == [[plain.names[b], place, 1] for place in places]
        assert layer.values[b, 0][real].tolist() == [[-plain.names[b], -place, 0] for place in places]
    if plain.window is not None:
        # an entry goes as soon as no sample sees it
        assert stored == 0 or any(
            plain.seen([int(index[b, 0])]) and (valid is None or valid[b, 0]) for b in range(len(plain.names))
        )


@many
@given(st.integers(1, 3), st.sampled_from([None, None, 1, 3, 6, 12]), st.data())
def test_a_layer_is_a_list_of_positions(batch, window, data):
    layer, plain = RaggedLayer(SessionToken(), window), Plain(batch, window)
    assert layer.is_sliding == (window is not None)
    assert layer.get_max_length() == (-1 if window is None else window)
    assert layer.is_croppable == (window is None)
    for _ in range(data.draw(st.integers(1, 7))):
        action = data.draw(
            st.sampled_from(["prompt", "step", "step", "whole", "evict", "crop", "order", "select", "repeat", "reset"])
        )
        held = len(plain.names)
        if action in ("prompt", "step", "whole"):
            width = 1 if action == "step" else data.draw(st.integers(1, 6))
            full = list(range(width))
            kept = [full] * held
            if action == "prompt":
                kept = [
                    sorted(data.draw(st.lists(st.sampled_from(full), min_size=1, unique=True))) for _ in range(held)
                ]
            tokens = survivors(kept, width) if any(len(own) < width for own in kept) else None
            before = plain.length
            positions = None if tokens is None else extended(layer.map, before, tokens)
            index = torch.arange(width).expand(held, width) if tokens is None else tokens.index
            keys = tagged(plain.names, index + before)
            values = -keys
            values[..., 2] = keys[..., 2]
            got, _ = layer.update(keys, values, positions=positions)
            assert torch.equal(got[:, :, got.shape[2] - index.shape[1] :], keys), "the call sees what it brought"
            plain.append(kept, width)
            last = (before, width, kept)
        elif action == "evict" and plain.length and window is None and data.draw(st.booleans()):
            before, width, kept = last
            if before + width != plain.length:
                continue
            left = [own[: data.draw(st.integers(1, len(own)))] for own in kept]
            # only what every layer knows of: survivors among those this layer has
            tokens = survivors(left, width)
            layer.keep(*remaining(layer.map, tokens, before=before))
            plain.held = [
                [p for p in own if p < before] + [before + i for i in some]
                for own, some in zip(plain.held, left, strict=True)
            ]
            plain.pruned, last = plain.length, (before, width, left)
        elif action == "crop" and plain.length:
            count = data.draw(st.integers(0, plain.length))
            if count == 0:
                layer.crop(0)
            elif window is not None or (layer.map is not None and plain.length - count < plain.pruned):
                with pytest.raises(ValueError, match="cannot roll"):
                    layer.crop(-count)
            else:
                layer.crop(-count)
                plain.length -= count
                plain.held = [[p for p in own if p < plain.length] for own in plain.held]
                last = (0, 0, [])
        elif action in ("order", "select") and plain.length:
            size = held if action == "order" else data.draw(st.integers(1, held))
            order = [data.draw(st.integers(0, held - 1)) for _ in range(size)]
            (layer.reorder_cache if action == "order" else layer.batch_select_indices)(torch.tensor(order))
            plain.names, plain.held = [plain.names[i] for i in order], [list(plain.held[i]) for i in order]
            last = (*last[:2], [last[2][i] for i in order] if last[2] else [])
        elif action == "repeat" and plain.length and held < 4:
            layer.batch_repeat_interleave(2)
            plain.names = [name for name in plain.names for _ in range(2)]
            plain.held = [list(own) for own in plain.held for _ in range(2)]
            last = (*last[:2], [own for own in last[2] for _ in range(2)])
        elif action == "reset" and data.draw(st.booleans()):
            layer.reset()
            assert layer.map is None
            names = plain.names
            plain = Plain(held, window)
            plain.names = names
            layer = RaggedLayer(
                SessionToken(), window
            )  # transformers keeps the tensors and zeroes them; a prompt starts anew
        check(layer, plain)
        queries = data.draw(st.integers(1, 4))
        first = 0 if window is None else max(plain.length - window + 1, 0)
        assert layer.get_mask_sizes(queries) == (plain.length - first + queries, first)


def filled(window: int | None = None, *, kept: list[list[int]] | None = None, width: int = 8) -> RaggedLayer:
    layer = RaggedLayer(SessionToken(), window)
    kept = [[0, 2, 3, 7], [1, 5]] if kept is None else kept
    tokens = survivors(kept, width)
    keys = tagged([0, 1], tokens.index)
    layer.update(keys, keys, positions=extended(None, 0, tokens))
    return layer


def test_what_cannot_be_rolled_back_is_refused_and_left_alone():
    layer = filled()
    step = tagged([0, 1], torch.tensor([[8, 9], [8, 9]]))
    layer.update(step, step)
    for count in (3, 10):
        with pytest.raises(ValueError, match=f"cannot roll {count} of 10 .*pruned prompt"):
            layer.crop(-count)
    with pytest.raises(ValueError, match="negative number"):
        layer.crop(2)
    assert (layer.length, layer.keys.shape[2]) == (10, 6)
    layer.crop(-2)
    assert (layer.length, layer.keys.shape[2], layer.values.shape[2]) == (8, 4, 4)
    with pytest.raises(ValueError, match="cannot roll 1 of 8"):
        layer.crop(-1)
    sliding = filled(window=20)
    step = tagged([0, 1], torch.tensor([[8], [8]]))
    sliding.update(step, step)
    with pytest.raises(ValueError, match="sliding window"):
        sliding.crop(-1)
    plain_sliding = RaggedLayer(SessionToken(), 4)
    plain_sliding.update(step, step)
    with pytest.raises(ValueError, match="sliding window"):
        plain_sliding.crop(-1)
    RaggedLayer(SessionToken(), None).crop(-3)  # nothing is there to take off


def test_every_way_to_change_the_batch_changes_the_map():
    for change, order in (
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    ):
        layer = filled()
        index, valid = layer.map.index, layer.map.valid
        change(layer)
        assert torch.equal(layer.map.index, index[order])
        assert torch.equal(layer.map.valid, valid[order])
        assert layer.keys[:, 0, 0, 0].tolist() == order


def test_a_layer_under_a_removed_plan_takes_nothing():
    layer = filled()
    layer.session.closed = True
    with pytest.raises(ValueError, match="plan that has been removed"):
        layer.update(*[tagged([0, 1], torch.tensor([[8], [8]]))] * 2)
    layer = filled()
    layer.reset()
    assert (layer.length, layer.map) == (0, None)


@pytest.mark.parametrize("window", [None, 3, 5, 50])
def test_an_ordinary_layer_is_taken_over(window):
    ordinary = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    keys = tagged([0, 1], torch.arange(9).expand(2, 9))
    ordinary.update(keys, -keys)
    cache, owner = hf.DynamicCache(), SessionToken()
    cache.layers = [ordinary]
    layer = ragged_layer(cache, 0, owner)
    assert cache.layers[0] is layer is ragged_layer(cache, 0, owner)
    assert layer.session is owner
    assert layer.sliding_window == window
    assert layer.length == 9
    stored = 9 if window is None else min(9, window - 1)
    assert layer.keys[0, 0, :, 1].tolist() == list(range(9 - stored, 9))
    index = torch.arange(9).expand(2, 9) if layer.map is None else layer.map.columns(9)[0]
    assert index.tolist() == [list(range(9 - stored, 9))] * 2
    further = ragged_layer(cache, 2, owner)
    assert [type(made) for made in cache.layers[1:]] == [DynamicLayer, RaggedLayer]
    assert (further.length, further.is_initialized) == (0, False)


def test_bytes_of_a_layer():
    """Unpruned, a sliding layer of window W keeps W - 1 positions."""
    layer = filled()  # 4 of 8 entries, 2 samples, 2 heads, 3 numbers of 4 bytes, keys and values
    entry = 2 * 2 * 3 * 4 * 2
    assert stored_bytes(layer) == (4 * entry, 8 * entry)
    assert stored_bytes(filled(window=20)) == (4 * entry, 8 * entry)
    kept, whole = stored_bytes(filled(window=5))
    assert whole == 4 * entry  # positions 4..7 of 8
    assert kept < whole
    assert stored_bytes(RaggedLayer(SessionToken(), None)) == (0, 0)
    ordinary = DynamicSlidingWindowLayer(sliding_window=5)
    keys = tagged([0, 1], torch.arange(8).expand(2, 8))
    ordinary.update(keys, keys)
    assert stored_bytes(ordinary) == (4 * entry, 4 * entry)


def test_a_view_appends_once_and_keeps_what_it_was_given():
    layer, cache = filled(), hf.DynamicCache()
    cache.layers = [layer]
    keys = tagged([0, 1], torch.tensor([[8], [8]]))
    view = CacheView(cache, None)
    held = view.update(keys, -keys, 0)
    assert torch.equal(view.keys, keys)
    assert held[0].shape[2] == 5
    assert torch.equal(held[0][:, :, -1:], keys)
    assert torch.equal(held[1][:, :, -1:], -keys)
    assert view.held[0] is held[0]
    assert layer.length == 9
    assert view.get_seq_length(0) == 9
    alone = CacheView(None, None)
    assert all(torch.equal(a, b) for a, b in zip(alone.update(keys, -keys), (keys, -keys), strict=True))


def test_whose_cache_it_is():
    owner, cache = SessionToken(), hf.DynamicCache()
    cache.layers = [filled()]
    with pytest.raises(ValueError, match="another plan"):
        check_cache(cache, owner)
    check_cache(cache, cache.layers[0].session)
    with pytest.raises(ValueError, match="must be a transformers Cache"):
        check_cache([], owner)


# -- entries and masks --------------------------------------------------------------------------------------------------


@st.composite
def situations(draw):
    """Positions held per sample, the survivors of a new sequence (or None), and how long both are."""
    batch, before, queries = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.sampled_from([1, 1, 2, 3, 5]))
    held = None
    if before and draw(st.booleans()):
        end = draw(st.integers(1, before))
        kept = [sorted(draw(st.lists(st.integers(0, end - 1), min_size=1, unique=True))) for _ in range(batch)]
        held = extended(None, 0, survivors(kept, end))
        lists = [own + list(range(end, before)) for own in kept]
    else:
        lists = [list(range(before)) for _ in range(batch)]
    new = [list(range(queries))] * batch
    tokens = None
    if draw(st.booleans()):
        new = [sorted(draw(st.lists(st.integers(0, queries - 1), min_size=1, unique=True))) for _ in range(batch)]
        tokens = survivors(new, queries)
    return lists, held, before, new, tokens, queries


def split(index: Tensor, valid: Tensor | None) -> list[list[int]]:
    return [row.tolist() if valid is None else row[valid[b]].tolist() for b, row in enumerate(index)]


@many
@given(situations())
def test_entries_are_positions(made):
    lists, held, before, new, tokens, queries = made
    index, valid = entries(tokens, held, before, queries)
    want = [own + [before + i for i in more] for own, more in zip(lists, new, strict=True)]
    if index is None:
        assert tokens is None
        assert held is None
        assert valid is None
        return
    assert split(index, valid) == want
    if tokens is not None:
        after = extended(held, before, tokens)
        assert after.end == before + queries
        assert split(*after.columns(after.end)) == want
        assert split(*after.columns(after.end + 2)) == [[*own, after.end, after.end + 1] for own in want]


@many
@given(situations(), st.data())
def test_what_remains_of_the_last_sequence(made, data):
    lists, held, before, new, tokens, queries = made
    if tokens is not None:
        held = extended(held, before, tokens)
    left = [sorted(data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True))) for own in new]
    chosen, keys = remaining(held, survivors(left, queries), before=before)
    want = [own + [before + i for i in some] for own, some in zip(lists, left, strict=True)]
    assert split(*keys.columns(before + queries)) == want
    assert keys.end == before + queries
    index = torch.arange(before + queries).expand(len(lists), -1) if held is None else held.columns(before + queries)[0]
    assert split(index.gather(1, chosen.slots), chosen.valid) == want


@many
@given(
    situations(), st.sampled_from(["bool", "additive", "flash"]), st.integers(0, 3), st.booleans(), st.integers(0, 99)
)
def test_masks_are_rows_and_columns(made, kind, first, shared, seed):
    lists, held, before, new, tokens, queries = made
    first = min(first, before)
    batch, total = len(lists), before + queries
    noise = torch.Generator().manual_seed(seed)
    if kind == "flash":
        if first:
            return
        mask = (torch.rand(batch, total, generator=noise) > 0.3).long()
    else:
        full = torch.rand(1 if shared else batch, 1, queries, total - first, generator=noise) > 0.3
        mask = full if kind == "bool" else torch.zeros(full.shape).masked_fill(~full, LOW)
    cut = survivors_mask(mask, tokens, held, before=before, first=first, queries=queries, flash=kind == "flash")
    index, valid = entries(tokens, held, before, queries)
    if index is None:
        assert cut is mask
        return
    if held is not None and tokens is None and held.end == first and not held.index.shape[1]:
        assert cut is mask
        return
    for b in range(batch):
        real = [True] * index.shape[1] if valid is None else valid[b].tolist()
        for column, place in enumerate(index[b].tolist()):
            if kind == "flash":
                assert bool(cut[b, column]) == (real[column] and bool(mask[b, place]))
                continue
            for row, query in enumerate(new[b]):
                seen = real[column] and place >= first and bool(full[0 if shared else b, 0, query, place - first])
                got = cut[b, 0, row, column]
                assert bool(got if kind == "bool" else got == 0) == seen
                assert kind == "bool" or float(got) in (0.0, LOW)


@many
@given(situations(), st.integers(0, 3))
def test_no_mask_means_causality_alone(made, first):
    _lists, held, before, _new, tokens, queries = made
    if queries > 1 and before:
        return  # transformers always makes a mask then
    first = min(first, before) if queries == 1 else 0
    for flash in (False, True):
        cut = survivors_mask(None, tokens, held, before=before, first=first, queries=queries, flash=flash)
        index, valid = entries(tokens, held, before, queries)
        if cut is None:
            # everything that is stored may be seen, or padding stands behind every real query
            assert before == 0 or valid is None
            assert (
                index is None
                or before == 0
                or not first
                or bool((index >= first).all())
                or held is None
                or not index.numel()
            )
            continue
        want = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        want = want & (index >= first)
        assert torch.equal(cut if flash else cut[:, 0, 0], want)
        assert cut.ndim == (2 if flash else 4)


def test_a_step_over_a_ragged_prompt_hides_its_padding():
    past = extended(None, 0, survivors([[0, 2, 3], [1]], 4))
    for flash in (False, True):
        cut = survivors_mask(None, None, past, before=4, first=0, queries=1, flash=flash)
        assert (cut if flash else cut[:, 0, 0]).tolist() == [[True] * 4, [True, False, False, True]]
    even = extended(None, 0, survivors([[0, 2], [1, 3]], 4))
    assert survivors_mask(None, None, even, before=4, first=0, queries=1, flash=False) is None


def test_windows_hide_what_lies_before_them():
    past = CachePositions(torch.tensor([[0, 4, 6], [2, 3, 5]]), None, 8)
    cut = survivors_mask(None, None, past, before=9, first=4, queries=1, flash=False)
    assert cut[:, 0, 0].tolist() == [[False, True, True, True, True], [False, False, True, True, True]]
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., 2] = False  # position 6
    cut = survivors_mask(mask, None, past, before=9, first=4, queries=1, flash=False)
    assert cut[:, 0, 0].tolist() == [[False, True, False, True, True], [False, False, True, True, True]]


@few
@given(situations(), st.booleans(), st.integers(0, 99))
def test_positions_of_survivors(made, shared, seed):
    *_, new, tokens, queries = made
    if tokens is None:
        return
    batch = len(new)
    noise = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 1 if shared else batch, queries, 4, generator=noise)
    ids = torch.randint(0, 99, (3, 1 if shared else batch, queries), generator=noise)
    (cos, deep), flat = gather_rotary((table[0], table), tokens), gather_ids(ids, tokens)
    for b, own in enumerate(new):
        row = 0 if shared else b
        assert torch.equal(cos[b, : len(own)], table[0, row, own])
        assert torch.equal(deep[:, b, : len(own)], table[:, row, own])
        assert torch.equal(flat[:, b, : len(own)], ids[:, row, own])
        assert torch.equal(gather_ids(ids[0], tokens)[b, : len(own)], ids[0, row, own])
