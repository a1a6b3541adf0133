import pytest
import torch

from saint import gathers
from saint.runtime.state import packed_groups, squares
from saint.tokens import Selection, TokenMap


def ragged() -> tuple[TokenMap, TokenMap, torch.Tensor]:
    """10 candidates, sample 0 loses {1, 4}, sample 1 loses {0, 3, 5, 9}; x holds the original index of every row."""
    before = TokenMap.full(2, 10, torch.device("cpu"))
    order = torch.tensor([[4, 1, 0, 2], [9, 0, 5, 3]])
    after = before.select(Selection.from_order(order, (2, 4), before))
    x = torch.arange(12.0).repeat(2, 1).unsqueeze(-1)
    return before, after, x


def test_selection_keeps_order_and_pads():
    _, after, _ = ragged()
    assert [k.tolist() for k in after.kept()] == [[0, 2, 3, 5, 6, 7, 8, 9], [1, 2, 4, 6, 7, 8]]
    assert after.lengths == (8, 6)
    assert after.valid.sum(1).tolist() == [8, 6]
    assert not after.nothing_dropped


def test_a_second_selection_counts_slots_not_indices():
    _, after, _ = ragged()
    again = after.select(Selection.from_order(torch.tensor([[1], [1]]), (1, 1), after))
    assert [k.tolist() for k in again.kept()] == [[0, 3, 5, 6, 7, 8, 9], [1, 4, 6, 7, 8]]


def test_equal_lengths_need_no_padding():
    before = TokenMap.full(2, 6, torch.device("cpu"))
    after = before.select(Selection.from_order(torch.tensor([[0, 1], [4, 5]]), (2, 2), before))
    assert after.valid is None
    assert after.index.tolist() == [[2, 3, 4, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize("prefix", [0, 2])
def test_gather_keeps_the_prefix_and_the_right_rows(prefix):
    _, after, _ = ragged()
    x = torch.arange(10.0 + prefix).repeat(2, 1).unsqueeze(-1)
    rows = gathers.gather_tokens(x, after.index, prefix)
    for sample, kept in enumerate(after.kept()):
        want = [*range(prefix), *(i + prefix for i in kept.tolist())]
        assert rows[sample, : len(want), 0].tolist() == want


def test_gather_is_differentiable():
    _, after, _ = ragged()
    x = torch.randn(2, 12, 3, requires_grad=True)
    gathers.gather_tokens(x, after.index, 2).sum().backward()
    assert x.grad[0, 1 + 2].abs().sum() == 0  # dropped
    assert x.grad[0, 2 + 2].abs().sum() > 0


def test_tables_follow_their_tokens():
    _, after, _ = ragged()
    table = torch.arange(10.0).unsqueeze(1).expand(10, 4)
    shared = gathers.gather_table(table, after)
    assert shared.shape == (2, 1, 8, 4)
    assert shared[0, 0, :, 0].tolist() == after.kept()[0].tolist()
    heads = gathers.gather_table(torch.stack([table, table + 100]), after)
    assert heads.shape == (2, 2, 8, 4)
    assert heads[0, 1, :, 0].tolist() == [i + 100 for i in after.kept()[0].tolist()]


def test_masks_keep_rows_and_columns():
    _, after, _ = ragged()
    mask = torch.arange(121).view(1, 1, 11, 11).float()
    short = gathers.gather_mask(mask, after, prefix=1)
    assert short.shape == (2, 1, 9, 9)
    kept = [0, *(i + 1 for i in after.kept()[0].tolist())]
    assert torch.equal(short[0, 0], mask[0, 0][kept][:, kept])


@pytest.mark.parametrize("with_prefix", [False, True])
def test_filled_padding_leaves_the_average_alone(with_prefix):
    _, after, _ = ragged()
    x = torch.randn(2, 3 + 8, 5)
    filled = gathers.fill_padding(x, after, 3, with_prefix=with_prefix)
    first = 0 if with_prefix else 3
    for sample, length in enumerate(after.lengths):
        want = x[sample, first : 3 + length].mean(0)
        assert torch.allclose(filled[sample, first:].mean(0), want, atol=1e-6)
        assert torch.equal(filled[sample, : 3 + length], x[sample, : 3 + length])


def test_nearest_survivor_on_the_grid():
    before = TokenMap.full(1, 6, torch.device("cpu"))  # 2 x 3: 0 1 2 / 3 4 5
    after = before.select(Selection.from_order(torch.tensor([[1, 2, 3, 4]]), (4,), before))  # 0 and 5 stay
    assert gathers.nearest_survivor(after, (2, 3))[0].tolist() == [0, 0, 1, 0, 1, 1]


def test_similar_survivor_never_points_at_padding_or_away_from_itself():
    torch.manual_seed(3)
    points = torch.nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)
    points[:, 1] = points[:, 2]  # a twin must not take over a survivor
    before = TokenMap.full(2, 10, torch.device("cpu"))
    selection = Selection.from_order(torch.tensor([[4, 1, 0, 2], [9, 0, 5, 3]]), (2, 4), before)
    owner = gathers.similar_survivor(points, selection)
    after = before.select(selection)
    for sample, kept in enumerate(after.kept()):
        assert owner[sample, kept].tolist() == list(range(len(kept)))
        for gone in set(range(10)) - set(kept.tolist()):
            best = (points[sample, gone] @ points[sample, kept].T).argmax()
            assert owner[sample, gone] == best


def test_a_survivor_stands_for_itself_whatever_rounding_says():
    below = torch.tensor(1.0).nextafter(torch.tensor(0.0)).item()  # its product with 1 is larger than with itself
    points = torch.tensor([[[below], [1.0], [-1.0]]]).repeat(2, 1, 1)
    selection = Selection.from_mask(torch.tensor([[True, True, False], [True, True, True]]), (2, 3))
    owner = gathers.similar_survivor(points, selection)
    assert owner[0, :2].tolist() == [0, 1]
    assert owner[1].tolist() == [0, 1, 2]


# -- groups of tokens ---------------------------------------------------------------------------------------------------


def test_squares_of_a_grid():
    state = squares(2, 16, 2, torch.device("cpu"))
    members = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert state.places[0].tolist() == members
    assert (state.places[1] - 16).tolist() == members  # rows of the second sequence
    for count, side in ((15, 2), (25, 2)):
        with pytest.raises(ValueError, match="must be square"):
            squares(1, count, side, torch.device("cpu"))


def test_groups_of_squares_go_together():
    state = squares(2, 16, 2, torch.device("cpu"))
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    state, _ = state.after(Selection.from_mask(keep, (3, 1)))
    assert [k.tolist() for k in state.candidates.kept()] == [[0, 2, 3], [1]]
    assert [k.tolist() for k in state.tokens.kept()] == [[0, 1, 4, 5, *range(8, 16)], [2, 3, 6, 7]]
    # a second time, counted in what is left
    keep = torch.tensor([[False, True, True], [True, False, False]])
    before = state.tokens
    state, stay = state.after(Selection.from_mask(keep, (2, 1)))
    assert [k.tolist() for k in state.candidates.kept()] == [[2, 3], [1]]
    assert [k.tolist() for k in state.tokens.kept()] == [list(range(8, 16)), [2, 3, 6, 7]]
    assert [k.tolist() for k in before.select(stay).kept()] == [list(range(8, 16)), [2, 3, 6, 7]]


def test_groups_of_a_packed_sequence():
    order = torch.tensor([2, 0, 1, 4, 3])  # which group stands where: samples of 3 and 2 groups; not its own inverse
    state = packed_groups([6, 4], 2, order, torch.device("cpu"))
    assert state.candidates.lengths == (3, 2)
    assert state.places[0].tolist() == [[2, 3], [4, 5], [0, 1]]
    assert state.places[1, :2].tolist() == [[8, 9], [6, 7]]
    keep = torch.tensor([[True, False, True], [False, True, False]])
    state, _ = state.after(Selection.from_mask(keep, (2, 1)))
    sequence = state.tokens
    assert [k.tolist() for k in state.candidates.kept()] == [[0, 2], [1]]
    assert sequence.kept()[0].tolist() == [0, 1, 2, 3, 6, 7]
    assert gathers.shorter(torch.tensor([0, 2, 6, 8, 10], dtype=torch.int32), sequence).tolist() == [0, 2, 4, 6]
    full = gathers.full_length(torch.arange(6.0)[None, :, None], sequence, 0, -1.0)
    assert full.flatten().tolist() == [0, 1, 2, 3, -1, -1, 4, 5, -1, -1]
