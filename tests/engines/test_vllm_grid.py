"""Positions of rows and columns (M-RoPE) in a real vLLM: Qwen2.5-VL and Qwen3-VL."""

from vllm_reference import GRID, Reference, check_mixed, job, mixed, needs_vllm

pytestmark = needs_vllm


def test_mixed_requests_on_a_grid(grid, run):
    """Rows and columns are kept, compiled too; pictures are wider than the number of places that they keep."""
    side = (16, 80)
    check_mixed(run, Reference(grid, GRID, side), mixed(80, GRID), model=grid, side=side, enforce_eager=False)


def test_a_chunk_may_end_anywhere_in_a_picture(grid, run):
    """In front of it, between its first token and the next, behind it; and so may what is cached of a prompt."""
    side, words = (32, 48), [f"w{number}" for number in range(2, 60)]
    rounds = [
        [job(f"{' '.join(words[:before])} {GRID} {' '.join(behind)}", [0], {"keep": 0.5})]
        for before in range(16, 35)
        for behind in (words[40:], words[30:50])
    ]
    got = run(rounds, model=grid, side=side, max_num_batched_tokens=16, enable_prefix_caching=True, block_size=32)
    reference = Reference(grid, GRID, side)
    for (request,), (answer,) in zip(rounds, got["rounds"], strict=True):
        assert answer["new"] == reference.greedy(request, answer["new"])
    cached = [answer["cached"] for (answer,) in got["rounds"][1::2]]
    assert any(before + 1 < count < before + 13 for before, count in zip(range(16, 35), cached, strict=True)), cached


def test_where_features_leave_the_model_places_are_evenly_spaced(grid, run):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    side, rounds = (16, 80), [[job(f"w5 {GRID} w{seed}", [seed], {"keep": 3}, new=1)] for seed in range(2, 34)]
    got = run(rounds, model=grid, side=side, never=[], speculative_config=speculative)
    reference = Reference(grid, GRID, side)
    new = [answer["new"] for (answer,) in got["rounds"]]
    even, exact = (
        [reference.greedy(request, [0], never=[], even=even) for (request,) in rounds] for even in (True, False)
    )
    assert even != exact
    assert new == even


def test_videos_stay_as_they_are(grid, run):
    """Alone, in front of a picture, and in front of one that is pruned."""
    video = "<|vision_start|> <|video_pad|> <|vision_end|>"
    settings = {"model": grid, "side": (32, 48), "limit_mm_per_prompt": {"image": 1, "video": 1}, "max_model_len": 512}
    both = f"w5 {video} w6 {GRID} w7"
    rounds = [[job(f"w5 {video} w6", videos=[1]), job(both, [0], videos=[1])]]
    plain = run(rounds, plugin=False, **settings)["rounds"]
    got = run([*rounds, [job(both, [0], {"keep": 0.25}, videos=[1])]], **settings)["rounds"]
    assert got[:1] == plain
    assert len(got[1][0]["prompt"]) == len(plain[0][1]["prompt"]) - 18


def test_pictures_are_not_pruned_beside_videos_that_are(grid, run):
    """Only refused: in vLLM 0.32 the runner for CPUs never takes the positions from the features again."""
    rounds = [[job(f"w5 {GRID} w7", [0], {"keep": 0.25})], [job("w5 w6")]]
    got = run(rounds, model=grid, side=(32, 48), video_pruning_rate=0.5)["rounds"]
    assert "--video-pruning-rate is set" in got[0][0]["error"]
    assert got[1][0]["error"] is None
