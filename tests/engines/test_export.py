"""``torch.export`` of patched encoders: fixed budgets give one graph for batches of any size."""

import pytest
import torch

import saint
from saint import Plan, Stage, methods, testing
from saint.backends import export
from support.models import build, prepared

# over the ways in which libraries spell blocks, masks and positions
MODELS = [
    "timm/vit-augreg",
    "timm/siglip",
    "timm/eva02",
    "timm/dinov3",
    "transformers/clip",
    "transformers/dinov2",
    "open_clip/vit",
]
PLANS = {
    "votes to a budget": Plan(vision=Stage(saint.Saint(keep=20), layers=[0, 1])),
    "full graph": Plan(vision=Stage(saint.SaintFullGraph(keep=0.5), layers=[1], placement="post")),
    "several stages": Plan(
        vision=[
            Stage(saint.SaintFullGraph(keep=30), placement="input"),
            Stage(saint.Saint(keep=0.7), layers=[1, 2], output="survivors"),
        ]
    ),
    "merging": Plan(vision=Stage(methods.ToMe(keep=0.6), layers=[0, 1])),
    "merging by energy": Plan(vision=Stage(methods.PiToMe(keep=0.6), layers=[0, 1])),
    "merging or dropping": Plan(vision=Stage(methods.PPT(keep=0.6), layers=[0, 1])),
    "full length": Plan(vision=Stage(methods.Grid(keep=0.5), layers=[1], output="similar")),
    "random": Plan(vision=Stage(methods.Random(keep=0.5), layers=[1])),
}


def often(names, *daily):
    """Those of ``daily`` every day, the others at night."""
    return [name if name in daily else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def exported(model, inputs):
    rows = torch.export.Dim("rows", min=1, max=64)
    shapes = {name: {0: rows} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()


def agree(model, graph, inputs):
    for size in (1, 2, 5):
        given = {name: torch.randn(size, *value.shape[1:]) for name, value in inputs.items()}
        want = testing.run(model, given)
        with torch.no_grad():
            got = dict(testing.tensors(graph(**given)))
        assert list(got) == list(want)
        for name in want:
            assert got[name].shape == want[name].shape
            assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", often(PLANS, "several stages", "merging", "merging or dropping"))
def test_batches_of_any_size(plan):
    model, _, inputs = prepared("timm/vit-augreg")
    unpruned = testing.run(model, inputs)
    with saint.pruned(model, PLANS[plan]):
        graph = exported(model, inputs)
        agree(model, graph, inputs)
    got = dict(testing.tensors(graph(**inputs)))  # the graph keeps the plan, the model does not
    assert not torch.equal(got["output"], unpruned["output"])
    assert torch.equal(testing.run(model, inputs)["output"], unpruned["output"])


@pytest.mark.parametrize("name", often(MODELS, "timm/vit-augreg", "transformers/clip", "open_clip/vit"))
def test_encoders_of_every_library(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    with saint.pruned(model, PLANS["several stages"]):
        agree(model, exported(model, inputs), inputs)


@pytest.mark.parametrize("budget", ["sample", "batch"])
def test_votes_cannot_be_exported(budget):
    model, plan, inputs = prepared("timm/vit-augreg")
    method = saint.Saint(threshold=plan.vision[0].method.threshold, budget=budget)
    with saint.pruned(model, method):
        with pytest.raises(RuntimeError, match="cannot have: give a number or a fraction"):
            exported(model, inputs)
        testing.run(model, inputs)  # and the model goes on


def test_a_forward_behind_an_export_counts_every_sample():
    model, _, inputs = prepared("timm/vit-augreg")
    with saint.pruned(model, PLANS["votes to a budget"]) as session:
        graph = exported(model, inputs)
        assert session.trace == []  # reading it must not fix the size of the batch
        agree(model, graph, inputs)
        testing.run(model, inputs)
        assert session.trace[-1].tokens_out.tolist() == [20, 20, 20]


def test_an_exported_graph_refuses_padding():
    model = prepared("transformers/dinov2")[0].dinov2
    pixels = prepared("transformers/dinov2")[2]["pixel_values"]
    inputs = {"pixel_values": pixels, "attention_mask": torch.ones(3, 37, dtype=torch.long)}
    with saint.pruned(model, PLANS["votes to a budget"]):
        graph = torch.export.export(model, (), inputs).module()
        want = testing.run(model, inputs)["last_hidden_state"]
        assert torch.allclose(graph(**inputs).last_hidden_state, want, atol=1e-5)
        inputs["attention_mask"][1, 30:] = 0
        with pytest.raises(RuntimeError, match="exported for inputs without padding"):
            graph(**inputs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "differs from the patched model's by nan"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.inf), "by inf"),
        (lambda x: x * (1 + 3e-4), "for a batch of 2"),
        (lambda x: x[:1], r"shapes \(1, 4\) and\s+\(2, 4\)"),
        (lambda x: None, "the graph has 0 outputs, the patched model 1"),
    ],
)
def test_a_graph_that_gives_something_else_is_not_kept(change, said):
    want = {"features": torch.tensor([[1.0, -5.0, 2.0, 0.5], [0.1, 0.2, 0.3, 4.0]])}
    graphs = {
        "same": lambda given: [want["features"]],
        "other": lambda given: [y for y in [change(want["features"])] if y is not None],
    }
    assert export._compared(graphs["same"], {2: {}}, {2: want}) == 0
    with pytest.raises(saint.ParityError, match=said):
        export._compared(graphs["other"], {2: {}}, {2: want})


def test_rounding_of_a_graph_is_measured_against_the_largest_output():
    want = torch.tensor([[1.0, -5.0], [0.1, 4.0]])
    found = export._compared(lambda given: [want + 2e-4], {2: {}}, {2: {"features": want}})
    assert found == pytest.approx(2e-4 / 5, rel=1e-2)
    small = torch.tensor([[0.01, -0.02]])  # counts as 1: an absolute error
    assert export._compared(lambda given: [small + 5e-5], {1: {}}, {1: {"y": small}}) == pytest.approx(5e-5, rel=1e-2)


def test_a_model_that_gives_what_is_no_number_is_not_kept():
    want = {"features": torch.tensor([[torch.nan, 1.0]])}
    with pytest.raises(saint.ParityError, match="by nan"):
        export._compared(lambda given: [want["features"]], {1: {}}, {1: want})
