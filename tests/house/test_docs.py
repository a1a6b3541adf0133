"""README and docs do what they say: every python block runs, every line of a shell is run or at least understood.

Stand-ins take the place of what would be downloaded: tiny random models of the real classes. A file's python blocks share one
namespace, as a reader would type them.
"""

import importlib.util
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, ViTConfig, ViTModel

import saint
from saint import presets
from saint.lab.cli import COMMANDS, app
from saint.lab.demo import small_llava
from saint.upstream import registry
from support.families import FAMILIES, prompts
from support.models import build
from support.pictures import movie

UsageError = typer.BadParameter.__base__  # click's, or that of the copy of click that newer releases of typer bring
ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(file: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(file.read_text()) if found == language]


PYTHON = [file for file in FILES if blocks(file, "python")]


_VIT = {
    "hidden_size": 48,  # real: 768
    "intermediate_size": 96,
    "num_hidden_layers": 6,  # real: 12
    "num_attention_heads": 3,
    "image_size": 96,
    "patch_size": 16,
}


def noise() -> Image.Image:
    return Image.effect_noise((60, 40), 80).convert("RGB")


class Words:
    """A processor of which only one prompt, and its decoding, are asked for."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs

    def __call__(self, images: Image.Image, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        assert text.count("<image>") == 1
        return self.inputs

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens.tolist()))


def namespace() -> dict[str, object]:
    """What a reader has before a block: a model, images, a plan."""
    family = FAMILIES["llava-llama"]
    vlm = family.build()
    inputs = prompts(family, vlm, [[3, "0", 4]])
    plan = saint.Plan(connector=saint.SaintFullGraph(keep=0.5))

    def my_inputs(prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return {name: tensor[: len(prompts)] for name, tensor in inputs.items()}

    return {
        "vit": build("timm/vit-augreg"),
        "model": ViTModel(ViTConfig(**_VIT)).eval(),
        "images": torch.randn(2, 3, 96, 96),
        "vlm": vlm,
        "inputs": inputs,
        "video_vlm": FAMILIES["qwen3-vl"].build(),
        "video_inputs": movie("qwen3-vl", [(4, 8, 8)]),
        "processor": Words(inputs),
        "image": noise(),
        "plan": plan,
        "my_inputs": my_inputs,
    }


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.name)
def test_python_blocks_run(file, tmp_path, monkeypatch):
    import timm

    (tmp_path / "photos").mkdir()
    for i in range(3):
        noise().save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_tables", registry._Tables())  # what a block registers is gone behind it
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: real("test_vit"))
    # the recipes of LLaVA-1.5 name layers of 24 and 32; the stand-in has a few
    half = saint.SaintFullGraph(keep=0.5)
    small = presets.Recipe(saint.Plan(vision=saint.Stage(half, layers=[1]), language=saint.Stage(half, layers=[1])), "")
    recipes = {name: small if name.startswith("llava-1.5/") else recipe for name, recipe in presets._RECIPES.items()}
    monkeypatch.setattr(presets, "_RECIPES", recipes)
    monkeypatch.setattr(small_llava, "load", lambda: small_llava.blank().eval())  # the real one's tower is fetched
    scope = namespace()
    processor = Words(scope["inputs"])
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: FAMILIES["llava-llama"].build()
    )
    if file.name == "evaluation.md":
        scope["plan"] = saint.Plan(vision=saint.Saint(keep=0.5))
    for number, code in enumerate(blocks(file, "python"), 1):
        if "evaluate_vqa" in code:
            scope |= {"model": scope["vlm"], "plan": saint.Plan(connector=saint.SaintFullGraph(keep=0.5))}
        exec(compile(code, f"{file.name}, python block {number}", "exec"), scope)
    for model in (scope["vit"], scope["model"]):
        assert saint.status(model) is None, "a block leaves a plan applied"


def make_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    return tables


TABLES = make_tables()


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, parts in TABLES.PARTS.items() for name in parts])
def test_generated_parts_are_those_of_specs_and_records(page, name):
    text = (ROOT / page).read_text()
    assert TABLES.replace(text, name, TABLES.PARTS[page][name]()) == text, "run `make tables`"


def test_every_generated_part_is_known():
    """A part that is marked as generated is one that `make tables` writes."""
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in FILES
        for name in re.findall(r"<!-- (\w+): generated by make tables -->", file.read_text())
    }
    assert found == {(page, name) for page, parts in TABLES.PARTS.items() for name in parts}


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8000
    assert "visual tokens, not weights" in text.splitlines()[0]
    assert "make test" in "\n".join(blocks(ROOT / "README.md", "bash"))
    for _, target in re.findall(r"\[([^\]]*)\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_the_architecture_is_short_and_names_what_there_is():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert len(text.split()) <= 2000
    (picture,) = (code for language, code in BLOCK.findall(text) if language == "" and "lab     src" in code)
    core, lab = picture.split("lab     src/saint/lab/")
    for part, folder in ((core, ROOT / "src" / "saint"), (lab, ROOT / "src" / "saint" / "lab")):
        named = [word for line in part.splitlines()[1:] for word in re.findall(r"[a-z_]+(?:/|\.py)(?= |$)", line[:50])]
        assert len(named) > 10
        assert [name for name in named if not (folder / name).exists()] == []


def test_hints_install_from_a_checkout():
    """There is no release in the index, and whoever takes the name there would be installed."""
    texts = [*FILES, *(ROOT / "src").rglob("*.py")]
    assert [file for file in texts if re.search(r"pip install[^\n]*saint-vlm", file.read_text())] == []


# -- help(saint) ------------------------------------------------------------------------------------------------------


def test_help_is_short_and_begins_with_an_example():
    lines = pydoc.render_doc(saint, renderer=pydoc.plaintext).splitlines()
    assert len(lines) <= 500
    assert ">>> import saint" in "\n".join(lines[:10])


def test_help_names_every_public_name():
    words = set(re.findall(r"\w+", saint.__doc__))
    kinds = {name for name in dir(saint) if name.endswith("Error")} - {"SaintError"}  # told by their base
    assert set(dir(saint)) - {"__version__"} - kinds <= words
    assert set(saint.__all__) <= set(dir(saint))


# -- shells -----------------------------------------------------------------------------------------------------------

# what works without a network and in seconds is run, by its first words
OFFLINE = ("saint list", "saint env", "saint --help", "python -m saint.lab.demo.scenes")


def commands(file: Path) -> list[str]:
    """Lines of the shell blocks, without comments, variables filled in."""
    found: list[str] = []
    values: dict[str, str] = {}
    for code in blocks(file, "bash") + blocks(file, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), line), comments=True)
            if not words:
                continue
            if len(words) == 1 and re.match(r"^\w+=", words[0]):
                name, _, values[name] = words[0].partition("=")
                continue
            found.append(shlex.join(words))
    return found


SHELL = [pytest.param(line, id=f"{file.name}: {line[:60]}") for file in FILES for line in commands(file)]
INLINE = [
    pytest.param(line, id=f"{file.name}: `{line[:60]}`")
    for file in FILES
    for line in re.findall(r"`((?:saint|python -m saint)[^`\n]*)`", BLOCK.sub("", file.read_text()))
    if re.match(r"(saint (?!check MODEL|--)\w+( |$))|(python -m saint\.)", line)
]


def parse(words: list[str]) -> None:
    """Hand ``words`` to the command line without running anything.

    Raises:
        UsageError: no such command or option, or an argument too few or too many.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("saint", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", [*SHELL, *INLINE])
def test_shell_lines_are_understood(line, tmp_path):
    words = shlex.split(line)
    if words[0] == "saint":
        if len(words) == 2 and line not in ("saint list", "saint env", "saint demo"):  # a command's name in a sentence
            assert words[1] in COMMANDS
        elif line != "saint eval":
            parse([word for word in words[1:] if word != "..."])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif "saint.lab.cli" in words:
        parse(
            [word for word in words[words.index("saint.lab.cli") + 1 :] if word != "..."]
            if "..." not in words
            else ["list"]
        )
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).exists()
    else:
        assert words[:2] in (["pip", "install"], ["python", "-m"], ["accelerate", "launch"])


@pytest.mark.parametrize(
    "line", sorted({p.values[0] for p in SHELL if p.values[0].startswith(OFFLINE)} | set(OFFLINE[:3]))
)
def test_shell_lines_that_need_no_network_run(line, tmp_path):
    words = shlex.split(line)
    if words[0] == "saint":
        words = ["python", "-m", "saint", *words[1:]]
    words = [re.sub(r"^50$", "2", word) for word in words]  # fewer scenes
    done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_lines_are_found():
    """The tests above see what is in the files."""
    lines = [p.values[0] for p in SHELL]
    assert any(line.startswith("saint eval vqa") for line in lines)
    assert any("pretrained=llava-hf/llava-1.5-7b-hf,plan" in line for line in lines)
    assert len(lines) > 20
    assert sum(len(blocks(file, "python")) for file in FILES) >= 6
    with pytest.raises(UsageError):
        parse(["bench", "timm:x", "--sise", "3"])
    with pytest.raises(UsageError):
        parse(["check"])
