"""What other packages bring: a method or an encoder in one new file, and no file of saint changed.

A package is installed as the import system sees it: modules and a ``*.dist-info`` folder with its entry points in a folder on
the path.
"""

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap

import pytest
import torch
from torch import nn

import saint
from saint import methods, plugins, testing
from saint.errors import PluginError
from saint.upstream import registry
from saint.vision.locate import locate
from support.models import build
from support.packages import HOME, HomeAttention, HomeBlock, HomeViT, home

pytestmark = pytest.mark.usefixtures("fresh")  # what a test registers is gone behind it

# -- a method ---------------------------------------------------------------------------------------------------------

LOUD = '''
    import dataclasses
    from typing import ClassVar

    import torch
    from saint.methods.base import FixedBudget
    from saint.tokens import Selection


    @dataclasses.dataclass(frozen=True)
    class LoudKeys(FixedBudget):
        """Keep the tokens with the longest keys, ties by index."""

        name: ClassVar[str] = "loud_keys"
        paper: ClassVar[str] = "none"
        stages: ClassVar[frozenset[str]] = frozenset({"vision", "connector", "language"})

        def choose(self, candidates, goal):
            length = torch.linalg.vector_norm(candidates.keys.float(), dim=-1)  # [B, N]
            if candidates.tokens.valid is not None:
                length = length.masked_fill(~candidates.tokens.valid, -1)
            order = length.sort(dim=-1, descending=True, stable=True).indices
            keep = torch.arange(length.shape[1]) < torch.tensor(goal).unsqueeze(1)
            return Selection.from_mask(torch.zeros_like(keep).scatter_(1, order, keep), goal)
'''


def test_a_method_in_one_file_works_in_a_plan(install):
    install("loud", {"loud_keys.py": LOUD})
    loud = importlib.import_module("loud_keys").LoudKeys
    model = build("timm/vit-augreg")
    plan = saint.Plan(vision=saint.Stage(loud(keep=0.5), layers=[1, 2]))
    results = testing.check_model(model, plan, testing.example_inputs(model))
    assert {result.outcome for result in results} == {"passed"}, results
    assert "loud_keys" not in methods.names()
    with pytest.raises(ValueError, match="unknown method 'loud_keys'"):
        saint.Plan.from_dict(plan.to_dict())


def test_a_method_comes_by_entry_point(install, run, tmp_path):
    install("loud", {"loud_keys.py": LOUD}, methods="loud_keys = loud_keys:LoudKeys")
    assert "loud_keys" in methods.names()
    assert "loud_keys" not in sys.modules  # names are read without an import
    plan = saint.Plan(vision=saint.Stage(methods.get("loud_keys")(keep=9), layers=[1]))
    again = saint.Plan.from_dict(plan.to_dict())
    assert again == plan
    model = build("timm/vit-augreg")
    with saint.pruned(model, again) as session:
        testing.run(model, testing.example_inputs(model))
        assert session.trace[-1].tokens_out.tolist() == [9, 9, 9]
    code, out, _ = run("list", "--json", tmp_path / "list.json")
    assert code == 0
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if "loud_keys" in line)
    column = lines[first].index("Keep")  # the text is in a column of its own, over several lines
    told = " ".join(line[column:].strip() for line in lines[first : first + 2])
    assert told.startswith("Keep the tokens with the longest keys, ties by index.")


@pytest.mark.parametrize(
    ("modules", "point", "said"),
    [
        ({"loud_keys.py": "import no_such_thing"}, "loud_keys = loud_keys:LoudKeys", "No module named 'no_such_thing'"),
        ({"loud_keys.py": "1 / 0"}, "loud_keys = loud_keys:LoudKeys", "ZeroDivisionError: division by zero"),
        ({"loud_keys.py": "LoudKeys = 3"}, "loud_keys = loud_keys:LoudKeys", "must be a subclass of .*Method, got 3"),
        (
            {"loud_keys.py": "class LoudKeys: name = 'loud_keys'"},
            "loud_keys = loud_keys:LoudKeys",
            "must be a subclass of",
        ),
        ({"loud_keys.py": LOUD}, "loud = loud_keys:LoudKeys", "has the name 'loud_keys'.*both must agree"),
    ],
)
def test_a_broken_method_names_its_distribution(install, modules, point, said):
    install("loud", modules, methods=point)
    with pytest.raises(PluginError, match=said) as caught:
        methods.get(point.partition(" ")[0])
    assert re.search(r"entry point of loud 1\.5, group saint\.methods", str(caught.value))
    assert methods.get("saint") is saint.Saint


def test_a_method_may_not_take_a_name_that_is_taken(install):
    install("one", {"loud_keys.py": LOUD}, methods="loud_keys = loud_keys:LoudKeys")
    install("two", {"other.py": LOUD}, methods="loud_keys = other:LoudKeys")
    with pytest.raises(PluginError, match=r"two plug-ins have one name: .*(one 1\.5.*two|two 1\.5.*one) 1\.5"):
        methods.names()


def test_a_method_may_not_take_the_name_of_a_built_in_one(install):
    install("loud", {"loud_keys.py": LOUD}, methods="grid = loud_keys:LoudKeys")
    with pytest.raises(PluginError, match=r"loud 1\.5.*'grid' is a method of saint"):
        methods.names()


# -- an encoder -------------------------------------------------------------------------------------------------------


def test_an_encoder_keeps_the_contracts_with_one_spec():
    model = nn.Sequential(home())
    with pytest.raises(saint.UnsupportedModelError, match="docs/adding.md says how to register"):
        testing.check_model(model)
    saint.register(HOME)
    saint.register(dataclasses.replace(HOME))  # an equal one does nothing
    path, encoder, spec = locate(model)
    assert (path, type(encoder), spec) == ("0", HomeViT, HOME)
    results = testing.check_model(encoder)
    assert [result.contract for result in results] == list(testing.CONTRACTS)
    assert {result.outcome for result in results} == {"passed"}, results


def test_a_mask_that_the_spec_leaves_out_is_not_needed():
    block = dataclasses.replace(HOME.block_specs["HomeBlock"], mask=None)
    saint.register(dataclasses.replace(HOME, block_specs={"HomeBlock": block}))
    results = testing.check_model(home())
    assert {result.outcome for result in results} == {"passed"}, results


def test_a_wrong_fact_is_refused_by_name():
    saint.register(dataclasses.replace(HOME, final="norm"))
    model = home()
    with pytest.raises(saint.UnsupportedModelError, match=r"no norm \(last norm\).*registered for homevit"):
        saint.apply(model, saint.Saint())
    assert saint.status(model) is None


class Pooled(HomeViT):
    """Its tokens are not the patches that the patch embedding makes."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 10, 48))

    def forward(self, x):
        patches = nn.functional.avg_pool2d(self.patchify(x), 2).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), patches], 1) + self.positions
        for block in self.trunk:
            x = block(x)
        return self.head(self.last(x)[:, 0])


def test_a_grid_that_does_not_hold_the_candidates_is_told():
    saint.register(dataclasses.replace(HOME, title="Pooled", encoder=f"{__name__}.Pooled"))
    model, x = Pooled().eval(), torch.randn(2, 3, 96, 96)
    plan = saint.Stage(saint.methods.Random(keep=0.5), layers=[1], output="nearest")
    with (
        saint.pruned(model, plan),
        pytest.raises(ValueError, match=r"grid \(6, 6\) does not hold the 9 candidates.*similar"),
    ):
        model(x)
    with saint.pruned(model, dataclasses.replace(plan, output="similar")):
        model(x)


def test_a_subclass_may_have_a_spec_of_its_own():
    class Wider(HomeViT):
        pass

    wider = dataclasses.replace(HOME, title="Wider", encoder=f"{Wider.__module__}.{Wider.__qualname__}", patch=None)
    with pytest.raises(ValueError, match="named by module and class"):
        saint.register(wider)  # a class inside a function has no such name
    Wider.__qualname__ = "Wider"
    saint.register(HOME)
    assert locate(Wider())[2] is HOME
    saint.register(dataclasses.replace(wider, encoder=f"{__name__}.Wider"))
    assert locate(Wider())[2].title == "Wider"
    assert locate(HomeViT())[2] is HOME


HOME_FILE = """
    import torch
    from torch import nn
    from saint.upstream import BlockSpec, EncoderSpec, Role

    {classes}
    block = BlockSpec(attn="look", mlp="think", norm1="before", norm2="behind", keys=("look.key",), heads=("look.heads",),
                      mask=Role("hidden"))
    SPEC = EncoderSpec(title="Home-made ViT", library="homevit", encoder="homevit.HomeViT", blocks="trunk",
                       block_specs={{"HomeBlock": block}}, prefix=lambda model: 1, patch="patchify", final="last")
"""


def home_file() -> str:
    classes = "\n\n".join(inspect.getsource(cls) for cls in (HomeAttention, HomeBlock, HomeViT))
    return textwrap.dedent(HOME_FILE).format(classes=classes)


def test_an_encoder_comes_by_entry_point(install, run, tmp_path):
    install("homevit", {"homevit.py": home_file()}, encoders="home = homevit:SPEC")
    assert "homevit" not in sys.modules
    model = importlib.import_module("homevit").HomeViT().eval()
    with saint.pruned(model, saint.Saint(keep=0.5)) as session:
        testing.run(model, testing.example_inputs(model))
        assert session.trace[-1].tokens_out.tolist() == [18] * 3
    code, out, _ = run("list", "--json", tmp_path / "list.json")
    assert code == 0
    assert "Home-made ViT" in out
    assert '"library": "homevit"' in (tmp_path / "list.json").read_text()


def test_plugins_are_read_once_and_only_when_a_model_is_looked_up(install, monkeypatch):
    install("homevit", {"homevit.py": home_file()}, encoders="home = homevit:SPEC")
    saint.register(HOME)
    assert "homevit" not in sys.modules
    reads = []
    real = plugins.load
    monkeypatch.setattr(plugins, "load", lambda point: reads.append(point.name) or real(point))
    for _ in range(2):
        locate(home())
    assert reads == ["home"]


@pytest.mark.parametrize(
    ("group", "text", "said"),
    [
        ("encoders", "from homevit.gone import x", r"ModuleNotFoundError: .*homevit\.gone"),
        ("encoders", "SPEC = 'homevit.HomeViT'", "must be of type EncoderSpec, got type str"),
        ("families", home_file(), "must be of type FamilySpec, got type EncoderSpec"),
        ("encoders", home_file().replace("homevit.HomeViT", "timm.models.eva.Eva"), "Eva is known with other facts"),
    ],
)
def test_a_broken_spec_names_its_distribution(install, group, text, said):
    install("homevit", {"homevit.py": text}, **{group: "home = homevit:SPEC"})
    model = build("timm/vit-augreg")
    before = testing.snapshot(model)
    for _ in range(2):  # and again, when the first error was caught
        with pytest.raises(PluginError, match=said) as caught:
            saint.apply(model, saint.Saint())
        assert re.search(rf"entry point of homevit 1\.5, group saint\.{group}", str(caught.value))
    assert testing.snapshot(model) == before


@pytest.mark.parametrize("what", [HomeViT, home, "homevit.HomeViT", None, HOME.block_specs["HomeBlock"]])
def test_only_specs_can_be_registered(what):
    with pytest.raises(TypeError, match="expected an EncoderSpec or a FamilySpec"):
        saint.register(what)


@pytest.mark.parametrize("name", ["HomeViT", "homevit HomeViT", "", "homevit.", "homevit.HomeViT()"])
def test_a_class_is_named_by_module_and_class(name):
    with pytest.raises(ValueError, match=r"as package\.module\.Class; got"):
        saint.register(dataclasses.replace(HOME, encoder=name))


def test_a_class_has_one_spec():
    saint.register(HOME)
    with pytest.raises(ValueError, match=r"HomeViT is known with other facts already, as 'Home-made ViT'"):
        saint.register(dataclasses.replace(HOME, final=None))
    with pytest.raises(ValueError, match=r"Eva is known with other facts already"):
        saint.register(dataclasses.replace(HOME, encoder="timm.models.eva.Eva"))
    assert registry.encoders()[HOME.encoder] is HOME
    llava = next(spec for spec in registry.FAMILIES if spec.title == "LLaVA-1.5")
    saint.register(llava)
    with pytest.raises(ValueError, match=r"LlavaModel is known with other facts already, as 'LLaVA-1.5'"):
        saint.register(dataclasses.replace(llava, pixels=()))
    qwen = next(spec for spec in registry.FAMILIES if spec.title == "Qwen2-VL")
    other = dataclasses.replace(qwen.tower_spec, packed=False)
    with pytest.raises(ValueError, match="PretrainedModel is known with other facts"):
        saint.register(dataclasses.replace(qwen, model="mine.Model", tower_spec=other))
    assert "mine.Model" not in registry.families()  # nothing is half registered


def test_a_spec_of_a_refused_class_takes_its_refusal_away():
    assert "timm.models.cait.Cait" in registry.refused()
    saint.register(dataclasses.replace(HOME, encoder="timm.models.cait.Cait"))
    assert "timm.models.cait.Cait" not in registry.refused()
