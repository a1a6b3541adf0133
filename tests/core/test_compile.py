"""``torch.compile`` of patched encoders with fixed plans: one graph without a break, and the outputs of eager mode."""

import pytest
import torch

import saint
from saint import Plan, Stage, methods, testing
from support.models import build

MODELS = ("timm/vit-augreg", "transformers/clip", "transformers/dinov2")
PLANS = {
    "votes": Stage(saint.Saint(keep=0.5), layers=[0, 1]),
    "pairs": Stage(methods.Match(keep=0.5), layers=[0, 1]),
    "weighed": Stage(methods.Match(keep=0.5, fate="weigh"), layers=[0, 1]),
    "merged": Stage(methods.Match(keep=0.5, fate="merge"), layers=[0, 1]),
    "ToMe": Stage(methods.ToMe(keep=0.5), layers=[0, 1]),
    "PiToMe": Stage(methods.PiToMe(keep=0.5), layers=[0, 1]),
    "PPT": Stage(methods.PPT(keep=0.5), layers=[0, 1]),
    "random": Stage(methods.Random(keep=0.5), layers=[0, 1]),
    "full graph": Stage(saint.SaintFullGraph(keep=0.5), layers=[1]),
    "carried": Stage(methods.Match(keep=0.5), layers=[0, 1], output="carried"),
}


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **options)  # a graph break is an error


def skip_without_masks(model, plan):
    """Older releases of a library have blocks that take no mask, which a plan that weighs is told at once."""
    try:
        saint.apply(model, plan).remove()
    except saint.UnsupportedModelError as error:
        if "takes no dense attention mask" not in str(error):
            raise
        pytest.skip(str(error))


CASES = [("timm/vit-augreg", name) for name in PLANS]
CASES += [(library, name) for library in MODELS[1:] for name in ("votes", "weighed")]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_one_graph_and_the_outputs_of_eager_mode(name, plan):
    model = build(name)
    for batch in (1, 8):
        inputs = testing.example_inputs(model, batch)
        if plan == "weighed":
            skip_without_masks(model, PLANS[plan])
        with saint.pruned(model, PLANS[plan]) as session:
            want = testing.run(model, inputs)
            kept = [row.tolist() for row in session.trace[-1].kept]
            got = testing.run(compiled(model, backend="aot_eager"), inputs)
            assert [row.tolist() for row in session.trace[-1].kept] == kept  # the trace is that of the compiled forward
            assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-4) for name in want)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_plan(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    given = inputs[next(iter(inputs))]
    plan = saint.freeze(testing.example_plan(model, inputs), model, given)
    with saint.pruned(model, plan) as session:
        want = testing.run(model, inputs)
        got = testing.run(compiled(model, backend="aot_eager"), inputs)
        assert session.trace[-1].tokens_out.max() < session.trace[0].tokens_in.min()
        assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-4) for name in want)


def test_code_of_inductor():
    """What ``torch.compile`` makes unless told otherwise; needs a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        pytest.skip("no C++ compiler is installed")
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model, 2)
    with saint.pruned(model, Plan(vision=PLANS["weighed"])):
        want = testing.run(model, inputs)["output"]
        assert torch.allclose(testing.run(compiled(model), inputs)["output"], want, rtol=1e-4, atol=1e-4)
