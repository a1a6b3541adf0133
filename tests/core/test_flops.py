"""FLOPs against counts by hand, on whatever kernels the installed torch picks, and what is said where some are missing."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saint
from saint import flops
from saint.flops import count_flops, left_out
from saint.lab.bench.cost import cost
from saint.plans import Plan
from saint.testing import check_on, example_inputs, example_plan
from support.command_line import TINY
from support.models import build

MODES = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}
B, H, Q, K, D = 2, 4, 8, 16, 32


@pytest.fixture(params=MODES)
def mode(request):
    with MODES[request.param]():
        yield request.param


# -- attention --------------------------------------------------------------------------------------------------------

CASES = {  # key heads, queries, value dim, further arguments
    "plain": (H, Q, D, {}),
    "bool mask": (H, Q, D, {"attn_mask": torch.ones(B, 1, Q, K, dtype=torch.bool).tril(3)}),
    "float mask": (H, Q, D, {"attn_mask": torch.zeros(Q, K)}),
    "causal": (H, K, D, {"is_causal": True}),
    "shared heads": (2, Q, D, {"enable_gqa": True}),
    "one shared head, mask": (1, Q, D, {"enable_gqa": True, "attn_mask": torch.ones(Q, K, dtype=torch.bool)}),
    "wide values": (H, Q, 48, {}),
    "wide values, mask": (H, Q, 48, {"attn_mask": torch.zeros(Q, K)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, dtype, mode):
    heads, queries, width, further = CASES[case]
    further = {n: v.to(dtype) if n == "attn_mask" and v.is_floating_point() else v for n, v in further.items()}
    query = torch.randn(B, H, queries, D, dtype=dtype, requires_grad=mode == "grad")
    key, value = torch.randn(B, heads, K, D, dtype=dtype), torch.randn(B, heads, K, width, dtype=dtype)

    _, counted = count_flops(lambda: F.scaled_dot_product_attention(query, key, value, **further))

    assert counted.total == 2 * B * H * queries * K * (D + width)  # causal or masked: no discount
    assert counted.uncounted == []


@pytest.mark.parametrize("operator", [name for names in flops._FORMULAS.values() for name in names if "scaled" in name])
def test_every_attention_kernel_has_the_same_formula(operator):
    if (packet := getattr(torch.ops.aten, operator, None)) is None:
        pytest.skip(f"this torch has no aten.{operator}")
    assert flops._mapping()[packet]((B, H, Q, D), (B, 2, K, D), (B, 2, K, 48)) == 2 * B * H * Q * K * (D + 48)


def test_no_attention_kernel_of_this_torch_is_without_formula():
    known = {*torch.utils.flop_counter.flop_registry, *flops._mapping()}
    names = {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}
    # the composite one is made of products; nothing here runs a backward
    kernels = {
        n for n in names if re.match("_scaled_dot_product.*attention", n) and not n.endswith(("backward", "_math"))
    }
    assert len(kernels) >= 5
    assert not {name for name in kernels if getattr(torch.ops.aten, name) not in known}


# -- other products ---------------------------------------------------------------------------------------------------


def test_products_with_a_vector(mode):
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert count_flops(lambda: matrix @ vector)[1].total == 2 * 5 * 7
    assert count_flops(lambda: vector @ vector)[1].total == 2 * 7
    assert count_flops(lambda: F.linear(vector, matrix))[1].total == 2 * 5 * 7


def test_integer_product():
    left, right = (torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((32, 16), (16, 24)))
    assert count_flops(lambda: torch._int_mm(left, right))[1].total == 2 * 32 * 16 * 24


def test_products_with_packed_weights():
    x, eight = torch.randn(16, 64, dtype=torch.bfloat16), torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    four = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (32, 64), dtype=torch.int32), 1)
    scales, zeros = torch.ones(32, dtype=torch.bfloat16), torch.zeros(2, 32, 2, dtype=torch.bfloat16)
    for product in (
        lambda: torch._weight_int8pack_mm(x, eight, scales),
        lambda: torch._weight_int4pack_mm_for_cpu(x, four, 32, zeros),
    ):
        assert count_flops(product)[1].total == 2 * 16 * 64 * 32


def mha_by_hand(queries: int, keys: int, width: int) -> int:
    """One sample: q, k, v, output projection; QK^T and AV."""
    return 2 * width * width * (2 * queries + 2 * keys) + 2 * 2 * queries * keys * width


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_fused_or_not(weights, mode):
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 8, 32)

    _, counted = count_flops(lambda: attention(x, x, x, need_weights=weights))

    fused = "aten._native_multi_head_attention" in counted.by_operator
    assert fused == (mode != "grad")  # else this test shows nothing about it
    assert counted.total == 2 * mha_by_hand(8, 8, 32)
    assert counted.uncounted == []


def test_encoder_layer_fused_or_not(mode):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()

    _, counted = count_flops(lambda: layer(torch.randn(2, 8, 32)))

    assert ("aten._transformer_encoder_layer_fwd" in counted.by_operator) == (mode != "grad")
    assert counted.total == 2 * (mha_by_hand(8, 8, 32) + 2 * 2 * 8 * 32 * 64)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layer_on_samples_of_two_lengths():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    ragged = torch.nested.nested_tensor([torch.randn(8, 32), torch.randn(5, 32)])
    with torch.no_grad():
        _, counted = count_flops(lambda: layer(ragged))
    assert counted.total == sum(mha_by_hand(n, n, 32) + 2 * 2 * n * 32 * 64 for n in (8, 5))


# -- models -----------------------------------------------------------------------------------------------------------


def blocks_by_hand(tokens: int, width: int, hidden: int, depth: int) -> int:
    """One sample through pre-norm blocks: projections, both products of attention, MLP."""
    return depth * (mha_by_hand(tokens, tokens, width) + 2 * 2 * tokens * width * hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block(dtype, mode):
    from timm.models.vision_transformer import Block

    block = Block(48, 3, qkv_bias=True).eval().to(dtype)
    _, counted = count_flops(lambda: block(torch.randn(2, 37, 48, dtype=dtype)))
    assert counted.total == 2 * blocks_by_hand(37, 48, 192, 1)
    assert counted.by_module["Block.attn"].keys() == counted.by_operator.keys()
    assert sum(counted.by_module["Block.attn"].values()) == 2 * mha_by_hand(37, 37, 48)
    assert sum(counted.by_module["Block.mlp"].values()) == 2 * 2 * 2 * 37 * 48 * 192
    assert counted.uncounted == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vit(dtype, mode):
    vit = build("timm/vit-augreg").to(dtype)  # 96 px, patch 16: 36 + 1 tokens, width 48, 4 blocks, 7 classes
    _, counted = count_flops(lambda: vit(torch.randn(2, 3, 96, 96, dtype=dtype)))
    assert counted.total == 2 * (2 * 36 * 3 * 16 * 16 * 48 + blocks_by_hand(37, 48, 192, 4) + 2 * 48 * 7)
    assert counted.uncounted == []


def test_attention_pool_with_a_parameter_as_query(mode):
    """Torch's own tracker of modules fails on it without gradients."""
    vit = build("timm/siglip")  # 36 tokens, no class token; latent of one token
    inputs = torch.randn(2, 3, 96, 96)

    _, counted = count_flops(lambda: vit(inputs))

    pool = mha_by_hand(1, 36, 48) + 2 * 2 * 48 * 192
    patches = 2 * 36 * 3 * 16 * 16 * 48
    classes = 2 * 48 * vit.num_classes
    assert counted.total == 2 * (patches + blocks_by_hand(36, 48, 192, 4) + pool + classes)
    assert cost(lambda: vit(inputs), torch.device("cpu")).flops == counted.total


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["causal", "mask"])
def test_prefill_of_a_llama_with_shared_heads(kind, padded, mode):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
        attn_implementation=kind,
    )  # fmt: skip
    model, n = LlamaForCausalLM(config).eval(), 20
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, :3] = 0 if padded else 1

    _, counted = count_flops(lambda: model(input_ids=torch.randint(0, 99, (2, n)), attention_mask=mask))

    layer = 2 * n * 48 * (48 + 24 + 24 + 48) + 2 * 2 * n * n * 48 + 3 * 2 * n * 48 * 96
    total = 2 * (3 * layer + 2 * n * 48 * 99)
    angles = counted.by_module.get("LlamaForCausalLM.model.rotary_emb", {})  # a product of matrices in some releases
    assert counted.total - sum(angles.values()) == total
    assert counted.uncounted == []


# -- what has no formula ----------------------------------------------------------------------------------------------


def test_an_operator_without_formula_is_named():
    _, counted = count_flops(lambda: torch.cdist(torch.randn(4, 3), torch.randn(4, 3)) @ torch.randn(4, 2))
    assert counted.uncounted == ["aten._cdist_forward"]
    assert counted.total == 2 * 4 * 4 * 2


def test_our_formula_taken_away_is_named(monkeypatch):
    monkeypatch.setattr(flops, "_FORMULAS", {})
    _, counted = count_flops(lambda: torch.randn(5, 7) @ torch.randn(7))
    assert (counted.total, counted.uncounted) == (0, ["aten.mv"])


def test_a_custom_kernel_is_named():
    with torch.library._scoped_library("saint_tests", "FRAGMENT") as library:
        library.define("flash_attn_fwd(Tensor q) -> Tensor")
        library.impl("flash_attn_fwd", torch.neg, "CPU")
        _, counted = count_flops(lambda: torch.ops.saint_tests.flash_attn_fwd(torch.randn(2)))
    assert counted.uncounted == ["saint_tests.flash_attn_fwd"]


def test_cheap_operators_are_not_named():
    x = torch.randn(1, 3, 8, 8)

    def cheap() -> None:
        F.gelu(F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).softmax(-1)).cumsum(-1)
        F.layer_norm(F.normalize(x), (8,)).to(torch.bfloat16)

    assert count_flops(cheap)[1].uncounted == []


def test_left_out():
    assert left_out([], []) == ""
    assert left_out(["aten.b", "aten.a"], ["aten.a"]) == " (without aten.a, aten.b: no FLOP formula)"


@pytest.fixture
def distances():
    """Every layer norm of every model also computes distances, an operator without formula."""

    def hook(module, args, output):
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
            torch.cdist(output[..., :2, :].float(), output[..., :2, :].float())

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


MISSING = "(without aten._cdist_forward: no FLOP formula)"


def flat(text: str) -> str:
    """Printed text without the line breaks of a narrow console."""
    return " ".join(text.split())


BENCH = ("bench", "timm:test_vit", *TINY[1:], "--batch", 2, "--repeats", 1, "--warmup", 0)


TOLD = "The FLOPs leave out aten._cdist_forward"


def test_bench_of_an_encoder_says_it(run, folder, distances):
    code, said, err = run(*BENCH, "--images", folder)
    assert code == 0, err
    assert TOLD in flat(said)


def test_bench_of_generation_says_it(run, spec, distances):
    code, said, err = run("bench", spec, "--repeats", 1, "--warmup", 0, "--new-tokens", 1)
    assert code == 0, err
    assert TOLD in flat(said)


def test_demo_says_it(run, folder, tmp_path, distances):
    code, said, err = run("demo", *TINY, "--images", folder, "--output", tmp_path / "out", "--repeats", 1)
    assert code == 0, err
    assert TOLD in flat(said)


def test_check_says_it(distances):
    vit = build("timm/vit-augreg")
    inputs = example_inputs(vit)
    assert f"of the blocks' FLOPs {MISSING}" in check_on(vit, example_plan(vit, inputs), inputs)


def test_nothing_is_said_when_all_was_counted(run, folder, tmp_path):
    assert "without" not in run(*BENCH, "--images", folder)[1]
    assert "without" not in run("demo", *TINY, "--images", folder, "--output", tmp_path / "out", "--repeats", 1)[1]
    vit = build("timm/vit-augreg")
    inputs = example_inputs(vit)
    assert "without" not in check_on(vit, Plan(vision=saint.Saint(keep=0.5)), inputs)
