"""What other packages bring: an analysis in one new file, and no file of saint changed.

The file is the block of docs/adding.md, so what is shown there is what is held against a literal computation here.
"""

import importlib
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saint
from saint import testing
from support.families import FAMILIES, IMAGE, prompts
from support.models import build

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.fixture
def observer(tmp_path, monkeypatch):
    """An ``UpdateNorms`` from a module outside the package."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n((?:(?!```).)*?^class UpdateNorms:.*?)^observer = ", text, re.DOTALL | re.MULTILINE
    )
    (tmp_path / "update_norms.py").write_text(code, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "update_norms", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("update_norms").UpdateNorms()


def streams(model: nn.Module, layers: nn.ModuleList, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What each layer of an untouched model puts out, float64 [B, L, C]."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).double())

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        model(**inputs)
    return found


def norms(behind: list[Tensor], layer: int, places: list[Tensor]) -> list[float]:
    """The definition, one token after the other."""
    means = []
    for sample, tokens in enumerate(places):
        total = 0.0
        for token in tokens.tolist():
            added = behind[layer][sample, token] - behind[layer - 1][sample, token]
            total += sum(value**2 for value in added.tolist()) ** 0.5
        means.append(total / len(tokens))
    return means


def test_updates_of_an_encoder(observer):
    model = build("timm/vit-augreg")
    inputs = testing.example_inputs(model)
    behind = streams(model, model.blocks, inputs)
    patches = [torch.arange(model.num_prefix_tokens, behind[0].shape[1])] * len(behind[0])
    before = testing.snapshot(model)
    with saint.pruned(model, saint.Plan(), observers=[observer]), torch.no_grad():
        model(**inputs)
    assert testing.snapshot(model) == before
    assert sorted(observer.norms) == [("vision", layer) for layer in range(1, len(model.blocks))]
    for (_, layer), got in observer.norms.items():
        assert got.tolist() == pytest.approx(norms(behind, layer, patches), rel=1e-5)


def test_updates_of_a_decoder(observer):
    """Visual tokens only; of the prompt with one image, padding slots show text tokens, which must not count."""
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[30, "0", 14], [2, "0", 5, "0"]])
    layers = model.model.language_model.layers
    behind = streams(model, layers, inputs)
    places = [(row == IMAGE).nonzero().flatten() for row in inputs["input_ids"]]
    assert 2 * len(places[0]) == len(places[1])
    with saint.pruned(model, saint.Plan(), observers=[observer]), torch.no_grad():
        model(**inputs)
    got = {layer: mean for (stage, layer), mean in observer.norms.items() if stage == "language"}
    assert sorted(got) == list(range(1, len(layers)))
    for layer, mean in got.items():
        assert mean.tolist() == pytest.approx(norms(behind, layer, places), rel=1e-5)
