"""Tiny random models whose decoders are no plain stack of attention: recurrent layers, shared keys, side inputs, layers without
rotary tables; and what a language stage on them is held against.
"""

from contextlib import ExitStack

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saint.upstream.names import CACHING
from saint.upstream.specs import FamilySpec
from saint.upstream.tiny import END, START, make, text_config
from saint.upstream.transformers import qualified
from support.families import IMAGE, VIDEO, cache_of, cached

SPECIAL = list(range(100, 108))  # a random model would write image placeholders
SPECS = [
    FamilySpec("Qwen3.5", qualified("qwen3_5", "Qwen3_5Model"), tower="visual", connector="visual.merger"),
    FamilySpec("Qwen3.5 MoE", qualified("qwen3_5_moe", "Qwen3_5MoeModel"), tower="visual", connector="visual.merger"),
    FamilySpec("Gemma 4", qualified("gemma4", "Gemma4Model"), tower="vision_tower", connector="embed_vision"),
    FamilySpec("Granite 4 Vision", qualified("granite4_vision", "Granite4VisionModel"), connector="spatial_projectors"),
    FamilySpec("Qwen3-VL MoE", qualified("qwen3_vl_moe", "Qwen3VLMoeModel"), tower="visual", connector="visual.merger"),
]


# -- vision-language models ------------------------------------------------------------------------------------------------


def qwen(name, **more):
    text = text_config(
        num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "partial_rotary_factor": 1.0,
                         "mrope_interleaved": True},
    )  # fmt: skip
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48,
             "num_position_embeddings": 64}  # fmt: skip
    config = getattr(hf, f"{name}Config")(
        text_config={**text, **more}, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
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


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MODELS = {
    "qwen3.5": lambda: qwen("Qwen3_5"),
    "qwen3.5-moe": lambda: qwen("Qwen3_5Moe", **MOE),
    "gemma4": gemma,
    "gemma4-shared-keys": lambda: gemma(num_kv_shared_layers=3, hidden_size_per_layer_input=8),
    "gemma4-causal": lambda: gemma(use_bidirectional_attention=None),
}


def batch(model, which=(0, 1)):
    """Two prompts with features of one image each, computed elsewhere; left padding. ``which``: some of them alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = (24, 16)
    rows = [
        [*torch.randint(2, 99, (n,), generator=generator).tolist(), START, *[IMAGE] * k, END,
         *torch.randint(2, 99, (tail,), generator=generator).tolist()]
        for n, k, tail in ((4, sizes[0], 5), (3, sizes[1], 2))
    ]  # fmt: skip
    features = [torch.randn(k, 48, generator=generator) for k in sizes]
    grids = torch.tensor([[1, 8, 12], [1, 8, 8]])
    ids, mask = padded([rows[one] for one in which])
    inputs = {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features[one] for one in which])},
    }  # fmt: skip
    if "qwen" in model.config.model_type:
        inputs["image_grid_thw"] = grids[list(which)]
    return inputs


# -- language models without images ----------------------------------------------------------------------------------------


def text(model, config, **more):
    return make(getattr(hf, model), getattr(hf, config)(**{**text_config(), **more}))


TEXTS = {
    "lfm2": ("lfm2", "Lfm2Model", lambda: text(
        "Lfm2ForCausalLM", "Lfm2Config", num_hidden_layers=6, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "conv", "full_attention", "conv"])),
    "lfm3": ("lfm3", "Lfm3Model", lambda: text(
        "Lfm3ForCausalLM", "Lfm3Config", num_hidden_layers=6, sliding_window=16, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "sliding_attention", "conv", "full_attention"])),
    "nemotron-h": ("nemotron_h", "NemotronHModel", lambda: text(
        "NemotronHForCausalLM", "NemotronHConfig", layers_block_type=["mamba", "attention", "mlp", "mamba", "attention", "mamba"],
        mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=8, n_groups=2, chunk_size=16)),
    "llama4": ("llama4", "Llama4TextModel", lambda: text(
        "Llama4ForCausalLM", "Llama4TextConfig", num_hidden_layers=4, intermediate_size_mlp=64, num_local_experts=4,
        attention_chunk_size=24)),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3Model", lambda: text(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        num_key_value_heads=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1)),
}  # fmt: skip


def padded(rows):
    """Token ids and mask of prompts, padded on the left, int64 [B, L]."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def prompts(which=(0, 1)):
    """Two prompts of text, in which parts come again; left padding. ``which``: some of them alone."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 99, (n,), generator=generator).tolist() for n in (31, 22)]
    ids, mask = padded([rows[one] for one in which])
    return {"input_ids": ids, "attention_mask": mask}


def inner(inputs):
    """Candidates of a prompt without images, bool [B, L]."""
    real = inputs["attention_mask"].bool()
    return real & (real.cumsum(1) > 1) & (real.flip(1).cumsum(1).flip(1) > 1)


# -- what must come out ------------------------------------------------------------------------------------------------------


def without(
    model: nn.Module, layers: nn.ModuleList, inputs: dict, drops: dict[int, Tensor], steps: Tensor | None = None
) -> Tensor:
    """Logits of one prompt without padding, from layers that lose rows: [1, K, V].

    Args:
        model: not patched.
        layers: its decoder layers.
        inputs: of the model.
        drops: by layer, places of the whole sequence that are left behind it, ascending.
        steps: token ids that are fed one by one behind the sequence, on the cache that it filled; their logits come behind.
    """
    here: list[Tensor] = []
    length = inputs["input_ids"].shape[1]

    def cut(value, rows):
        if isinstance(value, tuple):
            return tuple(cut(one, rows) for one in value)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-2] == length:  # tables
            return value[..., rows, :]
        return value

    def enter(_module, args, kwargs):
        rows = here[0]
        if len(rows) == length:
            return None
        own, mask = {name: cut(value, rows) for name, value in kwargs.items()}, kwargs["attention_mask"]
        if mask is not None:  # of a window; recurrent layers get none for a prompt without padding
            own["attention_mask"] = mask[:, :, rows][..., rows]
        if isinstance(side := kwargs.get("per_layer_input"), Tensor):
            own["per_layer_input"] = side[:, rows]
        return args, own

    def leave(layer):
        def hook(_module, _args, output):
            left = drops.get(layer)
            if left is None:
                return None
            kept = torch.isin(here[0], left)
            here[0] = left
            return output[:, kept]

        return hook

    with ExitStack() as stack, torch.no_grad():
        here.append(torch.arange(length))
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave(index)).remove)
        if steps is None:
            return model(**{**inputs, str(CACHING): False}).logits
        out = model(**{**inputs, str(CACHING): True})
    logits = [out.logits]
    with torch.no_grad():
        for token in steps:
            logits.append(model(input_ids=token.view(1, 1), **cached(model, cache_of(out))).logits)
    return torch.cat(logits, 1)


def deep(name):
    """A model of Qwen3.5 with layers behind one that shows keys."""
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 2
    more = MOE if name.endswith("moe") else {}
    return qwen("Qwen3_5Moe" if more else "Qwen3_5", num_hidden_layers=8, layer_types=kinds, **more)


# -- features that are added between layers ----------------------------------------------------------------------------------


def granite():
    """Features in front of layers 0, 2 and 3 of five: two of the first layers, one of them with nothing in between."""
    text = text_config(num_hidden_layers=5, residual_multiplier=0.5, embedding_multiplier=2.0)
    tower = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 24, "patch_size": 4}  # fmt: skip
    config = hf.Granite4VisionConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, downsample_rate="1/2",
        deepstack_layer_map=[(0, 0), (1, 2)], spatial_target_layers=[3, 4, 4, 4],
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32},
    )  # fmt: skip
    return make(hf.Granite4VisionForConditionalGeneration, config)


def qwen_vl_moe():
    text = text_config(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True},
    )  # fmt: skip
    tower = {"depth": 3, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48,
             "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    config = hf.Qwen3VLMoeConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return make(hf.Qwen3VLMoeForConditionalGeneration, config)


DEEPSTACK = {"granite4-vision": granite, "qwen3-vl-moe": qwen_vl_moe}


def stacked(model, which=(0, 1)):
    """:func:`batch` with features for layers, too."""
    inputs, generator = batch(model, which), torch.Generator().manual_seed(7)
    sizes = [24, 16]
    deep = [[torch.randn(sizes[one], 48, generator=generator) for one in (0, 1)] for _ in range(3)]
    deep = [[layer[one] for one in which] for layer in deep]
    output = inputs["mm_encoder_outputs"]["image"]
    if "granite" in model.config.model_type:
        output.deepstack_features = list(zip((0, 2, 3), deep, strict=True))
        del inputs["mm_token_type_ids"]
    else:
        output.deepstack_features = deep[:2]
    return inputs


def pad_behind(monkeypatch) -> None:
    """What is shortened is padded behind its tokens, where it would pass through the state of recurrent layers."""
    from saint.language import shortening

    def of(keep, counts=None):
        counts = keep.sum(1).tolist()
        index = torch.sort(keep.view(torch.uint8), dim=1, descending=True, stable=True).indices[:, : max(counts)]
        return shortening.Short(keep, index, torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1))

    monkeypatch.setattr(shortening.Short, "of", staticmethod(of))
    monkeypatch.setattr(shortening.Short, "slots", lambda self: (self.keep.cumsum(1) - 1).clamp_min(0))
