"""Features known again by what they hold, and outputs at full length: tensors alone."""

import torch

from saint.language.shortening import Short
from saint.vlm import merged
from saint.vlm.merged import Known, numbers, tensors


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_of_other_values_have_other_numbers():
    x = noise(50, 8)
    swapped, scaled = x.roll(1, -1), x * (1 + 2**-23)
    doubled = torch.cat([x, swapped, scaled, -x])
    assert len(numbers(doubled).unique()) == len(doubled.unique(dim=0)) == 200
    assert torch.equal(numbers(x[None]), numbers(x)[None])
    for a in range(8):  # one channel alone decides
        other = x.clone()
        other[:, a] += 1e-3
        assert not bool((numbers(other) == numbers(x)).any())


def test_rows_are_known_again_where_they_stand():
    known, text = Known(), noise(2, 6, 8, seed=1)
    assert known.among(text).shape == (2, 6)
    assert not bool(known.among(text).any())
    assert not known.waiting
    first, second = noise(1, 3, 8, seed=2), noise(4, 8, seed=3)
    known.note((first, {"more": [second], "counts": torch.tensor([3, 4]), "scale": torch.tensor([0.5])}))
    assert known.waiting
    x = text.clone()
    x[0, 2:4], x[1, 5] = second[1:3], first[0, 2]
    assert known.among(x).nonzero().tolist() == [[0, 2], [0, 3], [1, 5]]


def test_the_oldest_features_are_forgotten(monkeypatch):
    monkeypatch.setattr(merged, "_CALLS", 2)
    known, calls = merged.Known(), [noise(2, 8, seed=n) for n in range(3)]
    for features in calls:
        known.note(features)
    assert [bool(known.among(features[None]).all()) for features in calls] == [False, True, True]


def test_features_are_what_has_rows_and_fractions():
    features = noise(3, 8)
    others = [torch.ones(3), torch.ones(3, 8, dtype=torch.long), "text", None]
    assert [one.shape for one in tensors([features, *others, {"a": (features[:2],)}])] == [(3, 8), (2, 8)]


def test_an_output_alone_and_in_tuples_runs_along_the_sequence_again():
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    short = Short.of(keep)
    x = noise(2, 3, 5)
    owner = [[0, 0, 1, 2], [2, 2, 2, 2]]  # survivors stand at the right
    want = torch.stack([row[where] for row, where in zip(x, owner, strict=True)])
    assert torch.equal(short.lengthened(x), want)
    other = noise(2, 7)
    alone, (inner, same) = short.lengthened((x, (x, other)))
    assert torch.equal(alone, want)
    assert torch.equal(inner, want)
    assert same is other
