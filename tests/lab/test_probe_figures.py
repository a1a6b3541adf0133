"""Every number of the probe against loops over single queries: padded, packed and plain samples, prompts."""

import functools
import math

import pytest
import torch

import saint
from saint import testing
from saint.lab.analysis import geometry, similarity
from saint.lab.analysis.probe import QUANTITIES, Probe
from support.families import FAMILIES, IMAGE, prompts
from support.models import NAMES, prepared
from support.padded import alone, naflex, padded_models, patches, with_padding
from support.text import MODELS, batch, tiny

padded = functools.cache(with_padding)
THRESHOLDS = [0.3, 0.8]


class Heard:
    """Keeps what observers are told, every call of an attention."""

    def __init__(self):
        self.keys, self.passed, self.calls = {}, {}, {}

    def candidates(self, stage, layer, candidates):
        self.keys[stage, layer] = candidates

    def layer(self, stage, layer, passed):
        self.passed[stage, layer] = passed

    def attention(self, stage, layer, attended):
        self.calls.setdefault((stage, layer), []).append(attended)


def listened(model, inputs, text=False):
    heard, probe = Heard(), Probe(THRESHOLDS, neighbors=2, visual=not text)
    with saint.pruned(model, saint.Plan(), observers=[heard, probe]), torch.no_grad():
        model(**inputs)
    return heard, probe.take()


def entropy(p: torch.Tensor) -> float:
    return -sum(float(x) * math.log(float(x)) for x in p.flatten() if float(x) > 0)


def rows(call, sample: int) -> torch.Tensor:
    """Head-mean attention of one sequence by its definition, float64 [Q, N]."""
    q, k = call.query[sample].double(), call.key[sample].double()
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale)
    if call.causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if call.mask is not None:
        mask = call.mask[min(sample, len(call.mask) - 1)] if call.mask.ndim == 4 else call.mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1).nan_to_num(0.0).mean(0)


def received(p: torch.Tensor) -> tuple[float, float]:
    """Entropies of what keys receive of the queries p [Q, N], normalised by the sum and by the maximum."""
    u = p.sum(0)
    return entropy(u / u.sum()), entropy(u / u.max())


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def check(found: dict, layer: int, want: dict[str, float]) -> None:
    for name, value in want.items():
        assert found["quantities"][name][layer] == pytest.approx(value, rel=2e-4, abs=2e-5), (name, layer)


def check_stream(heard, taken, stage: str, samples: list[list[torch.Tensor]], entering=None) -> None:
    """Rank, updates, outliers, CKA, similarities of keys.

    ``samples[point]``: rows of the candidates of each sample, in front of layer 0 and behind each. ``entering``: of each layer,
    where something is added between them (DeepStack).
    """
    found = taken[stage]
    depth = len(samples) - 1
    for layer in range(depth):
        before, after = (entering or samples)[layer], samples[layer + 1]
        candidates = heard.keys[stage, layer]
        keys = [k[:n] for k, n in zip(candidates.keys, candidates.tokens.lengths, strict=True)]
        check(found, layer, {
            "residual_update": mean(geometry.residual_update(a, b) for a, b in zip(before, after, strict=True)),
            "effective_rank": mean(geometry.effective_rank(x) for x in after),
            "outliers": mean(geometry.outliers(x) for x in after),
            "key_similarity": mean(similarity.key_similarity(k) for k in keys),
            "key_similarity_centred": mean(similarity.key_similarity(k, center=True) for k in keys),
        })  # fmt: skip
        shares = [similarity.droppable(k, THRESHOLDS, 2) for k in keys]
        for place in range(len(THRESHOLDS)):
            assert found["droppable"][place][layer] == pytest.approx(mean(s[place] for s in shares))
    most = max(len(rows_of) for rows_of in samples[0])
    compared = [b for b, rows_of in enumerate(samples[0]) if len(rows_of) == most]
    hsic = [geometry.hsic(torch.stack([geometry.gram(point[b]) for point in samples])).double() for b in compared]
    table = torch.stack(hsic).mean(0)
    assert torch.allclose(torch.tensor(found["hsic"]).double(), table, rtol=1e-3, atol=1e-6)
    for layer in range(depth):
        cka = table[layer, layer + 1] / (table[layer, layer] * table[layer + 1, layer + 1]).sqrt()
        assert found["quantities"]["cka_adjacent"][layer] == pytest.approx(float(cka), rel=1e-3)


# -- padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", padded_models())
def test_padding_changes_no_number(name):
    model, inputs = padded(name)
    for sample in range(3):
        with_rows = {key: value[sample : sample + 1] for key, value in inputs.items()}
        got, want = (listened(model, one)[1]["vision"] for one in (with_rows, alone(inputs, sample)))
        assert got["tokens"] == want["tokens"]
        assert set(got["quantities"]) == set(want["quantities"]) <= set(QUANTITIES)
        for quantity, values in want["quantities"].items():
            assert got["quantities"][quantity] == pytest.approx(values, rel=1e-4, abs=1e-5), quantity
        assert got["droppable"] == [pytest.approx(values) for values in want["droppable"]]
        assert torch.allclose(torch.tensor(got["hsic"]), torch.tensor(want["hsic"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("samples", [[0, 1], [0, 1, 2], [1, 2]])
def test_a_padded_batch_is_the_mean_of_its_samples(samples):
    """Weighted by tokens where a number is one of tokens, else by samples."""
    model, inputs = naflex("avg"), patches()
    together = listened(model, {key: value[samples] for key, value in inputs.items()})[1]["vision"]
    apart = [listened(model, alone(inputs, sample))[1]["vision"] for sample in samples]
    counts = [one["tokens"][0] for one in apart]
    assert together["tokens"] == (mean(counts), 3)
    for quantity, values in together["quantities"].items():
        if quantity == "cka_adjacent":
            continue  # of the longest samples alone
        weights = counts if quantity.split("_")[0] in ("token", "received") else [1] * len(counts)
        for layer, value in enumerate(values):
            each = [one["quantities"][quantity][layer] for one in apart]
            want = sum(w * v for w, v in zip(weights, each, strict=True)) / sum(weights)
            assert value == pytest.approx(want, rel=1e-4, abs=1e-5), quantity


# -- encoders -------------------------------------------------------------------------------------------------------------


def check_vision(heard, taken, prefix: int) -> None:
    """Numbers of attention, from all calls of a layer: means over its queries where they are of tokens."""
    found = taken["vision"]
    for (stage, layer), calls in heard.calls.items():
        if stage != "vision":
            continue
        pieces = [rows(call, sample)[prefix:] for call in calls for sample in range(len(call.query))]
        tops = [rows(call, sample)[0] for call in calls for sample in range(len(call.query))]
        sizes = [len(piece) for piece in pieces]
        total = sum(sizes)
        got = [received(piece) for piece in pieces]
        want = {
            "token_entropy": sum(entropy(piece) for piece in pieces) / total,
            "received_entropy": sum(n * one[0] for n, one in zip(sizes, got, strict=True)) / total,
            "received_entropy_max": sum(n * one[1] for n, one in zip(sizes, got, strict=True)) / total,
        }
        if prefix:
            want["cls_entropy"] = mean(entropy(top) for top in tops)
            want["cls_share"] = mean(float(piece[:, 0].mean()) for piece in pieces)
        else:
            assert "cls_entropy" not in found["quantities"]
        check(found, layer, want)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_an_encoder(name):
    model, _, inputs = prepared(name)
    inputs = {key: value[:1] for key, value in inputs.items()}  # an image, without padding
    heard, taken = listened(model, inputs)
    passed = [heard.passed["vision", layer] for layer in range(len(heard.passed))]
    prefix = passed[0].prefix
    check_vision(heard, taken, prefix)
    points = [passed[0].before, *(one.after for one in passed)]
    check_stream(heard, taken, "vision", [[x[prefix:] for x in point] for point in points])
    assert taken["vision"]["tokens"] == (36, prefix)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tower])
def test_numbers_of_a_tower(name):
    """Segments of a packed sequence, windows, tiles: one query counts as much as another."""
    family = FAMILIES[name]
    model = family.build()
    heard, taken = listened(model, prompts(family, model, [[4, "0", 7]]))
    check_vision(heard, taken, heard.passed["vision", 0].prefix)
    if name == "qwen2.5-vl":
        sizes = {call.query.shape[2] for calls in heard.calls.values() for call in calls if not call.causal}
        assert len(sizes) > 1, "windows of several sizes"


# -- language models --------------------------------------------------------------------------------------------------------


def check_language(heard, taken, visual: torch.Tensor, text: bool) -> None:
    found = taken["language"]
    depth = len([1 for stage, _ in heard.passed if stage == "language"])
    first = int(visual.nonzero()[0])
    behind = ~visual & (torch.arange(len(visual)) > first)
    assert found["tokens"] == (int(visual.sum()), int((~visual).sum()))
    points = [heard.passed["language", 0].before[0]] + [heard.passed["language", i].after[0] for i in range(depth)]
    entering = [[heard.passed["language", i].before[0, visual]] for i in range(depth)]
    check_stream(heard, taken, "language", [[x[visual]] for x in points], entering)
    for layer in range(depth):
        (call,) = heard.calls["language", layer]
        p, keys = rows(call, 0), call.key[0].float().mean(0)
        own, by_max = received(p[visual])
        want = {
            "last_entropy": entropy(p[-1]),
            "token_entropy": entropy(p[visual]) / int(visual.sum()),
            "received_entropy": own,
            "received_entropy_max": by_max,
        }
        shares = {
            "last_share": float(p[-1, visual].sum()),
            "visual_share": float(p[visual][:, visual].sum(1).mean()),
            "text_share": float(p[behind][:, visual].sum(1).mean()),
        }
        unit = torch.nn.functional.normalize(keys.double(), dim=-1)
        shares["text_similarity"] = mean(float(a @ b) for a in unit[visual] for b in unit[~visual])
        if text:
            assert not shares.keys() & found["quantities"].keys()
        else:
            want |= shares
        assert torch.allclose(heard.keys["language", layer].keys[0], keys[visual], atol=1e-6)
        check(found, layer, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_a_prompt_with_an_image(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7]])
    heard, taken = listened(model, inputs)
    check_language(heard, taken, inputs["input_ids"][0] == IMAGE, text=False)


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_a_prompt_without_images(name):
    model, inputs = tiny(name), batch([17])
    heard, taken = listened(model, inputs, text=True)
    inner = torch.ones(17, dtype=torch.bool)
    inner[0] = inner[-1] = False
    check_language(heard, taken, inner, text=True)


def test_each_forward_counts_anew():
    model, _, inputs = prepared("timm/vit-augreg")
    probe = Probe(THRESHOLDS)
    taken = []
    with saint.pruned(model, saint.Plan(), observers=[probe]):
        for sample in (0, 1, 0):
            testing.run(model, {key: value[sample : sample + 1] for key, value in inputs.items()})
            taken.append(probe.take())
    assert taken[0] == taken[2] != taken[1]
    assert probe.take() == {}


@pytest.mark.parametrize("stage", ["vision", "language"])
def test_similar_keys_are_centred_where_that_is_asked_for(stage):
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7]])
    heard, probe = Heard(), Probe(THRESHOLDS, neighbors=2, center={stage: True})
    with saint.pruned(model, saint.Plan(), observers=[heard, probe]), torch.no_grad():
        model(**inputs)
    taken = probe.take()
    for (name, layer), candidates in heard.keys.items():
        shares = similarity.droppable(candidates.keys[0], THRESHOLDS, 2, center=name == stage)
        assert [row[layer] for row in taken[name]["droppable"]] == pytest.approx(shares)
