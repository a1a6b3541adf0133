"""The parts of the language stage: cache layers, masks, positions, what stands for dropped positions."""

import pytest
import torch
import transformers as hf

import saint
from saint.language.decoder import nearest_before
from saint.language.entries import CachePositions, entries, extended
from saint.language.masks import survivors_mask
from saint.tokens import TokenMap
from support.families import FAMILIES, cache_of, cached, prompts
from support.oracles import Oracle, relative_error
from support.plans import GREEDY, LANGUAGE, threshold_at

LLAVA = FAMILIES["llava-llama"]
# six positions; sample 0 keeps 0, 2, 3, 5 and sample 1 keeps 1, 4 (then padding)
TOKENS = TokenMap(
    torch.tensor([[0, 2, 3, 5], [1, 4, 0, 2]]),
    (4, 2),
    (6, 6),
    6,
    torch.tensor([[True] * 4, [True, True, False, False]]),
)


def test_entries_of_a_cache_over_turns():
    first = extended(None, 0, TOKENS)
    assert first.columns(8)[0].tolist() == [[0, 2, 3, 5, 6, 7], [1, 4, 0, 2, 6, 7]]
    assert first.columns(8)[1].tolist() == [[True] * 6, [True, True, False, False, True, True]]
    second = extended(first, 7, TOKENS)  # one token was written in between
    assert second.end == 13
    assert second.index.tolist() == [[0, 2, 3, 5, 6, 7, 9, 10, 12], [1, 4, 0, 2, 6, 8, 11, 7, 9]]
    assert second.valid[1].tolist() == [True, True, False, False, True, True, True, False, False]
    assert extended(None, 2, TOKENS).index.tolist() == [[0, 1, 2, 4, 5, 7], [0, 1, 3, 6, 2, 4]]
    assert entries(None, None, 9, 1) == (None, None)


def test_rows_of_a_key_map_are_shared():
    keys, order = extended(None, 0, TOKENS), torch.tensor([1, 0])
    assert keys.of_samples(order) is keys.of_samples(order)
    assert keys.of_samples(order).index.tolist() == TOKENS.index[[1, 0]].tolist()
    assert keys.repeat(2).index[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("additive", [False, True])
def test_rows_and_columns_of_a_dense_mask(additive):
    full = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min) if additive else full
    cut = survivors_mask(mask, TOKENS, None, before=0, first=0, queries=6, flash=False)
    seen = cut == 0 if additive else cut
    for row, length in enumerate(TOKENS.lengths):
        index = TOKENS.index[row, :length]
        assert torch.equal(seen[row, 0, :length, :length], full[0, 0][index][:, index])
        assert not seen[row, 0, :length, length:].any()


def test_padding_mask_of_flash_attention():
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cut = survivors_mask(padding, TOKENS, None, before=0, first=0, queries=6, flash=True)
    assert cut.tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    past = extended(None, 0, TOKENS)
    assert survivors_mask(None, None, past, before=6, first=0, queries=1, flash=True).tolist() == [
        [True] * 5,
        [True, True, False, False, True],
    ]


def test_no_mask_stays_no_mask():
    even = TokenMap(torch.tensor([[0, 2], [1, 3]]), (2, 2), (4, 4), 4)
    assert survivors_mask(None, even, None, before=0, first=0, queries=4, flash=False) is None
    past = extended(None, 0, even)
    assert survivors_mask(None, None, past, before=4, first=0, queries=1, flash=False) is None
    # padding of a ragged prompt stands behind every real query
    assert survivors_mask(None, TOKENS, None, before=0, first=0, queries=6, flash=False) is None


def test_window_that_left_the_prompt_behind_needs_no_gather():
    past = CachePositions(torch.empty(2, 0, dtype=torch.long), None, 9)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert survivors_mask(mask, None, past, before=13, first=9, queries=1, flash=False) is mask


def test_owner_is_the_nearest_survivor_before():
    assert nearest_before(TOKENS).tolist() == [[0, 0, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1]]


def ragged(model):
    """Prompts of one length that keep different numbers of tokens: transformers passes no mask at all."""
    inputs = prompts(LLAVA, model, [[4, "0", 7], [7, "0", 4], [2, "0", 9]])
    assert bool(inputs.pop("attention_mask").all())
    plan = saint.Plan(
        language=saint.Stage(saint.Saint(threshold=threshold_at(model, inputs, 1, 0.7)), layers=[1, 2, 3])
    )
    return inputs, plan


def test_ragged_prompts_without_any_mask():
    model = LLAVA.build()
    inputs, plan = ragged(model)
    steps = 32
    with saint.pruned(model, plan) as session, torch.no_grad():
        out = model(**inputs)
        trace, logits, tokens = session.trace, [out.logits[:, -1]], []
        for _ in range(steps):
            tokens.append(logits[-1].argmax(-1))
            step = model(input_ids=tokens[-1][:, None], **cached(model, cache_of(out)))
            logits.append(step.logits[:, -1])
    assert len(set(trace[-1].tokens_out.tolist())) > 1
    twin = LLAVA.build()
    twin.set_attn_implementation("eager")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = Oracle(LLAVA, twin, trace, inputs).continued(torch.stack(tokens, 1))
    assert relative_error(torch.stack(logits[:-1], 1), expected) < 1e-4


def test_reordered_cache():
    model = LLAVA.build()
    inputs, plan = ragged(model)
    step, order = torch.tensor([[7], [8], [9]]), torch.tensor([2, 0, 1])
    with saint.pruned(model, plan), torch.no_grad():
        expected = model(input_ids=step, **cached(model, cache_of(model(**inputs)))).logits
        cache = cache_of(model(**inputs))
        cache.reorder_cache(order)
        actual = model(input_ids=step[order], **cached(model, cache)).logits
        assert relative_error(actual, expected[order]) < 1e-5
        picked = cache_of(model(**inputs))
        picked.batch_select_indices(order[:2])
        assert (
            relative_error(model(input_ids=step[order[:2]], **cached(model, picked)).logits, expected[order[:2]]) < 1e-5
        )


def test_layers_get_the_true_positions():
    model = LLAVA.build()
    inputs = prompts(LLAVA, model, [[4, "0", 7]])
    seen = {}
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs, i=i: seen.__setitem__(i, kwargs["position_ids"]), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    with saint.pruned(model, saint.Plan(language=LANGUAGE)) as session, torch.no_grad():
        cache = cache_of(model(**inputs))
        for entry in session.trace:
            visual = (entry.kept[0] + 4).tolist()
            assert seen[entry.layer + 1].tolist() == [[0, 1, 2, 3, *visual, *range(40, 47)]]
        model(input_ids=torch.tensor([[5]]), **cached(model, cache))
        assert all(seen[i].tolist() == [[47]] for i in range(len(layers)))
    for hook in hooks:
        hook.remove()


def test_positions_beyond_five_thousand():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                          image_size=24, patch_size=4),
        text_config=hf.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                                   vocab_size=128, max_position_embeddings=8192),
        image_token_id=100,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    inputs = prompts(LLAVA, model, [[5000, "0", 3]])
    with saint.pruned(model, saint.Plan(language=saint.Stage(saint.Saint(keep=20), layers=[0]))), torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3, **GREEDY).shape == (1, 5042)
