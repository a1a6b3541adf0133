"""Rules about the code itself: lean import, import direction, tables that load no library, public names."""

import ast
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

import saint

SOURCE = Path(saint.__file__).parent
ROOT = Path(__file__).parents[2]

# the core: what a module may import from the project, by the first part of its path; none of the lab
CORE = {
    "errors": set(),
    "extras": {"errors"},
    "files": set(),
    "flops": set(),
    "order": set(),
    "patch": set(),
    "samples": set(),
    "graph": {"gathers", "order"},
    "frames": {"graph"},
    "copies": {"frames"},
    "grids": set(),
    "greedy": {"graph", "tokens"},
    "kernels": set(),
    "operators": {"graph", "kernels", "tokens"},  # kernels when the first of them runs
    "tokens": {"order"},
    "gathers": {"tokens"},
    "plugins": {"errors"},
    "methods": {"copies", "frames", "graph", "greedy", "grids", "needs", "operators", "tokens", "errors", "plugins"},
    "plans": {"methods", "needs", "presets", "files"},  # the last two when a plan is looked up or written
    "presets": {"methods", "plans"},
    "summary": {"methods", "plans", "tokens", "upstream", "vision", "runtime", "work"},
    "work": {"methods", "plans", "runtime", "upstream"},
    "models": set(),
    "needs": set(),
    "planning": {
        "errors",
        "methods",
        "models",
        "plans",
        "session",
        "tokens",
        "upstream",
        "vision",
        "language",
        "vlm",
        "work",
    },
    "upstream": {"errors", "plugins"},
    "runtime": {"needs", "tokens", "gathers", "errors", "patch", "upstream"},
    "vision": {"frames", "graph", "grids", "needs", "tokens", "gathers", "errors", "patch", "runtime", "upstream"},
    "language": {"needs", "tokens", "gathers", "errors", "patch", "runtime", "upstream", "work"},
    "vlm": {"frames", "tokens", "gathers", "errors", "patch", "runtime", "upstream", "vision", "language"},
    "admission": {"errors", "files", "upstream", "testing"},  # the last when a model is proved: contracts apply plans
    "assemble": {
        "admission",
        "errors",
        "methods",
        "needs",
        "plans",
        "runtime",
        "tokens",
        "upstream",
        "vision",
        "language",
        "vlm",
    },
    "session": {
        "errors",
        "gathers",
        "patch",
        "plans",
        "methods",
        "summary",
        "tokens",
        "assemble",
        "models",
        "planning",
        "presets",
        "runtime",
        "upstream",
    }
    | {"vision", "language", "vlm"},
    "freezing": {"methods", "plans", "samples", "session", "tokens"},
    "testing": {
        "admission",
        "errors",
        "files",
        "flops",
        "grids",
        "methods",
        "plans",
        "session",
        "tokens",
        "upstream",
        "runtime",
        "vision",
        "language",
    }
    | {"vlm"},
    "backends": {"errors", "extras", "methods", "plans", "session", "tokens", "upstream", "vision", "vlm"},
}
# the lab: a package and what it may import of the others here, besides all of the core
LAB = {
    "images": set(),
    "records": set(),
    "answers": set(),  # in words, against references
    "describe": {"report"},
    "variants": set(),
    "bench": {"records", "variants"},
    "demo": {"images", "records"},
    "loading": {"demo", "images"},
    "sources": {"answers", "images", "loading"},
    "kinds": {"bench", "demo", "images", "loading", "sources"},  # the only rooms that know which kind of model it is
    "view": {"describe", "images", "kinds", "records", "report", "sources"},
    "eval": {"answers", "images", "kinds", "loading", "records", "sources", "variants"},
    "analysis": {"bench", "describe", "eval", "images", "kinds", "records", "sources"},
    "tuning": {"analysis", "bench", "eval", "kinds", "records", "variants"},
    "embed": {"eval", "images", "kinds", "records", "sources"},
    "report": {"images", "records"},  # reads records; loads no model
    "ui": {"bench", "demo", "describe", "images", "kinds", "loading", "records", "report", "sources", "view"},
    "cli": {
        "analysis",
        "bench",
        "demo",
        "describe",
        "embed",
        "eval",
        "images",
        "kinds",
        "loading",
        "records",
        "report",
        "sources",
        "tuning",
        "ui",
        "variants",
        "view",
    },
}
ORACLE = {
    "errors", "plans", "session", "tokens", "upstream/names", "upstream/specs", "testing/hiding", "testing/outputs",
    "testing/smaller",
}  # fmt: skip
# rooms of packages that stand alone: all that they may import, also of their own package
ROOMS = {
    "lab/eval/compare": {"extras"},  # formulas on numbers; nothing that loads a model
    "lab/answers": {"extras"},
    "lab/eval/scores": {"extras"},
    "lab/eval/journal": {"errors", "lab/records"},
    "lab/eval/loop": {"errors", "extras", "lab/records", "lab/sources/items", "lab/eval/journal"},
    "lab/eval/report": {"plans", "session", "lab/sources/items", "lab/eval/compare"},
    "lab/sources/items": set(),
    "lab/sources/samples": {
        "extras",
        "lab/images",
        "lab/loading/failures",
        "lab/sources/items",
        "lab/sources/listing",
        "lab/sources/shards",
    },
    "lab/sources/questions": {"lab/answers", "lab/images", "lab/sources/items", "lab/sources/listing"},
    "lab/analysis/similarity": {"graph"},  # formulas, here and in the next four
    "lab/analysis/attention": {"runtime/rows"},
    "lab/analysis/geometry": set(),
    "lab/analysis/bootstrap": set(),
    "lab/analysis/stages": {"lab/analysis/bootstrap"},
    "lab/bench/timing": set(),
    "lab/tuning/knapsack": set(),
    "lab/demo/scenes": {"files", "lab/records", "lab/demo/pictures"},
    "lab/loading/failures": {"errors"},
    "lab/sources/listing": {"lab/images"},
    "lab/sources/photos": {"lab/images", "lab/sources/listing"},
    "lab/loading/plans": {"methods/base", "plans"},
    "lab/sources/shards": {"lab/sources/listing"},
    "lab/embed/sources": {
        "extras",
        "lab/images",
        "lab/sources/listing",
        "lab/sources/shards",
    },  # lists and reads; loads no model
    "lab/embed/parts": {"errors", "files", "extras", "lab/records", "lab/embed/sources"},
    "lab/report/blocks": {"lab/report/words"},  # what sheets are made of
    "lab/report/charts": {"lab/report/blocks", "lab/report/markup", "lab/report/words"},  # from numbers to pictures
    "lab/report/markup": {"lab/report/blocks", "lab/report/words"},
    "lab/report/words": set(),
    "lab/report/terminal": {"lab/report/blocks", "lab/report/charts", "lab/report/words"},
    "lab/report/markdown": {"lab/report/blocks", "lab/report/words"},
    "lab/report/reading": {"lab/records"},
    "lab/ui/guard": set(),  # reads headers and sizes, before anything else sees a request
    "lab/ui/asking": {"lab/images", "lab/loading/plans", "methods", "plans", "presets", "lab/ui/guard"},
    "testing/outputs": set(),
    # the oracles know where things are, and what a pruned forward dropped; they share no code with the pruning path
    "testing/hiding": {"upstream/specs"},
    "testing/smaller": {"grids", "plans", "upstream/names", "upstream/specs", "testing/hiding"},
    "testing/oracle": {
        *ORACLE,
        "language/locate",
        "language/layers",
        "vision/derive",
        "vision/locate",
        "vlm/locate",
        "upstream/verify",
    },
    "testing/removal": {*ORACLE, "vlm/locate", "testing/oracle"},
    # the halves of a block are composed as there, which is held against the block's own forward when a plan is applied
    "testing/merging": {*ORACLE, "vision/locate", "runtime/blocks", "testing/blocks"},
    "lab/view/overlay": {"files", "lab/records"},
}


def module_name(path: Path) -> str:
    """Path inside the package without its ending: "lab/eval/compare"."""
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def relative_imports(path: Path):
    """Imports of the project's own modules, except for type checking: (module, imported name, name it gets)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(SOURCE).parts)
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        here = path.relative_to(SOURCE).parts[: depth - node.level]
        target = "/".join([*here, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            yield target, alias.name, alias.asname or alias.name


def imported_modules(path: Path) -> set[str]:
    """The project's modules that ``path`` imports, or imports from."""
    found = set()
    for target, name, _ in relative_imports(path):
        whole = f"{target}/{name}".lstrip("/")
        is_module = (SOURCE / f"{whole}.py").exists() or (SOURCE / whole).is_dir()
        found.add(whole if is_module else target)
    return found - {""}


def rooms_imported(path: Path) -> set[str]:
    """First path parts of the project's modules that ``path`` imports, except for type checking; of the lab "lab/eval"."""
    return {room(module) for module in imported_modules(path)}


def room(module: str) -> str:
    """The part of the house that a module is in."""
    parts = module.split("/")
    return "/".join(parts[: 2 if parts[0] == "lab" else 1])


def test_imports_point_one_way():
    wrong = []
    allowed = CORE | {f"lab/{name}": {*CORE, *(f"lab/{other}" for other in others)} for name, others in LAB.items()}
    for path in SOURCE.rglob("*.py"):
        here = room(module_name(path))
        if here not in ("__init__", "__main__", "lab/__init__") and (
            extra := rooms_imported(path) - allowed[here] - {here}
        ):
            wrong.append(f"{path.relative_to(SOURCE)}: {sorted(extra)}")
    assert not wrong, wrong


def test_which_kind_of_model_it_is_is_known_in_one_place():
    """Everywhere else in the lab a subject is asked."""
    wrong = []
    for path in (SOURCE / "lab").rglob("*.py"):
        name = module_name(path)
        if name.startswith("lab/kinds"):
            continue
        found = imported_modules(path) & {"vlm/locate", "language/locate", *KINDS}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typed = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node)}
        froms = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and "kinds" in str(node.module) and id(node) not in typed
        ]
        names = {alias.name for node in froms for alias in node.names}
        wrong += [f"{name}: {one}" for one in found | names & {"Encoder", "VLM", "Text"}]
    assert not wrong, wrong


KINDS = {"lab/kinds/encoder", "lab/kinds/vlm", "lab/kinds/text", "lab/kinds/generating"}


def test_the_core_needs_torch_and_numpy_alone():
    """Other libraries are imported where a model of theirs is at hand, or behind an extra."""
    wrong = []
    known = {"saint", "torch", "numpy", "transformers", *sys.stdlib_module_names}
    for path in SOURCE.rglob("*.py"):
        name = module_name(path)
        if name.startswith(("lab/", "backends/")) or name == "kernels":  # run on CUDA alone, where torch brings Triton
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{name}: {n}" for n in names if n.partition(".")[0] not in known | {"timm", "open_clip"}]
    assert not wrong, wrong


LINES, PARAMETERS = 80, 10


def test_functions_of_the_core_are_short_and_ask_for_little():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        if (name := module_name(path)).startswith("lab/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                asked = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in asked)
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES or count > PARAMETERS:
                    wrong.append(f"{name}: {node.name} has {lines} lines and {count} parameters")
    assert not wrong, wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_that_stand_alone_import_only_what_their_row_says(room):
    extra = imported_modules(SOURCE / f"{room}.py") - ROOMS[room]
    assert not extra, f"{room}: {sorted(extra)}"


def test_no_module_takes_a_private_name_of_another():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        here = module_name(path)
        modules = set()
        for target, name, given in relative_imports(path):
            whole = f"{target}/{name}".lstrip("/")
            if (SOURCE / f"{whole}.py").exists() or (SOURCE / whole).is_dir():
                modules.add(given)
                if target == here.rpartition("/")[0]:
                    continue  # a private module is its package's
            if name.startswith("_") and not name.endswith("__"):
                wrong.append(f"{here}: from {target} import {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                private = node.attr.startswith("_") and not node.attr.endswith("__")
                wrong += [f"{here}: {node.value.id}.{node.attr}"] if private else []
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


def test_the_tables_and_a_lookup_load_no_library():
    """Specs are read by class name, and builders of tiny models import their library when called."""
    code = (
        "import sys, torch; from saint.upstream import registry; from saint.vision import locate; "
        "assert locate.find(torch.nn.Linear(2, 2)) == [] and registry.families(); "
        "assert all(spec.tiny for spec in registry.ENCODERS + registry.FAMILIES); "
        "heavy = {'timm', 'transformers', 'open_clip'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_of_the_package_loads_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, saint; assert 'torch' not in sys.modules, 'torch'"], check=True)


def test_the_core_works_where_the_lab_cannot():
    """A plain install has torch and numpy; the command and what measures say what they lack."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'rich', 'typer', 'timm', 'transformers', 'open_clip'): sys.modules[name] = None\n"
        "import pydoc, saint, saint.testing\n"
        "assert 'pruned(' in pydoc.render_doc(saint)\n"
        "assert saint.Plan.from_dict(saint.plan('vit/match').to_dict()) == saint.plan('vit/match')\n"
        "assert saint.freeze and saint.apply\n"
        "try: saint.tune\n"
        "except ImportError as error: assert '.[lab]' in str(error), error\n"
        "else: raise AssertionError('the lab was there')\n"
        "sys.argv = ['saint', 'list']\n"
        "import saint.__main__\n"
        "saint.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("saint: ")
    assert ".[lab]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in dir(saint) if not name.startswith("__")])
def test_public_names_exist_and_are_documented(name):
    assert getattr(saint, name).__doc__


# what these packages gather from their rooms, for others to import
GATHERED = {
    "saint.testing": "CONTRACTS Inputs Result check_bad_input check_batch check_identity check_model check_on check_oracle "
    "check_undo example_inputs example_plan masked_oracle merged_oracle outcomes run snapshot tensors",
    "saint.lab.loading": "DownloadError FORMS UnsafeCheckpointError read_plan",
    "saint.lab.kinds": "Encoder Given Subject Text VLM answering around kind_of",
}


@pytest.mark.parametrize("package", GATHERED)
def test_packages_of_rooms_keep_their_names(package):
    module = importlib.import_module(package)
    for name in GATHERED[package].split():
        value = getattr(module, name)
        assert not isinstance(value, types.ModuleType), f"{package}.{name} is shadowed by a room of that name"
        assert not callable(value) or value.__doc__, name


def test_type_checkers_are_told_of_every_method():
    block = next(
        node for node in ast.parse((SOURCE / "methods/__init__.py").read_text()).body if isinstance(node, ast.If)
    )
    told = {(node.module, alias.asname) for node in block.body for alias in node.names}
    known = {name: saint.methods.get(name) for name in saint.methods.names()}
    assert told == {(name, cls.__name__) for name, cls in known.items()}
    assert all(getattr(saint.methods, cls.__name__) is cls for cls in known.values())


def test_listing_the_methods_shows_them_and_nothing_that_is_imported():
    own = {saint.methods.get(name).__name__ for name in saint.methods.names()}
    assert set(dir(saint.methods)) == {*own, "Method", "base", "from_dict", "get", "names"}
    assert all(getattr(saint.methods, name) for name in dir(saint.methods))


def test_docstrings_of_functions_begin_with_a_verb():
    """What a function does comes first, so none begins with the question that it answers."""
    questions = {"How", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"}
    wrong = [
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
        and text.split()[0] in questions
    ]
    assert not wrong, wrong


def test_no_module_shadows_a_public_name():
    lazy = saint._LAZY.keys() - {"graph", "methods", "testing"}  # these are the modules of their names
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not lazy & modules  # importing the module would put it in the function's place


def test_unknown_attributes_raise():
    with pytest.raises(AttributeError, match="pruen"):
        getattr(saint, "pru" + "en")


def test_no_machine_or_session_leaks_into_the_tree():
    root = SOURCE.parents[1]
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [root / f for f in listing.stdout.split("\n") if f and (root / f).exists()]
    weights = {file for file in files if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".npz", ".onnx"}}
    assert sum(file.stat().st_size for file in weights) < 8_000_000
    large = {str(file): size for file in files if file not in weights and (size := file.stat().st_size) > 200_000}
    assert not large, "datasets and generated reports do not belong here"


SCRIPTS = [
    path for folder in ("evidence", "benchmarks", "docs", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_what_there_is(script):
    """No test runs most of them, so what they import is looked up."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saint":
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert there, f"{script.name}:{node.lineno}: {node.module} has no {alias.name}"


def test_no_test_imports_a_test():
    """What tests share lives in ``tests/support``: a file of tests can be moved, split or run alone."""
    tests = Path(__file__).parents[1]
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.rpartition(".")[2].startswith("test_")], f"{path.name}:{node.lineno}"
