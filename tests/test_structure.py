"""Rules about the code itself: lean import, import direction, one model per row, public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saint

SOURCE = Path(saint.__file__).parent

# what a module may import from the project, by the first part of its path
ALLOWED = {
    "errors": set(),
    "flops": set(),
    "graph": set(),
    "tokens": set(),
    "patch": set(),
    "methods": {"graph", "tokens", "errors", "methods"},
    "plan": {"methods", "plan", "presets", "records"},  # the last two when a plan is looked up or written
    "presets": {"methods", "plan"},
    "summary": {"methods", "plan", "tokens", "upstream", "vision"},
    "upstream": {"errors", "upstream"},
    "forwards": {"upstream"},
    "vision": {"graph", "tokens", "errors", "patch", "forwards", "upstream", "vision"},
    "language": {"graph", "tokens", "errors", "patch", "forwards", "upstream", "language"},
    "vlm": {"graph", "tokens", "errors", "patch", "forwards", "upstream", "vision", "language", "vlm"},
}
UPPER = {"bench", "eval", "view", "demo", "cli", "testing", "loading", "records"}


def project_imports(path: Path) -> set[str]:
    """First path parts of the project's modules that ``path`` imports, except for type checking."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(SOURCE).parts)
    found = set()
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        here = path.relative_to(SOURCE).parts[: depth - node.level]
        target = [*here, *(node.module.split(".") if node.module else [])]
        names = [target[0]] if target else [alias.name for alias in node.names]
        found.update(names)
    return found


def test_imports_point_one_way():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        imports = project_imports(path)
        if first in ALLOWED and imports - ALLOWED[first] - {first}:
            wrong.append(f"{path.relative_to(SOURCE)}: {sorted(imports - ALLOWED[first])}")
        if first == "session" and imports & UPPER:
            wrong.append(f"session.py: {sorted(imports & UPPER)}")
        if first in UPPER - {"cli"} and "cli" in imports:
            wrong.append(f"{path.relative_to(SOURCE)} imports cli")
    assert not wrong, wrong


@pytest.mark.parametrize(
    "statement", ["import saint", "import saint; saint.Plan; saint.Saint; saint.apply; saint.graph"]
)
def test_import_is_lean(statement):
    code = (
        f"import sys; {statement}; heavy = {{'timm', 'transformers', 'open_clip', 'onnx'}} & set(sys.modules); "
        "assert not heavy, heavy; "
        "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_of_the_package_loads_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, saint; assert 'torch' not in sys.modules, 'torch'"], check=True)


@pytest.mark.parametrize("name", [name for name in saint.__all__ if not name.startswith("__")])
def test_public_names_exist_and_are_documented(name):
    assert getattr(saint, name).__doc__


def test_no_module_shadows_a_public_name():
    lazy = {name for name, module in saint._LAZY.items() if module is not None}
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not lazy & modules  # importing the module would put it in the function's place


@pytest.mark.parametrize(
    "imports",
    [
        "import saint",
        "import saint.plan",
        "from saint.plan import Stage",
        "from saint import plan",
        "import saint.plan as plan; import saint; assert plan is saint.plan; assert plan.Plan is saint.Plan",
        "import saint; saint.apply; saint.recipes()",
    ],
)
def test_the_module_plan_is_the_function_plan_after_any_import(imports):
    code = (
        f"{imports}\nimport saint\n"
        "from saint.plan import Plan, Stage\n"
        "assert saint.plan('vit/published') == Plan(vision=saint.Saint(threshold=0.75))\n"
        "import saint.plan\n"
        "assert saint.plan('vit/tome').vision == Stage(saint.methods.ToMe(r=8), output='similar')\n"
        "assert saint.plan.Plan is Plan"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_raise():
    with pytest.raises(AttributeError, match="pruen"):
        getattr(saint, "pru" + "en")


def test_no_machine_or_session_leaks_into_the_tree():
    root = SOURCE.parents[1]
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    size = sum((root / f).stat().st_size for f in listing.stdout.split("\n") if f and (root / f).exists())
    assert size < 8_000_000, f"{size} bytes in git"
