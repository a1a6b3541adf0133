"""Quantised weights: a pruned model is held against the masked oracle of the same quantised model, on every stage.

Weights alone are quantised here: where activations are, too, a result depends on how all of a tensor is rounded, and so on batch
mates also without a plan.
"""

import pytest
import torch
from torch import nn

import saint
from saint import testing
from saint.testing import contracts
from saint.testing import vlm as vlm_contracts
from support.families import FAMILIES, maker
from support.models import build, restage
from support.plans import HYBRID


class PackedLinear(nn.Module):
    """Whole numbers as the parameter, as bitsandbytes keeps them: a layer of such has parameters of two dtypes."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def packed(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


def int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def int4(model):
    torchao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity").PerAxis(0)
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


QUANTIZERS = [int8, int4, packed]
by_name = pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda quantize: quantize.__name__)


@by_name
@pytest.mark.parametrize("check", ["identity", "undo", "oracle", "batch", "on"])
@pytest.mark.parametrize("name", ["timm/vit-augreg", "transformers/vit", "transformers/clip", "open_clip/vit"])
def test_an_encoder(name, check, quantize):
    model = build(name)
    inputs = testing.example_inputs(model)
    plan = testing.example_plan(model, inputs)
    before = testing.run(model, inputs)
    quantize(model)
    assert not torch.equal(*(next(iter(out.values())) for out in (testing.run(model, inputs), before)))
    getattr(contracts, f"check_{check}")(model, plan, inputs)


@by_name
def test_merged_tokens_are_weighed(quantize):
    model = build("transformers/vit")
    inputs = testing.example_inputs(model)
    plan = restage(testing.example_plan(model, inputs), method=saint.methods.ToMe(r=8))
    quantize(model)
    contracts.check_oracle(model, plan, inputs)


@by_name
@pytest.mark.parametrize("check", ["oracle", "generation", "batch"])
@pytest.mark.parametrize("name", ["llava-llama", "qwen2.5-vl"])
def test_every_stage_of_a_vision_language_model(name, check, quantize):
    model = FAMILIES[name].build()
    quantize(model)
    make = maker(FAMILIES[name], model)
    testing.run(model, make([0]))  # transformers installs its own output hooks at the first forward
    before = contracts.snapshot(model)
    getattr(vlm_contracts, f"check_{check}")(model, HYBRID, make)
    assert contracts.snapshot(model) == before
