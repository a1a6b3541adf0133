"""``saint.backends.export``: files that other runtimes run, with the outputs of the patched model."""

import dataclasses
import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from PIL import Image

import saint
from saint import Plan, Stage, methods, testing
from saint.backends import export as backend
from saint.backends.export import export
from saint.lab.cli import main
from saint.methods.base import FixedBudget
from saint.order import descending, true_places
from support.families import FAMILIES, prompts
from support.models import build

RUNTIMES = ("onnxruntime", "openvino")
WEIGH = Plan(vision=Stage(methods.Match(keep=0.6, fate="weigh"), layers=[0, 1]))
PLANS = {
    "nothing": Plan(),
    "votes to a budget": Plan(vision=Stage(saint.Saint(keep=20), layers=[0, 1])),
    "pairs": Plan(vision=Stage(methods.Match(keep=0.6, center=True), layers=[0, 1], output="carried")),
    "weighed": WEIGH,
    "merged": Plan(vision=Stage(methods.Match(keep=0.6, fate="merge"), layers=[0, 1], placement="post")),
    "ToMe": Plan(vision=Stage(methods.ToMe(keep=0.6), layers=[0, 1])),
    "PiToMe": Plan(vision=Stage(methods.PiToMe(keep=0.6), layers=[0, 1])),
    "random": Plan(vision=Stage(methods.Random(keep=0.6), layers=[0, 1])),
    "full graph, then grid": Plan(
        vision=[Stage(saint.SaintFullGraph(keep=0.7), placement="input"), Stage(methods.Grid(keep=0.5), layers=[1])]
    ),
}
DAILY = ("votes to a budget", "merged")
LIBRARIES = ("transformers/clip", "transformers/dinov2", "open_clip/vit", "timm/dinov3")


def needed(*modules):
    for module in modules:
        pytest.importorskip(module, reason=f'{module} is not installed: pip install ".[export]"')


def by_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, {name: value.numpy() for name, value in given.items()})


def by_openvino(path):
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    graph = openvino.Core().compile_model(path, "CPU", settings)
    return lambda given: list(graph({name: value.numpy() for name, value in given.items()}).values())


def agree(model, graph, inputs):
    """With other pictures than those of the export, in two batches."""
    for size in (1, 3):
        noise = torch.Generator().manual_seed(size)
        given = {name: torch.randn(size, *value.shape[1:], generator=noise) for name, value in inputs.items()}
        want = testing.run(model, given)
        got = graph(given)
        assert len(got) == len(want)
        for value, (name, expected) in zip(got, want.items(), strict=True):
            assert value.shape == tuple(expected.shape), name
            assert torch.allclose(torch.as_tensor(value), expected, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(
    "plan",
    [pytest.param(plan, id=n, marks=() if n in DAILY else pytest.mark.nightly) for n, plan in PLANS.items()],
)
def test_one_file_for_batches_of_any_size_in_both_runtimes(plan, tmp_path):
    needed("onnxscript", *RUNTIMES)
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    unpruned = testing.run(model, inputs)["output"]
    written = export(model, plan, tmp_path / "model.onnx", inputs)
    assert (written.format, written.inputs, written.outputs) == ("onnx", ("x",), ("output",))
    assert torch.equal(testing.run(model, inputs)["output"], unpruned)  # the model is as before
    with saint.pruned(model, plan):
        assert torch.equal(testing.run(model, inputs)["output"], unpruned) == (not plan.slots)
        agree(model, by_onnxruntime(written.path), inputs)
        agree(model, by_openvino(written.path), inputs)


@pytest.mark.parametrize("name", [LIBRARIES[0], *(pytest.param(n, marks=pytest.mark.nightly) for n in LIBRARIES[1:])])
def test_every_library(name, tmp_path):
    needed("onnxscript", *RUNTIMES)
    model = build(name)
    inputs = testing.example_inputs(model)
    written = export(model, WEIGH, tmp_path / "model.onnx", inputs)
    with saint.pruned(model, WEIGH):
        assert list(written.outputs) == [path.replace(".", "_") for path in testing.run(model, inputs)]
        agree(model, by_onnxruntime(written.path), inputs)
        agree(model, by_openvino(written.path), inputs)


def test_a_folder_for_openvino(tmp_path):
    needed("onnxscript", "openvino")
    import openvino

    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    written = export(model, WEIGH, tmp_path / "ir", inputs)
    assert written.format == "openvino"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["ir", "openvino_model.bin", "openvino_model.xml"]
    graph = openvino.Core().read_model(tmp_path / "ir" / "openvino_model.xml")
    assert Plan.from_json(graph.get_rt_info(["saint", "plan"]).astype(str)) == WEIGH
    with saint.pruned(model, WEIGH):
        agree(model, by_openvino(tmp_path / "ir" / "openvino_model.xml"), inputs)


def test_a_program_runs_where_saint_is_not(tmp_path):
    model = build("transformers/clip")
    inputs = testing.example_inputs(model)
    written = export(model, WEIGH, tmp_path / "model.pt2", inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        "given = torch.load('inputs.pt'); graph = torch.export.load('model.pt2').module()\n"
        "torch.save(dict(graph(**given)), 'outputs.pt')\n"
        "assert not {'saint', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    got = torch.load(tmp_path / "outputs.pt")
    with saint.pruned(model, WEIGH):
        want = testing.run(model, inputs)
    assert tuple(got) == tuple(want) == written.outputs
    assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)


def test_the_tower_of_a_vision_language_model(tmp_path):
    needed("onnxscript", "onnxruntime")
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [["0", 3, "1", 2]])
    plan = Plan(vision=Stage(saint.Saint(keep=0.5), layers=[0, 1]))
    written = export(model, plan, tmp_path / "tower.onnx", inputs["pixel_values"])
    assert written.outputs == ("features", "kept")
    features, kept = by_onnxruntime(written.path)({"pixel_values": inputs["pixel_values"]})
    with saint.pruned(model, plan) as session, torch.no_grad():
        model(**inputs)
        assert [row.tolist() for row in session.trace[-1].kept] == kept.tolist()
        layer = model.config.vision_feature_layer
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        assert torch.allclose(tower.hidden_states[layer], torch.as_tensor(features), atol=1e-4)
    assert saint.status(model) is None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ties_fall_by_place_in_every_runtime(runtime, tmp_path):
    """Energies and masks are full of equal values, and the TopK of a runtime may order them as it likes."""
    needed("onnxscript", runtime)

    class Orders(torch.nn.Module):
        def forward(self, x):
            order = descending(x)
            mask = torch.zeros_like(x, dtype=torch.bool).scatter(1, order[:, :20], True)
            return order, true_places(mask, 20) if torch.compiler.is_exporting() else mask.nonzero()[:, 1].view(-1, 20)

    rows = torch.export.Dim("rows", min=1, max=64)
    x = torch.randint(0, 4, (3, 50), generator=torch.Generator().manual_seed(0)).float()
    x[:, 7] = -torch.inf
    torch.onnx.export(
        Orders().eval(), (x,), tmp_path / "orders.onnx", dynamo=True, dynamic_shapes=({0: rows},), verbose=False
    )
    run = by_onnxruntime if runtime == "onnxruntime" else by_openvino
    got = run(tmp_path / "orders.onnx")({"x": x})
    for value, want in zip(got, Orders()(x), strict=True):
        assert torch.equal(torch.as_tensor(value), want)


def test_the_file_holds_its_plan_and_no_path_of_this_machine(tmp_path):
    needed("onnx", "onnxscript", "onnxruntime")
    import onnx

    model = build("timm/vit-augreg")
    path = export(model, WEIGH, tmp_path / "model.onnx", testing.example_inputs(model)).path
    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert Plan.from_json(props["saint.plan"]) == WEIGH
    assert b".py" not in path.read_bytes()


# -- what is refused, with nothing written ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bessel(FixedBudget):
    """A method whose score no other runtime can compute."""

    name: ClassVar[str] = "bessel"
    paper: ClassVar[str] = "none"
    stages: ClassVar[frozenset[str]] = frozenset({"vision"})

    def choose(self, candidates, goal):
        from saint.tokens import Selection

        return Selection.from_scores(torch.special.bessel_j0(candidates.keys).sum(-1), goal, candidates.tokens)


@dataclasses.dataclass(frozen=True)
class Looks(Bessel):
    """A method that looks at values, which no graph can."""

    name: ClassVar[str] = "looks"

    def choose(self, candidates, goal):
        return super().choose(candidates, goal) if float(candidates.keys.sum()) < 1e9 else None


REFUSED = {
    "votes": (saint.Saint(), "m.onnx", ValueError, "Saint.*own number of tokens.*freeze the plan"),
    "a guard": (WEIGH.guarded(0.5), "m.onnx", ValueError, "guard=0.5 gives every picture.*freeze the plan"),
    "another stage": (Plan(connector=saint.SaintFullGraph(keep=5)), "m.onnx", ValueError, "only the vision stage"),
    "an operator": (Stage(Bessel(), layers=[0]), "m.onnx", saint.UnsupportedModelError, "bessel_j0.*pt2 file can"),
    "a look": (Stage(Looks(), layers=[0]), "m.pt2", saint.UnsupportedModelError, "torch.export cannot"),
    "an ending": (WEIGH, "m.trt", ValueError, "must end in .onnx or .pt2"),
    "no layer": (Stage(saint.Saint(keep=9), layers=[77]), "m.pt2", ValueError, "layer 77 is out of range"),
}


@pytest.mark.parametrize(("plan", "file", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(plan, file, error, message, tmp_path):
    if file.endswith("onnx"):
        needed("onnxscript", "onnxruntime")
    model = build("timm/vit-augreg")
    with pytest.raises(error, match=message):
        export(model, plan, tmp_path / "new" / file, testing.example_inputs(model))
    assert not list(tmp_path.rglob("m*"))
    assert saint.status(model) is None


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    model = build("timm/vit-augreg")
    (tmp_path / "m.pt2").write_text("of before")
    monkeypatch.setattr(backend, "TOLERANCE", -1.0)
    with pytest.raises(saint.ParityError, match="differs from the patched model's by .* nothing was written"):
        export(model, WEIGH, tmp_path / "m.pt2", testing.example_inputs(model))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.pt2", "of before")]


@pytest.mark.parametrize(("file", "module"), [("m.onnx", "onnxscript"), ("m", "openvino")])
def test_a_missing_dependency_names_the_extra(file, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    model = build("timm/vit-augreg")
    with pytest.raises(ImportError, match=rf"{module} is not installed.*\.\[export\]"):
        export(model, WEIGH, tmp_path / file, testing.example_inputs(model))
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_mode_and_bad_inputs(tmp_path):
    model = build("timm/vit-augreg")
    with pytest.raises(ValueError, match="training mode"):
        export(model.train(), WEIGH, tmp_path / "m.pt2", testing.example_inputs(model))
    with pytest.raises(ValueError, match="same number of samples"):
        export(model.eval(), WEIGH, tmp_path / "m.pt2", {"x": torch.zeros(2, 3, 96, 96), "y": torch.zeros(1)})


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in args])
        said = capsys.readouterr()
        return ended.value.code or 0, " ".join((said.out + said.err).split())

    return run


def test_the_command_freezes_and_exports(call, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.effect_noise((60, 40), 40 * i + 1).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    plan = json.dumps(Plan(vision=Stage(saint.Saint(threshold=0.0, neighbors=1), layers=[0, 1])).to_dict())
    command = ("export", "timm:test_vit", "--no-pretrained", "--threads", 1, "--plan", plan, "-o", tmp_path / "m.pt2")
    code, said = call(*command)
    assert code == 2
    assert "saint export --images" in said
    assert not (tmp_path / "m.pt2").exists()
    code, said = call(*command, "--images", tmp_path / "photos", "--json", tmp_path / "record.json")
    assert code == 0, said
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["kind"], record["format"], record["counted_on"]) == ("export", "pt2", 3)
    assert all(
        isinstance(stage["method"]["budget"], float) for stage in Plan.from_dict(record["plan"]).to_dict()["vision"]
    )
    assert torch.export.load(tmp_path / "m.pt2").module()(x=torch.zeros(2, 3, 160, 160))["output"].shape[0] == 2
