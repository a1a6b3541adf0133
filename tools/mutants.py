"""Mutation testing: small errors are put into the source, one at a time, and the tests of that file must notice.

``python tools/mutants.py`` runs what is not in ``.mutants/results.jsonl`` yet (resumable; ``--minutes``, ``--only graph``) and
writes the table of ``docs/testing.md``. Mutants of a file are tried in a fixed random order, so a run that was cut short is a
fair sample. The heavy libraries are imported once; each mutant is a forked process in which one module of ``saint`` has other
source. Nothing on disk is changed. Survivors that cannot be told from the original are named in ``tools/equivalent.json``.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".mutants" / "results.jsonl"
EQUIVALENT = ROOT / "tools" / "equivalent.json"
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants -->", "<!-- /mutants -->"

# source file -> the tests that cover it, the quickest to notice first
TESTS = {
    "graph": "test_properties.py test_graph.py",
    "tokens": "test_properties.py test_tokens.py",
    "gathers": "test_properties.py test_tokens.py",
    "assemble": "test_placements.py test_vlm_session.py",
    "summary": "test_session.py::test_a_session_prints_what_is_applied test_session.py::test_summary_of_an_encoder "
    "test_session.py::test_summary_of_a_ragged_batch test_session.py::test_flops_left_are_those_that_run "
    "test_session.py::test_flops_that_are_not_known_are_said_to_be_unknown "
    "test_session.py::test_flops_left_of_a_tower_that_joins_patches "
    "test_session.py::test_flops_of_a_matrix_that_no_linear_layer_holds_are_not_known "
    "test_session.py::test_summary_of_a_vision_language_model test_session.py::test_summary_without_a_language_stage",
    "plugins": "test_plugins.py",
    "upstream/registry": "test_plugins.py test_plugins_vlm.py",
    "runtime/blocks": "test_encoders.py::test_what_is_scored_is_what_attention_received "
    "test_encoders.py::test_a_changed_block_is_an_error_not_a_wrong_number "
    "test_encoders.py::test_keys_that_never_appear_are_an_error test_encoders.py::test_ragged_batches_without_masks "
    "test_scored.py",
    "runtime/forwards": "test_forwards.py",
    "methods/match": "test_match.py",
    "runtime/layer": "test_guards.py test_scored.py test_placements.py",
    "runtime/deciding": "test_guards.py test_scored.py test_placements.py",
    "runtime/points": "test_guards.py test_scored.py test_placements.py",
    "runtime/attended": "test_observe_layers.py",
    "runtime/observe": "test_placements.py::test_observers_of_an_encoder test_placements.py::test_a_plan_that_only_observes "
    "test_placements.py::test_observing_a_vision_language_model test_placements.py::test_layers_an_observer_asks_for "
    "test_placements.py::test_stages_in_which_the_plan_drops_nothing_are_shown_where_layers_are_named "
    "test_placements.py::test_who_derives_from_observer_pays_only_for_what_he_defines test_bench_figures.py",
    "runtime/state": "test_properties.py test_scored.py test_placements.py test_encoders.py::test_full_length_outputs",
    "vision/checks": "test_encoders.py::test_unknown_blocks_are_refused "
    "test_encoders.py::test_where_attention_and_mlp_are_one_there_is_no_middle "
    "test_encoders.py::test_meta_weights_are_refused_and_nothing_is_touched "
    "test_encoders.py::test_a_changed_block_is_an_error_not_a_wrong_number "
    "test_encoders.py::test_ragged_batches_without_masks test_tome.py test_modes.py",
    "vision/encoder": "test_modes.py test_tome.py test_encoders.py::test_ragged_batches_without_masks test_scored.py",
    "vision/guard": "test_guard.py",
    "vision/inputs": "test_modes.py test_scored.py test_encoders.py::test_patches_of_pictures_of_several_shapes",
    "vision/locate": "test_plugins.py test_encoders.py::test_unknown_models_hear_what_was_looked_for "
    "test_encoders.py::test_two_encoders_ask_which "
    "test_encoders.py::test_architectures_without_global_tokens_are_refused_by_name",
    "vision/outputs": "test_modes.py test_scored.py test_encoders.py::test_full_length_outputs test_vlm_towers.py",
    "vision/readers": "test_readers.py",
    "language/cache": "test_cache_properties.py",
    "language/doorway": "test_doorway.py test_vlm_generate.py",
    "language/generation": "test_doorway.py",
    "language/logical": "test_doorway.py test_vlm_generate.py",
    "language/shortening": "test_doorway.py test_vlm_generate.py",
    "language/masks": "test_cache_properties.py test_placements.py::test_merging_in_a_language_model",
    "language/prompt": "test_text.py",
    "language/positions": "test_cache_properties.py",
    "language/attention": "test_scored.py test_language.py",
    "language/decoder": "test_scored.py test_language.py test_placements.py",
    "methods/base": "test_properties.py test_plan.py",
    "methods/saint": "test_properties.py test_plan.py",
    "methods/saint_full_graph": "test_properties.py test_plan.py",
    "methods/tome": "test_properties.py test_tome.py::test_bad_settings_name_the_value",
    "methods/pitome": "test_pitome.py",
    "methods/saint_video": "test_vlm_videos.py",
    "methods/evs": "test_vlm_videos.py",
    "frames": "test_vlm_videos.py",
    "vlm/merged": "test_doorway.py",
    "vlm/videos": "test_vlm_videos.py",
    "methods/random": "test_properties.py test_baselines.py::test_random_is_a_function_of_seed_drop_point_and_index "
    "test_baselines.py::test_bad_settings_name_the_value",
    "methods/grid": "test_properties.py test_baselines.py::test_grid_of_ragged_samples",
    "methods/divprune": "test_properties.py test_baselines.py::test_divprune_is_the_recipe",
    "methods/fastv": "test_properties.py",
    "bench/timing": "test_bench_figures.py test_bench.py::test_rounds_are_paired_and_their_order_alternates",
    "bench/agreement": "test_bench_figures.py::test_agreement_is_cosine_or_correlation "
    "test_bench.py::test_agreement_of_vectors_and_maps",
    "bench/cost": "test_bench_figures.py",
    "bench/encoder": "test_bench_figures.py test_bench.py",
    "bench/generation": "test_bench_figures.py test_bench_generation.py",
    "eval/compare": "test_eval_figures.py test_eval_compare.py",
    "eval/scores": "test_eval_figures.py test_eval_images.py::test_linear_probe_learns_and_is_tested_on_others",
    "eval/report": "test_eval_figures.py",
}

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.MatMult: ast.Add,
}  # fmt: skip
# names of functions and methods that stand for one another
_CALLS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "argmax": "argmin",
    "argmin": "argmax", "amax": "amin", "amin": "amax", "zeros": "ones", "ones": "zeros", "clamp_min": "clamp_max",
    "median": "fmean", "sum": "mean", "mean": "sum", "zeros_like": "ones_like", "ones_like": "zeros_like",
}  # fmt: skip

_SYMMETRIC = {"min", "max", "maximum", "minimum", "promote_types"}  # exchanging their arguments changes nothing
_UNREAD = {
    "repr",
    "compare",
    "default_factory",
    "stacklevel",
    "strict",
    "device",
}  # keywords without which nothing differs on a CPU


@dataclass(frozen=True)
class Mutant:
    """One error: the source with it, and what was there before."""

    file: str
    line: int
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.before} -> {self.after}"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _COMPARE:
            other = copy.deepcopy(node)
            other.ops[0] = _COMPARE[type(op)]()
            yield other
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            other = copy.deepcopy(node)
            other.op = _ARITHMETIC[type(op)]()
            yield other
        case ast.BoolOp(op=op):
            other = copy.deepcopy(node)
            other.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield other
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.IfExp():
            yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Attribute(attr=name)) if name in _CALLS:
            other = copy.deepcopy(node)
            other.func.attr = _CALLS[name]  # type: ignore[attr-defined]
            yield other
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            other = copy.deepcopy(node)
            other.func = ast.Name(_CALLS[name], ast.Load())
            yield other
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.If():
            other = copy.deepcopy(node)
            other.test = ast.UnaryOp(ast.Not(), other.test)
            yield other
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func).rpartition(".")[2]
        if (
            len(node.args) >= 2
            and function not in _SYMMETRIC
            and not any(isinstance(a, ast.Starred) for a in node.args)
        ):
            other = copy.deepcopy(node)
            other.args[0], other.args[1] = other.args[1], other.args[0]
            yield other
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in _UNREAD:
                other = copy.deepcopy(node)
                del other.keywords[index]
                yield other


def _skipped(node: ast.AST) -> bool:
    """Messages, annotations and assertions: nothing that a test should look at letter by letter."""
    return isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.Import, ast.ImportFrom)) and not (
        isinstance(node, ast.AnnAssign) and node.value is not None
    )


class _Walk(ast.NodeVisitor):
    """Places where something can be changed: (parent, field, index, node)."""

    def __init__(self) -> None:
        self.places: list[tuple[ast.AST, str, int | None, ast.AST]] = []

    def generic_visit(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_comment") or _skipped(node):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg in _UNREAD):
                    self.places.append((node, field, index, child))
                    self.visit(child)


def mutants(file: str) -> list[Mutant]:
    """All mutants of ``src/saint/<file>.py``, in an order that is always the same."""
    text = (ROOT / "src" / "saint" / f"{file}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    walk = _Walk()
    walk.visit(tree)
    made: dict[str, Mutant] = {}
    for parent, field, index, node in walk.places:
        for other in _changes(node):
            _put(parent, field, index, ast.copy_location(other, node))
            source = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)
            before, after = _short(node), _short(other)
            if before != after and source not in made:
                made[source] = Mutant(file, getattr(node, "lineno", 0), before, after, source)
    found = sorted(made.values(), key=lambda m: (m.line, m.name))
    random.Random(0).shuffle(found)
    return found


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _short(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 100 else text[:97] + "..."


# -- running ------------------------------------------------------------------------------------------------------------


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        exec(compile(self.source, str(self.path), "exec"), vars(module))


def warm() -> None:
    """Import what every test needs, and nothing of ours."""
    import open_clip  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("LlavaForConditionalGeneration", "CLIPVisionModel", "Qwen2Config"):
        getattr(transformers, name)
    assert not any(name.partition(".")[0] == "saint" for name in sys.modules)


def attempt(module: str, path: Path, source: str, tests: list[str], limit: float) -> str:
    """ "killed", "slow" (over the limit) or "survived"."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        if not os.environ.get("MUTANTS_SHOW"):
            os.dup2(null, 1), os.dup2(null, 2)
        sys.meta_path.insert(0, _Replaced(module, path, source))
        sys.path.insert(0, str(ROOT / "src"))
        os.chdir(ROOT)
        import hypothesis
        import pytest

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # the smallest example is of no interest here
        hypothesis.settings.register_profile("mutants", phases=phases)
        hypothesis.settings.load_profile("mutants")
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
        os._exit(int(code))
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 5:
                raise SystemExit(f"pytest finds none of {tests}")
            return "survived" if code == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "slow"


def key(mutant: Mutant, tests: list[str]) -> str:
    """Changes with the source and the mutant, not with the tests: survivors are tried again on request."""
    return hashlib.sha256(f"{mutant.file}\n{mutant.source}".encode()).hexdigest()[:16]


def known() -> dict[str, dict[str, object]]:
    """Results so far, by key."""
    if not RESULTS.exists():
        return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def run(only: list[str], minutes: float, limit: float, again: bool) -> None:
    """Try what has no result yet, file by file in turn."""
    done = known()
    RESULTS.parent.mkdir(exist_ok=True)
    if again:
        done = {k: v for k, v in done.items() if v["outcome"] != "survived"}
    files = [file for file in TESTS if not only or any(word in file for word in only)]
    waiting = {file: [m for m in mutants(file) if key(m, []) not in done] for file in files}
    warm()
    end = time.monotonic() + 60 * minutes
    seconds: dict[str, float] = {}
    while any(waiting.values()) and time.monotonic() < end:
        for file in files:
            if not waiting[file] or time.monotonic() > end:
                continue
            tests, path = TESTS[file].split(), ROOT / "src" / "saint" / f"{file}.py"
            module = "saint." + file.replace("/", ".")
            if file not in seconds:
                start = time.monotonic()
                if attempt(module, path, path.read_text(encoding="utf-8"), tests, 600) != "survived":
                    raise SystemExit(f"the tests of {file} fail without any error in it: {' '.join(tests)}")
                seconds[file] = time.monotonic() - start
            mutant = waiting[file].pop(0)
            outcome = attempt(module, path, mutant.source, tests, max(limit, 4 * seconds[file]))
            entry = {
                "key": key(mutant, tests), "file": file, "line": mutant.line, "before": mutant.before, "after": mutant.after,
                "outcome": outcome,
            }  # fmt: skip
            with RESULTS.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")
            print(f"{outcome:9} {file}:{mutant.line} {mutant.before} -> {mutant.after}", flush=True)


def report() -> str:
    """The table of ``docs/testing.md``: of the mutants of today's source."""
    done = known()
    same = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else []
    reasons = {(e["file"], e["before"], e["after"]): e["reason"] for e in same}
    rows = ["| file | mutants | tried | noticed | equivalent | unnoticed |", "|---|---:|---:|---:|---:|---:|"]
    names: list[str] = []
    open_: list[str] = []
    sums = [0] * 5
    for file in TESTS:
        all_of = mutants(file)
        tried = [done[k] | {"mutant": m} for m in all_of if (k := key(m, [])) in done]
        alive = [e for e in tried if e["outcome"] == "survived"]
        excused = [e for e in alive if (file, e["before"], e["after"]) in reasons]
        for e in alive:
            what = f"`{file}.py`: `{e['before']}` → `{e['after']}`".replace("|", "\\|")
            if e in excused:
                names.append(f"- {what}: {reasons[file, e['before'], e['after']]}")
            else:
                open_.append(f"- {what}")
        numbers = [len(all_of), len(tried), len(tried) - len(alive), len(excused), len(alive) - len(excused)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        rows.append(f"| `{file}.py` | " + " | ".join(map(str, numbers)) + " |")
    rows.append("| **all** | " + " | ".join(map(str, sums)) + " |")
    text = "\n".join(rows)
    if names:
        text += "\n\nEquivalent: no input tells them from the original.\n\n" + "\n".join(sorted(set(names)))
    if open_:
        text += "\n\nUnnoticed:\n\n" + "\n".join(sorted(set(open_)))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="stop starting mutants after so many minutes")
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds for one mutant, at least four times the clean run"
    )
    parser.add_argument("--only", nargs="*", default=[], help="files whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="try earlier survivors again")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.report:
        run(options.only, options.minutes, options.limit, options.again)
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    commit = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src"], cwd=ROOT, check=False).returncode == 0
    note = "" if commit else "\n\n(The source had changes that were not committed.)"
    PAGE.write_text(f"{head}{BEGIN}\n{report()}{note}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
