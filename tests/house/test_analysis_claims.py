"""The verdicts of docs/analysis.md, from records made by hand: `evidence/analyze_claims.py` and `analyze_again.py`."""

import sys
from pathlib import Path

import pytest

EVIDENCE = str(Path(__file__).parents[2] / "evidence")


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(EVIDENCE)
    import analyze_claims

    yield analyze_claims
    del sys.modules["analyze_claims"]


@pytest.fixture
def overlap(monkeypatch):
    monkeypatch.syspath_prepend(EVIDENCE)
    from analyze_again import overlap

    yield overlap
    del sys.modules["analyze_again"]


def found(early, late):
    spans = {
        name: {"mean": sum(span) / 2, "low": span[0], "high": span[1]}
        for name, span in (("early", early), ("late", late))
    }
    return {**spans, "all": spans["early"]}


def part(attention, tome, segments=0):
    return {
        "stage": "vision",
        "stages": {
            "verdict": "three stages" if segments else "not shown",
            "segments": [{}] * segments,
            "criteria": {
                "bic": {"1": 1.0, "2": 7.0, "3": 4.0, "line": 6.0, "smooth": 5.0},
                "p_smooth": 0.25, "p_permutation": 0.5, "alpha": 0.01,
            },
        },
        "causal": {
            "share": 0.25,
            "methods": {key: {"n": 24} for key in ("random", "saint", "attention", "tome", "tome_plain")},
            "more_than_saint": {
                "random": found((1, 2), (1, 2)), "attention": attention, "tome": tome, "tome_plain": found((-2, -1), (1, 2)),
            },
        },
    }  # fmt: skip


ABOVE, BELOW, ACROSS = (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (ABOVE, ABOVE, "Held up"),
        (BELOW, BELOW, "Contradicted"),
        (ABOVE, ACROSS, "Not decided"),
        (ABOVE, BELOW, "Not decided"),
    ],
)
def test_a_claim_needs_every_interval(claims, first, second, word):
    stacks = [
        ("A", part(found(first, first), found(BELOW, ABOVE))),
        ("B", part(found(second, first), found(BELOW, ABOVE))),
    ]
    text = claims.claims(stacks, [])
    assert f"- **{word}**: what SAINT drops costs less than what CLS" in text
    assert "- **Contradicted**: in the first third" in text
    line = text.split("attends to least")[1].splitlines()[0]
    assert ("Above: A; B." in line) == (word == "Held up")
    assert ("Below: A; B." in line) == (word == "Contradicted")
    assert "4 intervals above zero, 0 below" in text.split("in the other layers")[1].splitlines()[0]
    assert f"{sum(first) / 2:+.4f} ({first[0]:+.4f} to {first[1]:+.4f})" in text


@pytest.mark.parametrize(("segments", "word"), [((3, 3), "Held up"), ((3, 0), "Not shown"), ((2, 3), "Not shown")])
def test_three_stages_must_be_shown_everywhere(claims, segments, word):
    stacks = [(name, part(found(ABOVE, ABOVE), found(ABOVE, ABOVE), n)) for name, n in zip("AB", segments, strict=True)]
    stacks[1][1].update(stage="language", things="passages")
    text = claims.claims(stacks, [])
    assert f"**{word}**: three stages are shown in {segments.count(3)} of 2 stacks" in text
    first, second = (int(n == 3) for n in segments)
    assert f"{first} of 1 encoders and {second} of 1 language models" in text
    assert "24 photographs for A, 24 passages for B" in text
    assert "| 4 | 5 | 0.250 | 0.500 |" in text  # the best staircase of two segments or more, the best smooth curve


def record(seed, low, high):
    quantity = {"name": "key_similarity", "low": low, "high": high}
    droppable = {"low": [[0.0, 0.0]], "high": [[1.0, 1.0]]}
    stages = {"verdict": f"verdict {seed}"}
    parts = [{"stage": "vision", "quantities": [quantity], "droppable": droppable, "stages": stages}]
    return {"model": "m", "weights": "trained", "seed": seed, "images": {"count": 9}, "parts": parts, "environment": {}}


def test_overlaps_are_counted(overlap, claims):
    made = overlap(record(0, [0.0, 1.0, None], [1.0, 2.0, None]), record(1, [1.0, 2.5, 0.0], [2.0, 3.0, 1.0]))
    assert made["parts"][0]["counts"] == {"key_similarity": [1, 2], "droppable": [2, 2]}
    assert made["parts"][0]["stages"] == ["verdict 0", "verdict 1"]
    text = claims.claims([("A", part(found(ABOVE, ABOVE), found(ABOVE, ABOVE)))], [made])
    assert "3 of 4 pairs of layer and quantity (75.0%); not everywhere: key_similarity" in text
    with pytest.raises(ValueError, match="two seeds"):
        overlap(record(0, [0.0, 1.0], [1.0, 2.0]), record(0, [0.0, 1.0], [1.0, 2.0]))
