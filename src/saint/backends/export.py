"""A pruned encoder as a file for other runtimes: ONNX, a program of ``torch.export``, or OpenVINO's intermediate representation.

The graph holds the plan: what is dropped where is computed inside, from each image, in static shapes. Letters: B batch.
"""

import contextlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParityError, SaintError, UnsupportedModelError
from ..extras import require
from ..plans import Plan
from ..session import PlanLike, as_plan, pruned
from ..vlm.locate import find as find_vlm
from .operators import translations
from .tower import Tower

TOLERANCE = 1e-4  # of outputs, of which the largest counts as 1 where it is larger
BATCHES = (1, 3)  # a file is tried with both before it is kept
_MODEL = "openvino_model"  # stem of the two files of OpenVINO
_LARGEST = 2**31 - 2**24  # bytes of weights that fit into one ONNX file, which is a protocol buffer of less than 2 GiB

Graph = Callable[[dict[str, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder of OpenVINO.
        format: "onnx", "pt2" or "openvino".
        inputs: names of the inputs, tensors with the batch first.
        outputs: names of the outputs, in order.
        size: bytes of all files.
        error: largest difference from the patched model's outputs on the example, for a batch of 1 and one of 3.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size: int
    error: float


def export(
    model: nn.Module, plan: PlanLike, path: str | os.PathLike[str], inputs: Mapping[str, Any] | Tensor
) -> Exported:
    """Write ``model`` under ``plan`` as a graph that needs neither PyTorch's eager mode nor this library.

    One file takes batches of any size. It is run on the example, as is and with another batch size, and kept only where its
    outputs are those of the patched model. The model itself is left as it was.

    Args:
        model: an encoder of the support table, or a model that holds one, on the CPU and in eval mode. Of a vision-language model
            the tower is exported: pixels to the features that its connector reads, and which patches they are of.
        plan: with fixed budgets: numbers, not votes (see :func:`saint.freeze`). An empty plan exports the unpruned model.
        path: ends in ``.onnx`` or ``.pt2`` (read by ``torch.export.load``; outputs by name, in a dict); anything without an
            ending is a folder for OpenVINO.
        inputs: an example: keyword arguments of ``model.forward``, tensors with the batch first; what is no tensor becomes part
            of the graph. A tensor alone is the pictures. Sizes of images are those of the example.

    Returns:
        What was written.

    Raises:
        ValueError: votes, a plan for other stages, another ending, or inputs that do not fit.
        UnsupportedModelError: the model cannot be exported, with the reason; nothing is written.
        ParityError: the graph computes something else; nothing is written.
        MissingExtraError: the extra ``export`` is not installed.
        OSError: the file cannot be written; what was there before is still there.

    Example:
        >>> import timm, torch, saint
        >>> from saint.backends.export import export
        >>> vit = timm.create_model("test_vit").eval()
        >>> plan = saint.Plan(vision=saint.Saint(keep=0.5))
        >>> written = export(vit, plan, "vit.pt2", torch.randn(1, 3, 160, 160))  # doctest: +SKIP
    """
    plan, path = as_plan(plan), Path(path)
    kind = format_of(path)
    _check_plan(plan)
    _check_model(model)
    given, constants = _split(model, inputs)
    write, read = _FORMATS[kind]
    _require(kind)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        subject = _subject(model, plan, constants, stack)
        examples = {size: _rows(given, size) for size in BATCHES}
        wanted = {size: subject(**example) for size, example in examples.items()}
        program = _program(subject, examples[BATCHES[-1]])
        names = tuple(wanted[BATCHES[0]])
        with _beside(path) as folder:
            write(program, folder / path.name, tuple(given), names, json.dumps(plan.to_dict()))
            error = _compared(read(folder / path.name), examples, wanted)
            files = [file for file in folder.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            _put(folder, path)
    return Exported(path, kind, tuple(given), names, size, error)


def format_of(path: Path) -> str:
    """ "onnx", "pt2" or "openvino", by the ending of ``path``.

    Raises:
        ValueError: another ending, or a file where a folder must be and the other way round.
    """
    kind = {".onnx": "onnx", ".pt2": "pt2", "": "openvino"}.get(path.suffix)
    if kind is None:
        raise ValueError(
            f"{path} must end in .onnx or .pt2, or be a folder, without an ending, for OpenVINO; got {path.suffix}"
        )
    if path.exists() and path.is_dir() != (kind == "openvino"):
        what = "a folder" if path.is_dir() else "a file"
        raise ValueError(
            f"{path} is {what}: give the name of a file that ends in .onnx or .pt2, or of a folder for OpenVINO"
        )
    return kind


# -- checks before anything is done -----------------------------------------------------------------------------------


def _check_plan(plan: Plan) -> None:
    if other := [slot for slot in plan.slots if slot != "vision"]:
        raise ValueError(
            f"the plan has a {' and a '.join(other)} stage, and only the vision stage is exported: a language model decides "
            "inside generate; give a plan with vision alone"
        )
    for stage in plan.vision:
        if stage.guard:
            raise ValueError(
                f"guard={stage.guard:g} gives every picture its own number of tokens, which no exported graph can have: freeze "
                "the plan to images of yours (saint.freeze; saint export --images)"
            )
        if stage.method.votes:
            raise ValueError(
                f"{type(stage.method).__name__} without a fixed budget lets every image keep its own number of tokens, which no "
                "exported graph can have: give a number or a fraction as keep, or freeze the plan to images of yours "
                "(saint.freeze; saint export --images)"
            )


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    places = {str(parameter.device) for parameter in model.parameters()} - {"cpu"}
    if places:
        raise ValueError(
            f"the model is on {', '.join(sorted(places))}: a graph is made on the CPU, call model.cpu() first"
        )


def _require(kind: str) -> None:
    for module in {"pt2": (), "onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}[kind]:
        require(module, "export")


def _split(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the example, and the other arguments."""
    if isinstance(inputs, Tensor):
        first = next(iter(inspect.signature(model.forward).parameters))
        inputs = {"pixel_values" if find_vlm(model) else first: inputs}
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a tensor or keyword arguments of model.forward, got {type(inputs).__name__}")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    sizes = {name: value.shape[0] if value.ndim else 0 for name, value in tensors.items()}
    if not tensors or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"inputs must be tensors with the same number of samples in front, one or more; got {sizes}")
    return tensors, {name: value for name, value in inputs.items() if name not in tensors}


def _rows(tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """``size`` samples, from the first again where there are fewer."""
    return {name: value[torch.arange(size) % len(value)].contiguous() for name, value in tensors.items()}


# -- what is exported -------------------------------------------------------------------------------------------------


class _Named(nn.Module):
    """A model whose outputs are tensors by name, whatever classes its library returns them in."""

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.constants = model, dict(constants)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return dict(_tensors(self.model(**inputs, **self.constants)))


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in what a model returned: "output", "last_hidden_state", "hidden_states_0", ..."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name or 'output'}_{index}")


def _subject(model: nn.Module, plan: Plan, constants: Mapping[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    """The patched model, until ``stack`` is closed."""
    found = find_vlm(model)
    if found is None:
        stack.enter_context(pruned(model, plan))
        return _Named(model, constants).eval()
    return _Named(Tower(*found, plan, stack), constants).eval()


def _program(subject: nn.Module, example: dict[str, Tensor]) -> Any:
    """The exported program, for batches of any size."""
    batch = torch.export.Dim("batch", min=1, max=2**20)
    shapes = {"inputs": {name: {0: batch} for name in example}}
    try:
        with _quiet():
            return torch.export.export(subject, (), example, dynamic_shapes=shapes)
    except SaintError:
        raise
    except Exception as error:  # torch has dozens of classes for it
        raise UnsupportedModelError(
            f"torch.export cannot make a graph of this model under this plan: {_line(error)}"
        ) from error


# -- writing and reading ----------------------------------------------------------------------------------------------


def _write_pt2(program: Any, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], plan: str) -> None:
    torch.export.save(program, path, extra_files={"saint_plan.json": plan})


def _read_pt2(path: Path) -> Graph:
    module = torch.export.load(path).module()
    return lambda inputs: list(module(**inputs).values())


def _write_onnx(program: Any, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], plan: str) -> None:
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=translations(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedModelError(f"this model under this plan has no ONNX graph: {_operator(error)}") from error
    assert made is not None
    for node in made.model.graph.all_nodes():  # where in whose source each node comes from: paths of this machine
        node.metadata_props.clear()
    made.model.metadata_props["saint.plan"] = plan
    weights = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    made.save(path, external_data=weights > _LARGEST)


def _read_onnx(path: Path) -> Graph:
    runtime = require("onnxruntime", "export")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {n: t.numpy() for n, t in inputs.items()})]

    return run


def _write_openvino(program: Any, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], plan: str) -> None:
    openvino = require("openvino", "export")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        _write_onnx(program, file, inputs, outputs, plan)
        made = openvino.Core().read_model(file)
        made.set_rt_info(plan, ["saint", "plan"])
        path.mkdir()
        openvino.save_model(made, path / f"{_MODEL}.xml", compress_to_fp16=False)


def _read_openvino(path: Path) -> Graph:
    openvino = require("openvino", "export")
    # some processors would compute in bfloat16, which chooses other tokens
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path / f"{_MODEL}.xml", "CPU", settings)
    return lambda inputs: [
        torch.from_numpy(a.copy()) for a in compiled({n: t.numpy() for n, t in inputs.items()}).values()
    ]


_FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], Graph]]] = {
    "pt2": (_write_pt2, _read_pt2),
    "onnx": (_write_onnx, _read_onnx),
    "openvino": (_write_openvino, _read_openvino),
}


def _compared(
    graph: Graph, examples: Mapping[int, dict[str, Tensor]], wanted: Mapping[int, dict[str, Tensor]]
) -> float:
    worst = 0.0
    for size, example in examples.items():
        got = graph(example)
        if len(got) != len(wanted[size]):
            raise ParityError(
                f"the graph has {len(got)} outputs, the patched model {len(wanted[size])}: nothing was written"
            )
        for (name, want), value in zip(wanted[size].items(), got, strict=True):
            scale = max(1.0, float(want.abs().max()))
            error = float((value - want).abs().max()) / scale if value.shape == want.shape else float("inf")
            if not error <= TOLERANCE:
                raise ParityError(
                    f"{name} of the graph differs from the patched model's by {error:.2g} (shapes {tuple(value.shape)} and "
                    f"{tuple(want.shape)}) for a batch of {size}, so nothing was written. Of two tokens whose scores are equal "
                    "up to rounding either may be chosen: try other images; if it stays, this is a bug"
                )
            worst = max(worst, error)
    return worst


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, gone behind the block."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}."))
    except OSError as error:
        raise OSError(error.errno, f"cannot write the file ({error.strerror or error})", str(path)) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, path: Path) -> None:
    """Put what was written into ``folder`` in its place; what names other files comes last."""
    if (folder / path.name).is_dir():
        path.mkdir(exist_ok=True)
        for file in sorted((folder / path.name).iterdir()):  # .bin, then .xml
            os.replace(file, path / file.name)
        return
    for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # external weights, then the model
        os.replace(file, path.parent / file.name)


# -- messages ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters report what they tried; the reason of a failure is in its error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _operator(error: BaseException) -> str:
    """The operator that is missing, from the errors behind an error."""
    cause: BaseException | None = error
    while cause is not None:
        for line in str(cause).splitlines():
            if "No ONNX function found" in line:
                found = line.partition("<OpOverload(op='")[2]
                name, _, rest = found.partition("'")
                overload = rest.partition("overload='")[2].partition("'")[0]
                return f"the exporter knows no ONNX function for {name}.{overload}; a .pt2 file can hold it"
        cause = cause.__cause__ or cause.__context__
    return _line(error)
