"""Positions of a pruned prompt on a grid: laid out for evenly spaced places, moved to those that stay."""

import pytest
import torch

from saint.backends.vllm import positions
from saint.backends.vllm.budget import Choice
from saint.methods import DivPrune

IMAGE, VIDEO = 100, 101


def choice(places, kept):
    return Choice(DivPrune(keep=kept), (places,), (kept,))


def test_the_unpruned_prompt():
    tokens = [1, 2, IMAGE, IMAGE, 3, VIDEO, VIDEO, VIDEO, 4, IMAGE, 5]
    whole, begins, places = positions.unpruned(tokens, [(2, choice(6, 2)), (5, None), (9, choice(4, 1))])
    assert whole == [1, 2, *[IMAGE] * 6, 3, *[VIDEO] * 3, 4, *[IMAGE] * 4, 5]
    assert begins == [2, 9, 13]
    assert places.tolist() == [0, 1, 3, 6, 8, 9, 10, 11, 12, 15, 17]
    assert positions.unpruned([1, 2], [])[0] == [1, 2]


@pytest.mark.parametrize(("places", "kept"), [(12, 12), (12, 1), (12, 5), (7, 3)])
def test_evenly_spaced_places(places, kept):
    even = positions.even(choice(places, kept)).tolist()
    assert len(set(even)) == kept
    assert even == sorted(even)
    assert even[0] >= 0
    assert even[-1] < places
    assert even[0] - (places - 1 - even[-1]) in (0, 1)  # as far from one end as from the other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moves_lead_to_the_rows_and_columns_that_stay(dtype):
    """Also in pictures with more columns than bfloat16 has whole numbers."""
    width, places = 1800, 5400
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(places, generator=generator)[:1350].sort().values
    asked = choice(places, len(kept))
    moves = positions.unpacked(positions.packed(positions.moves(kept, asked, width)).to(dtype))
    assert moves.abs().max() > 256
    start = positions.even(asked)
    assert torch.equal(start // width + moves[:, 0], kept // width)
    assert torch.equal(start % width + moves[:, 1], kept % width)
