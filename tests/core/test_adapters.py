"""Keys are those that the attention computes: with adapters and parametrizations of the weights they are made from."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import saint
from saint import Stage
from saint.errors import HookNeverFiredError
from support.models import build

STAGE = Stage(saint.Saint(keep=0.6), layers=[0, 1])
# name -> the projections that bring forth its keys, by a regular expression of PEFT
TARGETS = {
    "timm/vit-augreg": r".*\.qkv",
    "timm/beit": r".*\.qkv",
    "timm/dinov3": r".*\.qkv",
    "transformers/vit": r".*\.k_proj",
    "transformers/beit": r".*\.k_proj",
    "transformers/clip": r".*\.k_proj",
    "transformers/siglip": r".*\.k_proj",
    "transformers/dinov2": r".*\.k_proj",
}


def open_clip_tower():
    torch.manual_seed(0)
    from open_clip.transformer import VisionTransformer

    return saint.testing.examples.enliven(VisionTransformer(96, 16, 48, 4, 3, 2.0, output_dim=16).eval())


def adapted(model, **config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def kept(model, pixels):
    with torch.no_grad(), saint.pruned(model, STAGE) as session:
        out = model(pixels)
        return getattr(out, "logits", out), [tokens.tolist() for tokens in session.trace[0].kept]


def check(model, merged, plain):
    """A model scores the keys of its merged twin, which are not those of the plain one."""
    pixels = torch.randn(2, 3, 96, 96)
    (got, here), (expected, there) = kept(model, pixels), kept(merged, pixels)
    assert here == there
    if plain is not None:
        assert here != kept(plain, pixels)[1]
    if isinstance(got, torch.Tensor):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [{"target_modules": r".*\.attn"}, {"target_parameters": ["attn.in_proj_weight"]}], ids=str
)
def test_lora_on_multihead_attention_in_front_of_the_plan(config):
    plain = open_clip_tower()
    model = adapted(copy.deepcopy(plain), **({"target_modules": []} | config))
    check(model, copy.deepcopy(model).merge_and_unload(), plain)


def test_lora_on_multihead_attention_behind_the_plan():
    plain = open_clip_tower()
    pixels = torch.randn(2, 3, 96, 96)
    expected = kept(adapted(copy.deepcopy(plain), target_modules=r".*\.attn"), pixels)[1]
    session = saint.apply(plain, STAGE)
    with torch.no_grad():
        adapted(plain, target_modules=r".*\.attn")(pixels)
    assert [tokens.tolist() for tokens in session.trace[0].kept] == expected


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_on_the_projection_of_keys_in_front_of_the_plan(name, dora):
    plain = build(name)
    model = adapted(copy.deepcopy(plain), target_modules=TARGETS[name], use_dora=dora)
    acts = name != "timm/beit"
    # timm's BEiT reads the weight and never calls the projection: its own forward is without the adapter as well
    twin, other = (copy.deepcopy(model).merge_and_unload(), plain) if acts else (plain, None)
    check(model, twin, other)


class Stretched(nn.Module):
    """A parametrization under which keys differ."""

    def forward(self, weight):
        return weight * torch.linspace(-3, 3, weight.shape[0]).unsqueeze(1)


@pytest.mark.parametrize(
    ("make", "path", "weight"),
    [
        (open_clip_tower, "transformer.resblocks.{}.attn", "in_proj_weight"),
        (lambda: build("timm/beit"), "blocks.{}.attn.qkv", "weight"),
        (lambda: build("timm/vit-augreg"), "blocks.{}.attn.qkv", "weight"),
        (lambda: build("transformers/vit"), "vit.layers.{}.attention.k_proj", "weight"),
    ],
    ids=["open_clip", "beit", "timm", "transformers"],
)
def test_parametrized_weights(make, path, weight):
    plain, model, merged = make(), make(), make()
    for layer in range(4):
        parametrize.register_parametrization(model.get_submodule(path.format(layer)), weight, Stretched())
        parameter = getattr(merged.get_submodule(path.format(layer)), weight)
        parameter.data = Stretched()(parameter.data)
    check(model, merged, plain)


def test_an_adapter_of_the_keys_that_is_merged_under_a_plan_is_named():
    model = adapted(build("transformers/vit"), target_modules=TARGETS["transformers/vit"])
    pixels = torch.randn(1, 3, 96, 96)
    session = saint.apply(model, STAGE)
    inner = model.merge_and_unload()
    with torch.no_grad():
        with pytest.raises(HookNeverFiredError, match="was replaced since the plan was applied .* apply it again"):
            inner(pixels)
        session.remove()
        expected = inner(pixels).logits
        saint.apply(inner, STAGE).remove()
        assert torch.equal(inner(pixels).logits, expected)
