"""What a quarter of the visual tokens takes, of models that people have, at their real shapes, without weights: docs/models.md.

Shapes are published ones, those of ``ready``, or what transformers gives a type by default. FLOPs are counted as
``saint.plan_for`` counts them: products of matrices, the language model without its head.
"""

from collections.abc import Callable, Iterator
from typing import Any

import ready
import torch
import transformers as hf
from torch import nn

import saint
from saint.errors import UnsupportedModelError
from saint.lab.report.markdown import table
from saint.planning import work_of
from saint.upstream.names import ATTENTION, LAYERS
from saint.vlm.locate import locate

KEEP = 0.25
BEHIND = saint.Plan(connector=saint.SaintFullGraph(keep=KEEP))
IN_FRONT = saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=KEEP), placement="input"))


def _default(config: str, model: str) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)())


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: ready.MODELS[name]
        for name in ("LLaVA-1.5 7B", "Qwen2.5-VL 7B", "Qwen3-VL 8B", "InternVL3 8B", "Gemma 3 4B")
    },
    "Qwen3.5 9B": _default("Qwen3_5Config", "Qwen3_5ForConditionalGeneration"),
    "Qwen3.5 35B-A3B": _default("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    "GLM-4.6V 10B": _default("Glm46VConfig", "Glm46VForConditionalGeneration"),
    "Mistral 3 24B": _default("Mistral3Config", "Mistral3ForConditionalGeneration"),
    "Kimi K2.5": _default("Kimi_K25Config", "Kimi_K25ForConditionalGeneration"),
}


def shapes_table() -> str:
    """A row per model."""
    head = ["model", "visual tokens of a picture", "tower, TFLOPs", "prefill, TFLOPs", "KV cache, MB"]
    return table(head, list(_rows()))


def _rows() -> Iterator[list[str]]:
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build().eval()
        work = work_of(model)
        parts, shape = work.parts(BEHIND), work.shape
        left, whole = parts["language"]
        _, vlm, spec = locate(model, "language")
        each = _bytes_of_a_token(vlm.get_submodule(spec.decoder))
        kept = shape.text + round(KEEP * shape.visual)
        yield [
            name,
            f"{shape.visual} -> {round(KEEP * shape.visual)}",
            _tower(work),
            f"{whole / 1e12:.2f} -> {left / 1e12:.2f}",
            f"{each * (shape.text + shape.visual) / 1e6:.0f} -> {each * kept / 1e6:.0f}",
        ]


def _tower(work: Any) -> str:
    """Of the tower, where a quarter of the patches enters it."""
    if work.tower is None:
        return ""
    try:
        left, whole = work.parts(IN_FRONT)["tower"]
    except UnsupportedModelError:
        return ""
    return f"{whole / 1e12:.2f} -> {left / 1e12:.2f}"


def _bytes_of_a_token(decoder: nn.Module) -> int:
    """Of the keys and values that all layers keep of a token, in bfloat16."""
    total = 0
    for layer in LAYERS.get(decoder):
        attention = ATTENTION.get(layer)
        if attention is None:  # a recurrent layer
            continue
        if hasattr(attention, "kv_b_proj"):  # multi-head latent attention: keys of all heads are kept, expanded
            total += attention.kv_b_proj.out_features + attention.num_heads * attention.qk_rope_head_dim
        else:
            total += attention.k_proj.out_features + attention.v_proj.out_features
    return 2 * total
