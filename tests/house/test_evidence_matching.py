"""Rows at equal FLOPs (`evidence/matching.py`): how sides and budgets are fitted, how rows are paired and added to a record."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))
import matching


@pytest.fixture
def subject():
    """A picture of 224 pixels in patches of 16, whose FLOPs are those of its tokens, or of the kept share of them."""
    found = matching.Subject.__new__(matching.Subject)
    found.side, found.patch, found.dense, found.full = 224, 16, False, 196_000

    def flops(plan=None, side=224):
        keep = 1.0 if plan is None else plan.vision[0].method.fixed
        return int(1000 * (side // 16) ** 2 * keep)

    found.flops = flops
    return found


@pytest.mark.parametrize(
    ("share", "side"), [(1.0, 224), (0.85, 192), (0.52, 160), (0.51, 144), (0.01, 16), (0.001, None)]
)
def test_the_largest_side_that_costs_no_more(subject, share, side):
    assert subject.fitted_side(share) == side


@pytest.mark.parametrize("share", [0.3, 0.5, 0.85])
def test_the_largest_budget_that_costs_no_more(subject, share):
    budget = subject.fitted("Match, layers 0, 1", share).vision[0].method.fixed
    assert share - 0.001 < budget <= share


def test_no_budget_is_small_enough(subject):
    assert subject.fitted("Match, layers 0, 1", 0.2) is None  # two drop points leave a quarter at least


def test_errors_are_paired_by_photograph():
    published = np.array([0.9, 0.5, 0.7, 0.99])
    half = matching.summary(1 - (1 - published) / 2, published)
    assert half["error_ratio"] == 0.5
    assert half["ratio_interval"] == [0.5, 0.5]  # in every draw, whatever photographs it holds
    assert half["mean"] == round(float(1 - (1 - published).mean() / 2), 5)
    assert half["interval"][0] < half["mean"] < half["interval"][1]


def test_rows_are_added_to_a_record_of_the_same_photographs_only(tmp_path):
    row = {"share": 0.5, "name": matching.PUBLISHED, "values": "0.91000 0.87654"}
    file = tmp_path / "matching.json"
    file.write_text(
        json.dumps({"model": "demo:clip-b16", "images": 2, "photos": "a b", "results": [row], "environments": [{}]})
    )
    rows, environments = matching.stored(file, "demo:clip-b16", "a b")
    assert matching.numbers(rows[0.5, matching.PUBLISHED]) == [0.91, 0.87654]
    assert environments == [{}]
    for model, photos in (("demo:dinov2-s", "a b"), ("demo:clip-b16", "b a")):
        with pytest.raises(SystemExit, match="holds demo:clip-b16 on 2 other photographs.*without --only"):
            matching.stored(file, model, photos)
    with pytest.raises(SystemExit, match="not there to add rows to"):
        matching.stored(tmp_path / "none.json", "demo:clip-b16", "a b")
