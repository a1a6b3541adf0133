"""The operators of the namespace ``saint``: their plain form, what stands for them in a graph, and their kernels, interpreted."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import saint
from saint import Plan, Stage, flops, graph, operators, testing
from saint.tokens import Selection, TokenMap
from support.models import build


def keys(batch=2, count=21, dim=8, dtype=torch.float32):
    return (torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(count)) + 0.5).to(dtype)


def padding(batch, count):
    return torch.arange(count) < torch.tensor([max(1, count - 5 * b) for b in range(batch)]).unsqueeze(1)


def chosen(score, drop, valid):
    """What leaves by a stable order, as the rest of the library selects."""
    batch, count = score.shape[0], score.shape[1] * 2 - 1
    current = TokenMap.full(batch, count, score.device, valid)
    return Selection.from_order(graph.descending(score), drop, current, stride=2)


CHOICES = [((3, 3), None), ((0, 5), None), ((2, 4), padding(2, 21)), ((4, 4), padding(2, 21))]


def score(valid):
    values = torch.tensor([3.0, 1, 3, 2, 0, 3, -1, 2, 2, 5, 0])  # with ties
    values = torch.stack([values, values.flip(0)])
    return values if valid is None else values.masked_fill(~valid[:, 0::2], -torch.inf)


# -- operators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [None, padding(2, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vote_is_a_proper_operator(dtype, valid):
    given = keys(dtype=dtype)
    torch.library.opcheck(torch.ops.saint.vote.default, (given, valid, 0.4))
    degree, excess, mean = torch.ops.saint.vote(given, valid, 0.4)
    edges = graph.connect(given, 0.4, valid=valid)
    assert torch.equal(degree, edges.degree)
    assert torch.equal(torch.stack(edges.sums()), torch.stack([excess, mean]))


@pytest.mark.parametrize(("drop", "valid"), CHOICES)
def test_the_choice_is_a_proper_operator(drop, valid):
    want = chosen(score(valid), drop, valid)
    given = (score(valid), valid, 21, drop, want.lengths)
    torch.library.opcheck(torch.ops.saint.survivors.default, given)
    assert torch.equal(torch.ops.saint.survivors(*given), want.slots)


class Both(torch.nn.Module):
    def forward(self, x):
        degree, excess, mean = torch.ops.saint.vote(x, None, 0.4)
        return torch.ops.saint.survivors(degree + excess + mean, None, x.shape[1], [4, 4], [17, 17])


def test_an_exported_program_holds_them():
    program = torch.export.export(Both(), (keys(),), strict=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"saint.vote.default", "saint.survivors.default"} <= names
    assert torch.equal(program.module()(keys()), Both()(keys()))


@pytest.fixture
def as_kernels(monkeypatch):
    """The way that a forward takes on CUDA; the operators are in their plain form."""
    monkeypatch.setattr(operators, "fused", lambda x, width=0: not torch.compiler.is_exporting())


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [str(function)] if function.namespace == "saint" else []
        return function(*args, **(kwargs or {}))


METHODS = {
    "fixed": saint.Saint(keep=0.6),
    "centred": saint.Saint(keep=0.6, center=True),
    "votes": saint.Saint(threshold=0.3, neighbors=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_by_the_operators_is_the_forward_without(method, monkeypatch):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model, 4)
    with saint.pruned(model, Plan(vision=Stage(METHODS[method], layers=[0, 1]))):
        with Seen() as seen:
            want = testing.run(model, inputs)
        assert not seen.names
        monkeypatch.setattr(operators, "fused", lambda x, width=0: True)
        with Seen() as seen:
            got = testing.run(model, inputs)
        assert seen.names == ["saint.vote.default", "saint.survivors.default"] * 2
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_by_the_operators_without_a_break(as_kernels):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model, 2)
    with saint.pruned(model, Plan(vision=Stage(METHODS["fixed"], layers=[0, 1]))):
        want = testing.run(model, inputs)
        torch._dynamo.reset()
        got = testing.run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-4) for name in want)


def test_their_products_are_counted():
    given = keys()
    plain = flops.count_flops(lambda: graph.connect(given, 0.4))[1].total
    counted = flops.count_flops(lambda: torch.ops.saint.vote(given, None, 0.4))[1]
    assert (counted.total, list(counted.uncounted)) == (plain, [])


@pytest.mark.parametrize(("given", "on"), [("0", False), ("1", True)])
def test_the_switch(given, on):
    """A machine without CUDA's torch or Triton has them off whatever the switch says."""
    code = "from saint import operators; print(operators.KERNELS)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SAINT_KERNELS": given},
        capture_output=True,
        text=True,
        check=True,
    )
    able = torch.version.cuda is not None and find_spec("triton") is not None
    assert run.stdout.strip() == str(on and able)


def test_a_cpu_never_takes_kernels(monkeypatch):
    monkeypatch.setattr(operators, "KERNELS", True)
    assert not operators.fused(keys(), 8)


# -- kernels, interpreted -----------------------------------------------------------------------------------------------

VOTES = """
import sys, torch
from saint import graph, kernels, operators
batch, dim, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
for count in (1, 2, 7, 64, 197, 577):
    for ragged in (False, True):
        keys = (torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(count)) + 0.5).to(dtype)
        keys[:, count // 2] = 0  # no direction
        valid = None
        if ragged:
            valid = torch.arange(count) < torch.tensor([max(1, count - 60 * b) for b in range(batch)]).unsqueeze(1)
        want = torch.ops.saint.vote(keys, valid, 0.4)
        got = kernels.vote(keys, valid, graph.just_below(0.4))
        real = torch.ones_like(want[0], dtype=torch.bool) if valid is None else valid[:, 0::2]
        where = (count, ragged)
        assert all(one.dtype == torch.float32 and one.shape == other.shape for one, other in zip(got, want)), where
        assert torch.equal(got[0][real], want[0][real]), where
        assert torch.allclose(got[1][real], want[1][real], rtol=1e-5, atol=2e-5), where
        assert torch.allclose(got[2][real], want[2][real], rtol=1e-5, atol=1e-6), where
assert kernels.vote(torch.empty(0, 8, dim, dtype=dtype), None, 0.4)[0].shape == (0, 4)
turned = torch.randn(batch, dim, 40).to(dtype).mT  # keys that do not lie row by row
assert torch.equal(kernels.vote(turned, None, 0.4)[0], torch.ops.saint.vote(turned, None, 0.4)[0])
"""
EDGE = """
import torch
from saint import graph, kernels, operators
for threshold in (0.75, 0.7, 0.5, 0.1, -0.3):
    exact = float(torch.tensor(threshold))
    for cosine in (exact, float(torch.nextafter(torch.tensor(threshold), torch.tensor(-2.0)))):
        keys = torch.tensor([[[1.0, 0.0], [cosine, (1 - cosine * cosine) ** 0.5]]])
        similarity = float(graph.metric(keys)[0, 1, 0])
        assert kernels.vote(keys, None, graph.just_below(threshold))[0].item() == int(similarity >= exact), (threshold, cosine)
"""
SURVIVORS = """
import torch
from saint import graph, kernels, operators
generator = torch.Generator().manual_seed(0)
for count in (1, 2, 7, 64, 129, 1100):
    for case in range(4):
        sources = (count + 1) // 2
        score = torch.randint(0, 1 + count // 4, (3, sources), generator=generator).float()  # many ties
        lengths = torch.randint(1, count + 1, (3,), generator=generator) if case % 2 else torch.full((3,), count)
        valid = torch.arange(count) < lengths.unsqueeze(1) if case % 2 else None
        most = ((lengths + 1) // 2).tolist()
        if case < 2:
            drop = [min(most) // 2] * 3
        else:
            drop = [int(torch.randint(0, n + 1, (1,), generator=generator)) for n in most]
        if valid is not None:
            score = score.masked_fill(~valid[:, 0::2], -torch.inf)
        stay = [n - r for n, r in zip(lengths.tolist(), drop)]
        want = torch.ops.saint.survivors(score, valid, count, drop, stay)
        got = kernels.survivors(score, valid, count, drop, stay)
        assert torch.equal(got[:, : max(stay)], want), (count, case, drop)
"""


def interpret(code, *arguments):
    """Run code in a process in which Triton interprets its kernels."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: it comes with the CUDA packages of torch")
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("batch", "dim", "dtype"),
    [(1, 8, "float32"), (2, 64, "float16"), (2, 72, "float32"), (3, 128, "bfloat16"), (1, 200, "float32")],
)
def test_the_kernel_of_the_vote(batch, dim, dtype):
    interpret(VOTES, str(batch), str(dim), dtype)


def test_in_the_kernel_equal_to_the_threshold_is_an_edge():
    interpret(EDGE)


def test_the_kernels_of_the_choice():
    interpret(SURVIVORS)


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saint import kernels
number, block = dict(count="i32"), dict(SIDE="constexpr")
cases = [
    (
        kernels._vote,
        dict(keys="*fp32", valid="*u8", degree="*fp32", excess="*fp32", mean="*fp32", dim="i32", floor="fp32", DIM="constexpr"),
        dict(DIM=64, SIDE=64),
    ),
    (kernels._stays, dict(score="*fp32", valid="*u8", drop="*i32", stays="*u8"), dict(SIDE=64)),
    (kernels._list, dict(stays="*u8", slots="*i64", most="i32"), dict(SIDE=1024)),
]
for kernel, given, constants in cases:
    source = ASTSource(fn=kernel, signature={**given, **number, **block}, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_stages=1))
    assert made.metadata.shared <= 48 * 2**10, (kernel, made.metadata.shared)
    assert "tf32" not in made.asm["ptx"] and "mma" not in made.asm["ptx"], kernel  # products of IEEE float32
    if kernel is kernels._vote:
        assert all(word in made.asm["ptx"] for word in ("fma.rn.f32", "sqrt.rn.f32", "div.rn.f32"))
"""


def test_the_kernels_compile_for_a_gpu_into_ieee_arithmetic(tmp_path):
    """Without a GPU: to machine code, which is not run."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: it comes with the CUDA packages of torch")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    code = tmp_path / "compiled.py"
    code.write_text(COMPILED)
    run = subprocess.run([sys.executable, code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
