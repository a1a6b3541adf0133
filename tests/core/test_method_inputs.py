"""What each method looks at: keys, features, the attention row, the place, and nothing else of what it is shown."""

import dataclasses

import pytest
import torch

import saint
from saint import graph
from saint.methods import (
    DART,
    MMR,
    PPT,
    SCOPE,
    ApET,
    CDPruner,
    D2Pruner,
    DivPrune,
    Duplicates,
    FastV,
    Flat,
    Grid,
    HiPrune,
    Match,
    OTPrune,
    PiToMe,
    PriorTR,
    PruMerge,
    PyramidDrop,
    Random,
    Resize,
    SparseVLM,
    ToMe,
    VisionZip,
    VisPruner,
)
from saint.needs import TOWER, TOWER_CLASS, TOWER_KEYS, TOWER_VALUES
from saint.tokens import Candidates, Facts, TokenMap, Tower

COUNT, COLUMNS = 24, 6
LOOKS = {  # method: the parts of the candidates that its choice depends on
    saint.Saint(keep=0.6): {"keys"},
    saint.Saint(threshold=0.4, neighbors=3): {"keys"},
    saint.SaintFullGraph(keep=0.6): {"keys"},
    Match(keep=0.6): {"keys", "columns"},
    Match(keep=0.6, fate="merge"): {"keys", "columns"},
    ToMe(keep=0.6): {"keys"},
    PiToMe(keep=0.6): {"keys"},
    PPT(keep=0.6, threshold=0.0): {"own_tower_class", "own_tower_values"},
    PPT(keep=0.6, threshold=1.0): {"keys"},
    PPT(keep=0.6, threshold=6e-3): {"keys", "own_tower_class", "own_tower_values"},
    DivPrune(keep=0.6): {"features"},
    OTPrune(keep=0.6, gamma=10.0): {"features"},
    ApET(keep=0.6, basis=3): {"features"},
    CDPruner(keep=0.6): {"features", "text"},
    MMR(keep=0.6): {"features", "text"},
    MMR(keep=0.6, weight=0.0): {"features"},
    FastV(keep=0.6): {"attention"},
    PyramidDrop(keep=0.6): {"attention"},
    SCOPE(keep=0.4): {"features", "attention"},
    SCOPE(keep=0.4, alpha=0.0): {"features"},
    DART(keep=0.6, pivots=3): {"keys", "features"},
    SparseVLM(keep=0.6): {"raters"},
    PriorTR(keep=0.6): {"question", "first_query"},
    D2Pruner(keep=0.4): {"keys", "attention"},
    D2Pruner(keep=0.4, pivots=1.0): {"attention"},
    VisionZip(keep=0.6): {"tower_class", "tower_keys"},
    VisionZip(keep=0.6, contextual=0.0): {"tower_class"},
    VisPruner(keep=0.6): {"tower_class", "features"},
    VisPruner(keep=0.6, important=1.0): {"tower_class"},
    HiPrune(keep=0.6, alpha=0.8): {"tower_received", "tower_grid"},
    HiPrune(keep=0.6, alpha=0.0): {"tower_received"},
    PruMerge(keep=0.6, neighbors=3): {"tower_joined", "tower_keys"},
    PruMerge(neighbors=3): {"tower_joined", "tower_keys"},
    PruMerge(neighbors=0): {"tower_joined"},
    Grid(keep=0.6): set(),
    Flat(): {"pixels", "grids"},
    Resize(): {"grids"},
    Duplicates(): {"pixels"},
    Duplicates(tau=0.1): {"pixels"},
    Random(keep=0.6): set(),
}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shown(**changes: object) -> Candidates:
    base = Candidates(
        noise(1, 2, COUNT, 4),
        noise(2, 2, COUNT, 5),
        TokenMap.full(2, COUNT, torch.device("cpu")),
        0,
        1,
        attention=noise(3, 2, COUNT).softmax(-1),
        facts=PLACED,
        rows=ROWS,
    )
    return dataclasses.replace(base, **changes)


def plain(seed: int) -> torch.Tensor:
    """Pixels of patches of one colour, of which some are of another than the rest."""
    colours = noise(seed, 2, COUNT, 1, 1) > 1
    return colours.float().expand(-1, -1, 1, 4)


ASKED = {name: f"own_{name}" for name in (TOWER_CLASS, TOWER_VALUES)}  # of the encoder's layer where tokens leave
ROWS = {
    name: noise(seed, 2, COUNT).softmax(-1)
    for seed, name in enumerate(("question", "first_query", "raters", *ASKED), 20)
}


def tower(columns: int = COLUMNS, **seeds: int) -> Tower:
    """What four layers of a tower show; ``seeds`` of what is to be another."""
    own = {what: noise(seeds.get(what, 20 + i), 2, COUNT, 4) for i, what in enumerate(sorted(TOWER))}
    shown = {
        (what, layer): value + layer if what == TOWER_KEYS else value.softmax(1)[..., layer : layer + 1]
        for what, value in own.items()
        for layer in range(4)
    }
    grid = torch.tensor([COUNT // columns, columns]).expand(2, COUNT, 2)
    return Tower(shown, 4, 2, torch.arange(COUNT).expand(2, COUNT), grid, 1)


PLACED = Facts(
    columns=COLUMNS,
    pixels=plain(4),
    grids=((COUNT // COLUMNS, COLUMNS),) * 2,
    text=noise(5, 2, 3, 5),
    tower=tower(),
)
OTHER = {
    "keys": {"keys": noise(11, 2, COUNT, 4)},
    "features": {"features": noise(12, 2, COUNT, 5)},
    "attention": {"attention": noise(13, 2, COUNT).softmax(-1)},
    "columns": {"facts": dataclasses.replace(PLACED, columns=5)},
    "pixels": {"facts": dataclasses.replace(PLACED, pixels=plain(14))},
    "text": {"facts": dataclasses.replace(PLACED, text=noise(15, 2, 4, 5))},
    **{ASKED.get(name, name): {"rows": {**ROWS, name: noise(30, 2, COUNT).softmax(-1)}} for name in ROWS},
    "grids": {"facts": dataclasses.replace(PLACED, grids=((COUNT // 4, 4),) * 2)},
    **{what: {"facts": dataclasses.replace(PLACED, tower=tower(**{what: 30}))} for what in sorted(TOWER)},
    "tower_grid": {"facts": dataclasses.replace(PLACED, tower=tower(columns=4))},
}


def choice(method, candidates):
    selection = method.select(candidates)
    assert selection is not None
    more = (None if one is None else one.tolist() for one in (selection.owner, selection.adds, selection.gone))
    return selection.slots.tolist(), selection.lengths, *more


@pytest.mark.parametrize("method", LOOKS, ids=repr)
def test_a_method_looks_at_what_it_says_and_at_nothing_else(method):
    before = choice(method, shown())
    for part, change in OTHER.items():
        changed = choice(method, shown(**change)) != before
        assert changed == (part in LOOKS[method]), f"{part} {'matters' if changed else 'is not looked at'}"


@pytest.mark.parametrize("part", ["features", "tower_received", "tower_class", "attention"])
def test_scope_looks_at_the_tower_in_front_of_the_language_model(part):
    front = {"attention": None}
    changed = choice(SCOPE(keep=0.4), shown(**front, **(OTHER[part] if part != "attention" else {})))
    assert (changed != choice(SCOPE(keep=0.4), shown(**front))) == (part in {"features", "tower_received"})
    assert choice(SCOPE(keep=0.4), shown(**front)) != choice(SCOPE(keep=0.4), shown())


def test_every_method_is_here():
    video = {"evs", "saint_video"}  # they need frames
    assert {method.name for method in LOOKS} == set(saint.methods.names()) - video


@pytest.mark.parametrize("keep", [2, 7, 15])
def test_divprune_spreads_features_and_not_keys(keep):
    """Farthest-point selection, one distance at a time."""
    candidates = shown()
    (chosen, *_) = choice(DivPrune(keep), candidates)
    for row, features in zip(chosen, candidates.features, strict=True):
        unit = torch.nn.functional.normalize(features.double(), dim=-1)
        away = [[1 - float(unit[i] @ unit[j]) for j in range(COUNT)] for i in range(COUNT)]
        nearest = [min(away[i][j] for j in range(COUNT) if j != i) for i in range(COUNT)]
        want = [max(range(COUNT), key=lambda i: (nearest[i], -i))]
        while len(want) < keep:
            left = [i for i in range(COUNT) if i not in want]
            want.append(max(left, key=lambda i: (min(away[i][s] for s in want), -i)))
        assert row == sorted(want)


# -- equality at a threshold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["drop", "weigh", "merge"])
def test_pairs_of_equal_tokens_reach_a_threshold_of_one(fate):
    """Six directions, two tokens of each beside one another on the snake."""
    keys = torch.eye(6).repeat_interleave(2, 0)[None]
    tokens = TokenMap.full(1, 12, torch.device("cpu"))
    selection = Match(threshold=1.0, fate=fate, floor=0.0).select(Candidates(keys, keys, tokens, 0, 1))
    assert selection.lengths == (6,)
    assert [slot // 2 for slot in selection.slots[0].tolist()] == list(range(6))  # one of each pair
    assert bool((graph.pair(keys, tokens.index, None).similarity == 1.0).all())


@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.0, -0.5])
@pytest.mark.parametrize("kind", ["match", "saint"])
def test_a_pair_exactly_at_the_threshold_counts(kind, threshold):
    """Vectors whose cosine is the threshold without rounding, and the next larger threshold, which they do not reach."""
    beside = {0.5: [1.0, 1.0, 1.0, 1.0], 0.25: None, 0.0: [0.0, 1.0, 0.0, 0.0], -0.5: [-1.0, 1.0, 1.0, 1.0]}[threshold]
    first = torch.tensor([1.0, 0.0, 0.0, 0.0] + [0.0] * 12)
    other = torch.ones(16) if beside is None else torch.tensor(beside + [0.0] * 12)
    keys = torch.stack([first, other])[None]
    tokens = TokenMap.full(1, 2, torch.device("cpu"))
    for value, leaves in ((threshold, 1), (threshold + 1e-3, 0)):
        method = (
            Match(threshold=value, floor=0.0)
            if kind == "match"
            else saint.Saint(threshold=value, neighbors=1, floor=0.0)
        )
        selection = method.select(Candidates(keys, keys, tokens, 0, 1))
        assert 2 - (2 if selection is None else selection.lengths[0]) == leaves
