"""Videos: which tokens show the same place at different times, votes across frames, and EVS, in every family with videos."""

import dataclasses
import math

import pytest
import torch

import saint
from saint import frames, graph, testing
from saint.methods import EVS, Duplicates, SaintVideo
from saint.tokens import Candidates, Facts, TokenMap
from saint.upstream.specs import Clip
from saint.vlm.videos import cells_of
from support.families import FAMILIES, IMAGE, PAD, VIDEO, one_at_a_time
from support.oracles import relative_error
from support.pictures import movie

NAMES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision"]
PACKED = NAMES[:3]
SPECIAL = [IMAGE, VIDEO]  # made by a random model, a forward over the whole would miss a picture
LOW = SaintVideo(threshold=0.5, neighbors=3, across=3, floor=0.0)


# -- tensors ----------------------------------------------------------------------------------------------------------


def earlier_by_hand(cells, valid):
    flat = [(b, n) for b in range(len(cells)) for n in range(len(cells[b]))]
    out = torch.full(cells.shape, -1)
    for i, (b, n) in enumerate(flat):
        for j in range(i - 1, -1, -1):
            c, m = flat[j]
            if cells[b, n] >= 0 and cells[c, m] == cells[b, n] and valid[b, n] and valid[c, m]:
                out[b, n] = j
                break
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_frame_before(seed):
    g = torch.Generator().manual_seed(seed)
    cells = torch.randint(-1, 6, (3, 9), generator=g)
    valid = torch.arange(9) < torch.tensor([[9], [5], [7]])
    assert torch.equal(frames.earlier(cells, valid=valid), earlier_by_hand(cells, valid))
    assert torch.equal(frames.earlier(cells), earlier_by_hand(cells, torch.ones_like(valid)))


def votes_by_hand(keys, cells, threshold, neighbors, gamma, across, valid):
    """Score and ballot of every candidate, with loops."""
    points = torch.nn.functional.normalize(keys, dim=-1)
    before, flat = earlier_by_hand(cells, valid), points.flatten(0, 1)
    scores, ballots = torch.full(cells.shape, -torch.inf), torch.zeros(cells.shape, dtype=torch.bool)
    for b in range(len(cells)):
        for n in range(len(cells[b])):
            if not valid[b, n]:
                continue
            targets = [m for m in range(1, len(cells[b]), 2) if valid[b, m]] if n % 2 == 0 else []
            all_within = [float(points[b, n] @ points[b, m]) for m in targets]
            edges = [cosine for cosine in all_within if cosine >= threshold]
            if before[b, n] >= 0 and (cosine := float(points[b, n] @ flat[before[b, n]])) >= threshold:
                edges += [cosine] * across
            if edges:
                scores[b, n] = len(edges) * math.exp(gamma * (sum(edges) / len(edges) - threshold))
            elif all_within:
                scores[b, n] = sum(all_within) / len(all_within)
            elif n % 2 == 0:
                scores[b, n] = 0.0
            ballots[b, n] = len(edges) >= neighbors
    return scores, ballots.sum(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("across", [1, 3])
def test_votes_across_frames(seed, across):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(4, 9, 3, generator=g)
    keys[1:, ::2] = keys[:-1, ::2] + 0.3 * torch.randn(3, 5, 3, generator=g)
    cells = torch.arange(9).expand(4, 9).clone()
    cells[2] = -1
    valid = torch.arange(9) < torch.tensor([[9], [9], [6], [7]])
    ballot = frames.vote(keys, cells, 0.4, 2, 4.0, across, valid=valid)
    scores, votes = votes_by_hand(keys, cells, 0.4, 2, 4.0, across, valid)
    torch.testing.assert_close(ballot.score, scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(ballot.votes, votes)
    assert votes.max() > 0


def test_without_a_video_the_votes_are_those_of_saint():
    keys = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    tokens = TokenMap.full(2, 11, keys.device)
    settings = {"threshold": 0.4, "neighbors": 2, "floor": 0.0}
    none = Candidates(keys, keys, tokens, 0, 1)
    nowhere = dataclasses.replace(none, facts=Facts(cells=torch.full((2, 11), -1)))
    want = saint.Saint(**settings).select(none)
    for candidates in (none, nowhere):
        got = SaintVideo(**settings).select(candidates)
        assert torch.equal(got.mask(11), want.mask(11))


def test_evs_by_hand():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4 * 6 + 2, 8, generator=g)  # a picture of two tokens, then four frames of six
    cells = torch.tensor([[-1, -1, *[*range(6)] * 4]])
    shown = Candidates(features, features, TokenMap.full(1, 26, features.device), 0, 1, facts=Facts(cells=cells))
    change = [
        1 - float(torch.cosine_similarity(features[0, n], features[0, n - 6], dim=0)) if n >= 8 else math.inf
        for n in range(26)
    ]
    for keep, count in ((0.5, 12), (9, 9), (0.1, 6), (3, 6)):  # the first frame at least
        want = sorted(sorted(range(26), key=lambda n: -change[n])[: 2 + count])
        assert EVS(keep=keep).select(shown).slots[0].tolist() == want
    assert EVS(keep=1.0).select(shown) is None
    assert EVS(keep=0.1).select(dataclasses.replace(shown, facts=Facts())) is None


def test_a_static_frame_keeps_one_token():
    keys = torch.randn(1, 8, 4).expand(3, 8, 4)
    cells = torch.arange(8).expand(3, 8)
    shown = Candidates(keys, keys, TokenMap.full(3, 8, keys.device), 0, 1, facts=Facts(cells=cells))
    method = SaintVideo(threshold=0.99, floor=0.0)
    assert method.select(shown).lengths == (8, 1, 1)
    assert dataclasses.replace(method, floor=0.5).select(shown).lengths == (8, 4, 4)


def test_bad_settings():
    with pytest.raises(ValueError, match="across must be an integer >= 1, got 0"):
        SaintVideo(across=0)
    with pytest.raises(ValueError, match="budget must be 'sample', an int"):
        SaintVideo(budget="batch")
    with pytest.raises(ValueError, match="keep must be"):
        EVS(keep=0.0)
    with pytest.raises(ValueError, match="not defined for the vision stage"):
        saint.Plan(vision=EVS())


def test_cells_of_copied_prompts():
    clips = [Clip(2, 3), Clip(1, 2), Clip(3, 1, behind=1)]  # two videos in the first prompt
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [0, 1, 2, 4, 5, 6, 8, 9]] = mask[1, 5:9] = True
    cells = cells_of(mask, clips)
    assert cells[0].tolist() == [0, 1, 2, -1, 0, 1, 2, -1, -1, -1]
    assert cells[1].tolist() == [-1] * 5 + [3, 3, 3, -1, -1]
    twice = cells_of(mask.repeat_interleave(2, 0), clips)
    assert torch.equal(twice[::2], cells)
    assert set(twice[1::2][twice[1::2] >= 0].tolist()) == {4, 5, 6, 7}
    assert cells_of(mask[:, :0], clips) is None
    assert cells_of(mask[:1, 8:], [Clip(1, 2)]) is None
    with pytest.raises(ValueError, match="12 tokens of videos, and the videos encoded last became 10"):
        cells_of(mask, [Clip(2, 5)])
    with pytest.raises(ValueError, match="which is not 2 times those of 1 videos"):
        cells_of(mask, [Clip(2, 3)])


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return one_at_a_time(lambda name: FAMILIES[name].build())


def together(parts):
    """Prompts as one left-padded batch."""
    longest = max(part["input_ids"].shape[1] for part in parts)

    def padded(x, value):
        return torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=value)

    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not name.endswith("ids")}
    out["input_ids"] = torch.cat([padded(part["input_ids"], PAD) for part in parts])
    out["attention_mask"] = torch.cat([padded(torch.ones_like(part["input_ids"]), 0) for part in parts])
    if "mm_token_type_ids" in parts[0]:
        out["mm_token_type_ids"] = torch.cat([padded(part["mm_token_type_ids"], 0) for part in parts])
    return out


def plans(name):
    out = {
        "evs": saint.Plan(connector=EVS(keep=0.5)),
        "connector": saint.Plan(connector=LOW),
        "language": saint.Plan(language=saint.Stage(LOW, layers=[0, 2])),
        "graph": saint.Plan(connector=saint.SaintFullGraph(keep=0.5)),
    }
    if name in PACKED:
        out["pixels"] = saint.Plan(vision=Duplicates())
        out["vision"] = saint.Plan(vision=saint.Stage(LOW, layers=[0, 2]))
        out["hybrid"] = saint.Plan(
            vision=saint.Stage(LOW, layers=[0]), connector=EVS(keep=0.8), language=saint.Stage(LOW, layers=[1])
        )
    return out


CASES = [(name, kind) for name in NAMES for kind in plans(name)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masked_oracle(model, name, kind):
    one, plan = model(name), plans(name)[kind]
    inputs = movie(name, [(4, 8, 8)])
    want, trace = testing.masked_oracle(one, plan, inputs)
    assert any(int(entry.tokens_out.sum()) < int(entry.tokens_in.sum()) for entry in trace)
    with saint.pruned(one, plan), torch.no_grad():
        got = one(**inputs).logits
        said = one.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)
    words = inputs["input_ids"][0] != VIDEO
    assert relative_error(got[:, words], want["logits"][:, words]) < 1e-4
    # step by step: each new token is what the oracle says behind the prompt so far
    grown = dict(inputs)
    for token in said[0, inputs["input_ids"].shape[1] :]:
        logits = testing.masked_oracle(one, plan, grown)[0]["logits"][0, -1]
        logits[SPECIAL] = -torch.inf
        assert int(logits.argmax()) == int(token)
        for key in ("input_ids", "mm_token_type_ids"):
            if key in grown:
                more = token.view(1, 1) if key == "input_ids" else torch.zeros(1, 1, dtype=torch.long)
                grown[key] = torch.cat([grown[key], more], 1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_video_keeps_the_same_in_every_batch(model, name, kind):
    one, plan = model(name), plans(name)[kind]
    sizes = [(4, 8, 8), (4, 8, 8)] if name == "llava-onevision" else [(3, 8, 8), (4, 4, 8)]
    parts = [movie(name, [size], seed) for seed, size in enumerate(sizes)]
    with saint.pruned(one, plan) as session, torch.no_grad():
        alone, logits = [], []
        for part in parts:
            logits.append(one(**part).logits[0, -1])
            alone.append(session.trace)
        both = one(**together(parts)).logits[:, -1]
        trace = session.trace
    for entry, *own in zip(trace, *alone, strict=True):
        kept = [row for part in own for row in part.kept]
        assert [row.tolist() for row in entry.kept] == [row.tolist() for row in kept]
    for got, want in zip(both, logits, strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["evs", "connector", "language"])
def test_a_prompt_without_a_video_beside_one(model, name, kind):
    one, inputs = model(name), movie(name, [(4, 8, 8)])
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "mm_token_type_ids": torch.zeros(1, 3, dtype=torch.long)}
    both = {
        **inputs,
        **together([{key: text[key] for key in text if key in inputs}, {k: inputs[k] for k in text if k in inputs}]),
    }
    with saint.pruned(one, plans(name)[kind]) as session, torch.no_grad():
        one(**inputs)
        alone = session.trace
        one(**both)
        for entry, own in zip(session.trace, alone, strict=True):
            assert [row.tolist() for row in entry.kept] == [[], own.kept[0].tolist()]


@pytest.mark.parametrize("name", PACKED)
def test_each_frame_has_its_own_budget(model, name):
    one = model(name)
    still, moving = movie(name, [(4, 8, 8)], still=1.0), movie(name, [(4, 8, 8)], still=0.0)
    method = SaintVideo(threshold=0.99, floor=0.1)
    with saint.pruned(one, saint.Plan(vision=saint.Stage(method, layers=[0]))) as session, torch.no_grad():
        one(**still)
        assert session.trace[0].tokens_out.tolist() == [16, 2, 2, 2]
        one(**moving)
        assert session.trace[0].tokens_out.tolist() == [16, 16, 16, 16]
        half = {
            **still,
            "pixel_values_videos": torch.cat([still["pixel_values_videos"][:128], moving["pixel_values_videos"][128:]]),
        }
        one(**half)
        assert session.trace[0].tokens_out.tolist() == [16, 2, 16, 16]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("tau", [0.0, 0.01])
def test_squares_of_pixels_that_do_not_change_leave_in_front_of_the_tower(model, name, tau):
    one, inputs = model(name), movie(name, [(4, 8, 8), (2, 4, 8)])
    pixels = inputs["pixel_values_videos"]
    pixels[64 * 2 : 64 * 3] = pixels[64 : 64 * 2]  # the third frame shows what the second does
    frames_of = [list(one.view(-1, 4, 96)) for one in pixels.split([64] * 4 + [32] * 2)]
    want = [
        [
            group
            for group, shown in enumerate(frame)
            if before is None or not torch.equal(shown, frames_of[before][group])
        ]
        or [len(frame) - 1]
        for frame, before in zip(frames_of, [None, 0, 1, 2, None, 4], strict=True)
    ]
    with saint.pruned(one, saint.Plan(vision=Duplicates(tau=tau))) as session, torch.no_grad():
        one(**inputs)
        kept = [row.tolist() for row in session.trace[0].kept]
    assert kept == want
    assert kept[2] == [15]


@pytest.mark.parametrize("name", NAMES)
def test_what_has_left_is_not_the_frame_before(model, name):
    """Behind a drop the neighbour is the nearest frame that still has the place."""
    one, seen = model(name), []

    class Ear(SaintVideo):
        def select(self, candidates):
            seen.append(candidates.facts.cells)
            return super().select(candidates)

    plan = saint.Plan(language=saint.Stage(Ear(threshold=0.5, neighbors=3, floor=0.0), layers=[0, 1]))
    with saint.pruned(one, plan) as session, torch.no_grad():
        one(**movie(name, [(4, 8, 8)], still=0.7))
        kept = session.trace[0].kept[0]
    tokens, count = (9, 37) if name == "llava-onevision" else (16, 64)
    places = torch.arange(count) % tokens
    places[4 * tokens :] = -1  # the newline behind the last frame
    assert seen[0][0].tolist() == places.tolist()
    assert seen[1][0].tolist() == places[kept].tolist()
    assert len(kept) < count


@pytest.mark.parametrize("name", NAMES)
def test_beams(model, name):
    one, plan = model(name), saint.Plan(connector=EVS(keep=0.5))
    inputs = movie(name, [(4, 8, 8)])
    with saint.pruned(one, plan) as session, torch.no_grad():
        one(**inputs)
        kept = session.trace[0].kept[0].tolist()
        one.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        assert [row.tolist() for row in session.trace[0].kept] in ([kept], [kept, kept])


@pytest.mark.parametrize("name", NAMES)
def test_features_that_were_encoded_earlier(model, name):
    one, plan = model(name), saint.Plan(connector=EVS(keep=0.5))
    other = (4, 8, 8) if name == "llava-onevision" else (2, 8, 16)  # as many tokens, other frames
    sizes = [(4, 8, 8)], [other]
    prompts = [movie(name, size, seed) for seed, size in enumerate(sizes)]
    pixels = ("pixel_values_videos", "video_grid_thw")
    with saint.pruned(one, plan) as session, torch.no_grad():
        want, encoded = [], []
        for prompt in prompts:
            one(**prompt)
            want.append(session.trace[0].kept[0].tolist())
        if "mm_encoder_outputs" not in one.model.forward.__code__.co_varnames and not hasattr(
            one, "_supports_mm_encoder_outputs"
        ):
            pytest.skip("this transformers takes no features")
        for prompt in prompts:
            given = {key: prompt[key] for key in pixels if key in prompt}
            encoded.append(one.model.get_video_features(**given, return_dict=True))
        for which in (0, 1, 0, 0):
            text = {key: value for key, value in prompts[which].items() if key != "pixel_values_videos"}
            one(**text, mm_encoder_outputs={"video": encoded[which]})
            assert session.trace[0].kept[0].tolist() == want[which]
    foreign = one.model.get_video_features(**{k: prompts[0][k] for k in pixels if k in prompts[0]}, return_dict=True)
    text = {key: value for key, value in prompts[0].items() if key != "pixel_values_videos"}
    with saint.pruned(one, plan), pytest.raises(ValueError, match="encode them with the patched model"):
        one(**text, mm_encoder_outputs={"video": foreign})


@pytest.mark.parametrize("name", NAMES)
def test_undo(model, name):
    one = model(name)
    inputs = movie(name, [(2, 8, 8)])
    with torch.no_grad():
        want = one(**inputs).logits
        before = testing.snapshot(one)  # a first forward leaves hooks of transformers' own
        with saint.pruned(one, saint.Plan(connector=LOW, language=saint.Stage(LOW, layers=[0]))):
            one(**inputs)
        assert testing.snapshot(one) == before
        assert torch.equal(one(**inputs).logits, want)


def test_votes_across_frames_are_counted_exactly_at_the_threshold():
    """The edge of equal vectors, cosine 1, at threshold 1."""
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]])
    ballot = frames.vote(keys, torch.arange(2).expand(2, 2), 1.0, 1, 10.0, 1)
    assert ballot.votes.tolist() == [0, 1]
    assert ballot.score[1].tolist()[0] == pytest.approx(1.0, abs=1e-5)
    assert graph.NO_TARGET < -1
