"""Decoders that no family is written for, by specs of a few lines: recurrent layers, shared keys, side inputs, image blocks."""

import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import BaseModelOutputWithPooling

import saint
from saint import testing
from saint.upstream.names import ENCODED, Parameters
from saint.upstream.specs import FamilySpec
from saint.upstream.tiny import END, START, make, text_config
from saint.upstream.transformers import qualified
from saint.vlm.prompts import answered
from support.families import IMAGE, VIDEO
from support.oracles import relative_error

pytest.importorskip("transformers.models.qwen3_5", reason="not in this release of transformers")
pytest.importorskip("transformers.models.gemma4", reason="not in this release of transformers")

if not Parameters(hf.Qwen3_5Model.forward).has(ENCODED):
    pytest.skip("this release takes no features that were computed earlier", allow_module_level=True)

PLAN = saint.Plan(connector=saint.SaintFullGraph(keep=0.6, step=4))
SPECIAL = list(range(100, 108))
SPECS = [
    FamilySpec("Qwen3.5", qualified("qwen3_5", "Qwen3_5Model"), tower="visual", connector="visual.merger"),
    FamilySpec("Qwen3.5 MoE", qualified("qwen3_5_moe", "Qwen3_5MoeModel"), tower="visual", connector="visual.merger"),
    FamilySpec("Gemma 4", qualified("gemma4", "Gemma4Model"), tower="vision_tower", connector="embed_vision"),
]


@pytest.fixture(autouse=True)
def _known(fresh):
    for spec in SPECS:
        saint.register(spec)


def qwen(name, **more):
    text = text_config(
        num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "partial_rotary_factor": 1.0,
                         "mrope_interleaved": True}, **more,
    )  # fmt: skip
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48,
             "num_position_embeddings": 64}  # fmt: skip
    config = getattr(hf, f"{name}Config")(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return make(getattr(hf, f"{name}ForConditionalGeneration"), config)


def gemma(**more):
    text = text_config(
        num_hidden_layers=6, layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2, vocab_size_per_layer_input=128,
        **{"sliding_window": 24, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", **more},
    )  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4}  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text, vision_config=tower, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=104, boi_token_id=105, eoi_token_id=106, boa_token_id=107,
    )  # fmt: skip
    return make(hf.Gemma4ForConditionalGeneration, config)


MODELS = {
    "qwen3.5": lambda: qwen("Qwen3_5"),
    "qwen3.5-moe": lambda: qwen(
        "Qwen3_5Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "gemma4": gemma,
    "gemma4-shared-keys": lambda: gemma(num_kv_shared_layers=3, hidden_size_per_layer_input=8),
    "gemma4-causal": lambda: gemma(use_bidirectional_attention=None),
}


def batch(model):
    """Two prompts with features of one image each, computed elsewhere; left padding."""
    generator = torch.Generator().manual_seed(0)
    sizes = (24, 16)
    rows = [
        [*torch.randint(2, 99, (n,), generator=generator).tolist(), START, *[IMAGE] * k, END,
         *torch.randint(2, 99, (tail,), generator=generator).tolist()]
        for n, k, tail in ((4, sizes[0], 5), (3, sizes[1], 2))
    ]  # fmt: skip
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    features = [torch.randn(k, 48, generator=generator) for k in sizes]
    inputs = {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }  # fmt: skip
    if "qwen" in model.config.model_type:
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 12], [1, 8, 8]])
    return inputs


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_answer_equal_the_oracles(name):
    model = MODELS[name]()
    inputs = batch(model)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": SPECIAL}

    with saint.pruned(model, PLAN) as session, torch.no_grad():
        prompt = model(**inputs).logits
        out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **greedy)
        static = model.generate(**inputs, cache_implementation="static", **greedy)
        trace, memory = session.trace, session.kv_memory

    new, logits = out.sequences[:, length:], torch.stack(out.logits, 1)
    assert trace[0].tokens_out.tolist() == [14, 10]
    assert memory.kept < memory.unpruned
    removed, _ = testing.removal_oracle(model, PLAN, answered(model, inputs, new))
    words = inputs["attention_mask"].bool() & (ids != IMAGE)
    assert relative_error(prompt[words], removed["logits"][:, :length][words]) < 1e-4
    assert relative_error(logits, removed["logits"][:, length - 1 : -1]) < 1e-4
    if "qwen" not in name:  # a hole in a mask is no hole for a recurrent layer
        holes = testing.holes_oracle(model, PLAN, inputs, new, suppress_tokens=SPECIAL)
        assert relative_error(logits, holes) < 1e-4
    assert torch.equal(static, out.sequences)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[words], prompt[words]) > 1e-3


def test_padding_behind_a_sample_would_be_seen(monkeypatch):
    """Recurrent layers run over what stands behind a sample: its prompt stays right, and its answer does not."""
    from saint.language import shortening

    model = MODELS["qwen3.5"]()
    inputs = batch(model)
    length = inputs["input_ids"].shape[1]

    def of(keep, counts=None):
        counts = keep.sum(1).tolist()
        index = torch.sort(keep.view(torch.uint8), dim=1, descending=True, stable=True).indices[:, : max(counts)]
        return shortening.Short(keep, index, torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1))

    monkeypatch.setattr(shortening.Short, "of", staticmethod(of))
    monkeypatch.setattr(shortening.Short, "slots", lambda self: (self.keep.cumsum(1) - 1).clamp_min(0))
    with saint.pruned(model, PLAN), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
                             suppress_tokens=SPECIAL)  # fmt: skip
    new, logits = out.sequences[:, length:], torch.stack(out.logits, 1)
    removed, _ = testing.removal_oracle(model, PLAN, answered(model, inputs, new))
    wrong = relative_error(logits, removed["logits"][:, length - 1 : -1])
    assert wrong > 1e-2
