"""What other packages bring: a family of vision-language models in one new file, and no file of saint changed."""

import dataclasses
import importlib
import inspect
import re
import sys

import pytest
import transformers as hf
from torch import nn

import saint
from saint import testing
from saint.lab.kinds import VLM
from saint.testing.vlm import CONTRACTS, check_vlm
from saint.upstream import FamilySpec
from saint.vision.locate import locate
from saint.vlm.locate import find as find_vlm
from support.families import FAMILIES, maker
from support.packages import HOME, home

pytestmark = pytest.mark.usefixtures("fresh")  # what a test registers is gone behind it


def strange_llava() -> str:
    """The file of LLaVA as another package would hold it: under another path, its classes with other names, no common base."""
    source = inspect.getsource(inspect.getmodule(hf.LlavaForConditionalGeneration))
    source = source.replace("from .configuration_llava", "from transformers.models.llava.configuration_llava")
    source = source.replace("from ..auto", "from transformers.models.auto").replace("from ...", "from transformers.")
    source = re.sub(r"\bLlava(?!Config\b)", "Strange", source)
    # writes docstrings from the place of a file inside transformers
    return re.sub(r"^ *@auto_docstring(\((?:[^()]|\n)*\))?\n", "", source, flags=re.MULTILINE)


STRANGE = FamilySpec(
    title="Strange",
    model="strange_vlm.StrangeModel",
    library="strange_vlm",
    feature_layer=lambda model, depth: depth + 1 + model.config.vision_feature_layer,
)


def strange() -> nn.Module:
    module = importlib.import_module("strange_vlm")
    twin = FAMILIES["llava-llama"].build()
    model = module.StrangeForConditionalGeneration(twin.config).eval()
    model.load_state_dict(twin.state_dict())
    model.generation_config = twin.generation_config
    return model


def test_a_family_keeps_the_contracts_with_one_spec(install):
    install("strange", {"strange_vlm.py": strange_llava()})
    model = strange()
    assert not [cls for cls in type(model.model).__mro__ if cls.__module__.startswith("transformers.models.llava")]
    assert find_vlm(model)[2].derived  # read off, and what it is called is not known
    saint.register(STRANGE)
    assert find_vlm(model)[1:] == (model.model, STRANGE)
    results = check_vlm(model, maker(FAMILIES["llava-llama"], model))
    assert [result.contract for result in results] == list(CONTRACTS)
    assert {result.outcome for result in results} == {"passed"}, results


def test_a_family_comes_by_entry_point(install, run, tmp_path):
    spec = '\nfrom saint.upstream import FamilySpec\nSPEC = FamilySpec(title="Strange", model="strange_vlm.StrangeModel")\n'
    install("strange", {"strange_vlm.py": strange_llava(), "strange_spec.py": spec}, families="s = strange_spec:SPEC")
    code, out, _ = run("list", "--json", tmp_path / "list.json")
    assert code == 0
    assert "Strange" in out
    assert "strange_vlm" not in sys.modules  # a spec knows its class by name
    model = strange()
    inputs = maker(FAMILIES["llava-llama"], model)([0, 1])
    with saint.pruned(model, saint.Plan(connector=saint.SaintFullGraph(keep=9))) as session:
        testing.run(model, inputs)
        assert session.trace[-1].tokens_out.tolist() == [9, 9]


def test_a_checkpoint_is_known_by_the_package_of_its_config(install, monkeypatch):
    install("strange", {"strange_vlm.py": "class StrangeConfig: architectures = ['StrangeForConditionalGeneration']"})
    config = importlib.import_module("strange_vlm").StrangeConfig()
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", lambda name: config)
    assert not VLM.named("hf:strange")
    saint.register(STRANGE)
    assert VLM.named("hf:strange")
    config.architectures = ["StrangeForTextEncoding"]
    assert not VLM.named("hf:strange")


def test_a_tower_comes_with_its_family():
    """A tower of which only the family can make sense is no encoder on its own."""
    saint.register(dataclasses.replace(STRANGE, tower_spec=HOME))
    with pytest.raises(saint.UnsupportedModelError):
        locate(home())
