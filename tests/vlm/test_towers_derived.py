"""The vision stage of families that no spec was written for: what is found of their towers, and oracles over the whole model.

Models are those of transformers' configurations, shrunken; pictures go in, logits come out.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

import saint
from saint import admission, grids
from saint.gathers import is_dropped
from saint.methods import Duplicates, Flat
from saint.testing.outputs import run
from saint.testing.shrink import shrunken
from saint.testing.twins import grown, pictured
from saint.testing.vlm import check_tower, is_recurrent, sees_within
from saint.vision import derive
from saint.vision.derive import with_tower
from saint.vision.pixels import patcher
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


# -- towers whose patches are rows of a linear layer ----------------------------------------------------------------------

LINEAR = {"cosmos3_edge": "Cosmos3EdgeImageProcessor", "ernie4_5_vl_moe": "Ernie4_5_VLMoeImageProcessor"}


def copied(inputs, side):
    """Inputs of which two squares of three are copies of one of their picture's first three, and some nearly."""
    pixels, out, start = inputs["pixel_values"], inputs["pixel_values"].clone(), 0
    for grid in inputs["image_grid_thw"]:
        groups = out[start : start + int(grid.prod())].view(-1, side**2, pixels.shape[-1])
        for group in range(3, len(groups)):
            if group % 3:
                groups[group] = groups[group % 3]
            if group % 7 == 4:
                groups[group, 1, 0] += 1
        start += int(grid.prod())
    return {**inputs, "pixel_values": out}


@pytest.mark.parametrize("name", [*LINEAR, "qwen3_omni_moe_thinker"])
def test_copies_leave_a_tower_that_is_given_rows(towers, name):
    model, _, spec, inputs = towers(name)
    side = spec.merge_size(model)
    inputs = copied(inputs, side)
    whole = saint.Plan(vision=Duplicates())
    check_tower(model, whole, lambda _: inputs)
    with saint.pruned(model, whole) as session, torch.no_grad():
        model(**inputs)
        kept = [own.tolist() for own in session.trace[0].kept]
    counts = [int(grid.prod()) for grid in inputs["image_grid_thw"]]
    groups = [own.reshape(-1, side**2 * own.shape[1]) for own in inputs["pixel_values"].split(counts)]
    want = [[i for i, one in enumerate(own) if not any(torch.equal(one, other) for other in own[:i])] for own in groups]
    assert kept == want
    assert any(len(own) < count // side**2 for own, count in zip(kept, counts, strict=True))


@pytest.mark.parametrize("name", LINEAR)
def test_the_layout_of_rows_is_that_of_the_image_processor(towers, name):
    """A photograph, through the processor that ships with the model: each patch is a piece of it, square by square."""
    model, inner, spec, _ = towers(name)
    encoder = inner.get_submodule(spec.tower)
    known = patcher(encoder, spec.tower_spec, channels=True)
    patch, m = known.sides[0], spec.merge_size(model)
    processor = getattr(transformers, LINEAR[name])(do_resize=False, patch_size=patch, merge_size=m)
    (image,) = saint.demo.pictures("coffee")
    image = image.convert("RGB").resize((6 * patch, 4 * patch))
    given = processor(image, return_tensors="pt")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    picture = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    pieces = [
        picture[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        for top in range(0, 4, m)
        for left in range(0, 6, m)
        for row in range(top, top + m)
        for column in range(left, left + m)
    ]
    assert given["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.allclose(known.opened(given["pixel_values"]), torch.stack(pieces), atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_pictures_of_rows_get_smaller_each_for_itself(towers, name):
    """What comes of the layer is what comes of the smaller picture, put together and cut again patch by patch."""
    model, inner, spec, inputs = towers(name)
    encoder = inner.get_submodule(spec.tower)
    known, m, seen = patcher(encoder, spec.tower_spec, channels=True), spec.merge_size(model), []
    side = known.sides[0]
    with torch.no_grad(), saint.pruned(model, saint.Plan(pixels=0.5)) as session:
        hook = known.layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        model(**inputs)
        hook.remove()
        entry = session.trace[0]
        (entered, laid), start, end = seen[0], 0, 0
        for number, (frames, rows, columns) in enumerate(inputs["image_grid_thw"].tolist()):
            assert frames == 1
            down, right = (n * m for n in grids.smaller(rows // m, columns // m, 0.5))
            whole = placed(known.opened(inputs["pixel_values"][start : start + rows * columns]), rows, columns, m)
            small = torch.nn.functional.interpolate(
                whole[None], (down * side, right * side), mode="bicubic", antialias=True
            )
            shown = known.opened(entered[end : end + down * right])
            assert torch.allclose(placed(shown, down, right, m), small[0], atol=1e-5)
            under = [grids.under(n // m, k // m) for n, k in ((rows, down), (columns, right))]
            fewer = known.layer(entered[end : end + down * right]).view(-1, m**2, laid.shape[-1])
            want = torch.stack([fewer[a * (right // m) + b] for a in under[0] for b in under[1]]).flatten(0, 1)
            assert torch.equal(laid[start : start + rows * columns], want)
            assert int(entry.tokens_out[number]) == down * right // m**2
            start, end = start + rows * columns, end + down * right


def placed(patches, rows, columns, m):
    """The picture [C, H, W] of patches [rows * columns, C, P, P] that lie square by square."""
    side = patches.shape[-1]
    out, number = patches.new_zeros(patches.shape[1], rows * side, columns * side), 0
    for top in range(0, rows, m):
        for left in range(0, columns, m):
            for row in range(top, top + m):
                for column in range(left, left + m):
                    out[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = patches[number]
                    number += 1
    return out


@pytest.mark.parametrize("smaller", [saint.Plan(vision=Flat()), saint.Plan(pixels=0.5)])
def test_rows_of_an_unknown_layout_show_copies_alone(smaller, monkeypatch):
    monkeypatch.setattr(derive, "row_layouts", dict)
    model = build("ernie4_5_vl_moe", {})
    with pytest.raises(saint.UnsupportedModelError, match="by channel: .* layout or grid is not known"):
        saint.apply(model, smaller)
    assert saint.status(model) is None
    saint.apply(model, Duplicates()).remove()
