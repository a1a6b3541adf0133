"""The vision stage of families that no spec was written for: what is found of their towers, and oracles over the whole model.

Models are those of transformers' configurations, shrunken; pictures go in, logits come out.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

import saint
from saint import admission
from saint.gathers import is_dropped
from saint.testing.outputs import run
from saint.testing.shrink import shrunken
from saint.testing.twins import grown, pictured
from saint.testing.vlm import check_tower, is_recurrent, sees_within
from saint.vision.derive import with_tower
from saint.vlm.locate import find
from support.families import one_at_a_time


@dataclass(frozen=True)
class Found:
    """What must be found of a type, and what its default configuration lacks."""

    side: int | None = 2
    connector: str = ""
    hybrid: bool = (
        False  # with recurrent layers or an attention of its own, which the masked oracle cannot hide keys from
    )
    window: bool = False  # the removal oracle takes other tokens for those inside a window
    set: dict[str, Any] = field(default_factory=dict)


_DEEP = {"vision_config.deepstack_visual_indexes": [0, 2]}
TOWERS = {
    "qwen3_5": Found(hybrid=True), "qwen3_5_moe": Found(hybrid=True), "qwen3_vl_moe": Found(set=_DEEP),
    "cosmos3_omni": Found(set=_DEEP), "cosmos3_edge": Found(), "glm4v": Found(), "glm4v_moe": Found(), "glm46v": Found(),
    "glm_ocr": Found(), "glmga": Found(), "glm5_next": Found(hybrid=True), "kimi_k25": Found(), "ernie4_5_vl_moe": Found(),
    "paddleocr_vl": Found(), "exaone4_5": Found(window=True), "hyperclovax_vision_v2": Found(), "dots3_note": Found(window=True),
    "video_llama_3": Found(), "mistral3": Found(), "lighton_ocr": Found(), "mistral_large4": Found(),
    "aya_vision": Found(window=True), "cohere2_vision": Found(window=True), "deepseek_vl": Found(None),
    "janus": Found(None, set={"vision_config.projection_dim": 64}), "video_llava": Found(None), "ovis2": Found(None),
    "qianfan_ocr": Found(set={"vision_config.image_size": [56, 56]}),
    "vipllava": Found(None, set={"vision_feature_layers": -2, "vision_feature_layer": -2}),
    "llava_next_video": Found(None, "multi_modal_projector", set={"image_grid_pinpoints": [[32, 64], [64, 32]]}),
    "qwen2_5_omni_thinker": Found(set={"vision_start_token_id": 300}),
    "qwen3_omni_moe_thinker": Found(set={"vision_start_token_id": 300, **_DEEP}),
}  # fmt: skip
REFUSED = {
    "vipllava": "several layers", "lfm2_vl": "a row each", "got_ocr2": "a row each",
    "idefics2": "no squares of patches", "step3p7": "no squares of patches",
}  # fmt: skip


def build(name, changes):
    """A small model of a type, whose configuration has been changed at dotted paths."""
    cls = getattr(transformers, CLASSES[name])
    config = shrunken(cls.config_class())
    for path, value in changes.items():
        *holders, last = path.split(".")
        holder = config
        for part in holders:
            holder = getattr(holder, part)
        setattr(holder, last, value)
    return grown(cls, config)


@pytest.fixture(autouse=True, scope="module")
def _admitted():
    """These tests are the proof: applying a plan need not run it again on a twin."""
    with admission.proving():
        yield


@pytest.fixture(scope="module")
def towers():
    def make(name):
        model = build(name, TOWERS[name].set)
        _, inner, spec = find(model)
        spec = with_tower(inner, spec)
        assert spec.derived
        assert spec.no_vision is None, spec.no_vision
        return model, inner, spec, pictured(model, inner, spec)

    return one_at_a_time(make)


def plan(placement="mid", layer=1):
    return saint.Plan(vision=saint.Stage(saint.SaintFullGraph(keep=0.6), layers=[0, layer], placement=placement))


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_found(towers, name):
    _, inner, spec, _ = towers(name)
    assert spec.merge_size(inner) == TOWERS[name].side
    assert spec.connector == TOWERS[name].connector
    deep = [layer + 1 for layer in TOWERS[name].set.get("vision_config.deepstack_visual_indexes", [])]
    assert set(deep) <= set(spec.reads(inner))
    assert all(block.seam for block in spec.tower_spec.block_specs.values())


@pytest.mark.parametrize("name", TOWERS)
def test_oracles(towers, name):
    model, inner, spec, inputs = towers(name)
    base = run(model, inputs)["logits"]
    decoder = inner.get_submodule(spec.decoder)
    assert sees_within(decoder, inputs["input_ids"].shape[1]) == TOWERS[name].window
    assert is_recurrent(decoder) == TOWERS[name].hybrid
    check_tower(model, plan(), lambda _: inputs)
    assert torch.equal(run(model, inputs)["logits"], base)


@pytest.mark.parametrize("name", ["glm4v", "kimi_k25", "qwen3_vl_moe", "mistral3", "janus", "aya_vision"])
def test_gradients_reach_what_is_behind_the_tower(towers, name):
    """With gradients dropped rows hold numbers, and logits are the same."""
    model, inner, spec, inputs = towers(name)
    with saint.pruned(model, plan()):
        want = run(model, inputs)["logits"]
        model.zero_grad()
        got = model(**inputs).logits
        got.float().pow(2).mean().backward()
    assert torch.allclose(got, want, atol=1e-5)
    tower = [p.grad for n, p in inner.get_submodule(spec.tower).named_parameters() if p.grad is not None]
    assert tower
    assert all(torch.isfinite(grad).all() for grad in tower)
    model.zero_grad()


@pytest.mark.parametrize("name", ["kimi_k25", "paddleocr_vl", "mistral3"])
def test_patches_that_lie_row_by_row_go_by_squares(towers, name):
    """Which features are marked is what the trace says, picture by picture."""
    model, inner, spec, inputs = towers(name)
    assert spec.tower_spec.raster
    given = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    with saint.pruned(model, plan()) as session, torch.no_grad():
        features = inner.get_image_features(**given, return_dict=True).pooler_output
        trace = session.trace
    for own, kept in zip(features, trace[-1].kept, strict=True):
        assert (~is_dropped(own)).nonzero().flatten().tolist() == kept.tolist()
    assert len(set(trace[0].tokens_in.tolist())) == 2


def test_a_change_behind_the_tower_is_an_error(towers):
    model, inner, _, inputs = towers("glm4v")
    shift = inner.visual.downsample.register_forward_hook(lambda _module, _args, y: y.roll(1, 0))
    try:
        with (
            saint.pruned(model, plan()),
            pytest.raises((ValueError, saint.ParityError), match="joins (other )?patches"),
        ):
            run(model, inputs)
    finally:
        shift.remove()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_at_apply(name):
    model = build(name, {})
    with pytest.raises(saint.UnsupportedModelError, match=REFUSED[name]):
        saint.apply(model, plan())
    assert saint.status(model) is None
