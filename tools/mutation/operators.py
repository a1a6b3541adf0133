"""Small errors: every place of a source file at which one thing can be another."""

import ast
import builtins
import copy
import dataclasses
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "saint"

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.MatMult: ast.Add,
}  # fmt: skip
# names of functions, methods and types that stand for one another
_NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "argmax": "argmin",
    "argmin": "argmax", "amax": "amin", "amin": "amax", "zeros": "ones", "ones": "zeros", "clamp_min": "clamp_max",
    "clamp_max": "clamp_min", "median": "fmean", "sum": "mean", "mean": "sum", "zeros_like": "ones_like",
    "ones_like": "zeros_like", "sorted": "list", "extend": "append", "startswith": "endswith", "endswith": "startswith",
}  # fmt: skip
_TYPES = {"float32": "bfloat16", "float64": "float32"}
_FINITE = {
    "isfinite": "isnan",
    "isnan": "isfinite",
    "isinf": "isnan",
}  # the first two are each other's opposite, nearly
_DROPPED = {"float", "double", "clone", "copy", "abs", "sqrt", "strip", "lower", "unsqueeze"}  # x.float() -> x
_KEYED = {"get", "pop", "setdefault", "getattr", "hasattr"}  # take the name of something
_SYMMETRIC = {"min", "max", "maximum", "minimum", "promote_types"}  # exchanging their arguments changes nothing
_UNLIKE = {"isinstance", "issubclass", "getattr", "hasattr", "setattr"}  # nor is it a small error here
_TOLD = {"warn", "warning", "info", "debug"}  # a message and nothing else
# keywords without which nothing differs on a CPU, or that are words for a reader
_UNREAD = {
    "repr",
    "compare",
    "default_factory",
    "stacklevel",
    "strict",
    "device",
    "help",
    "hint",
    "metavar",
    "rich_help_panel",
}
_TYPE_NAMES = {"dict", "list", "tuple", "set", "frozenset", "type"}
_MOST = 8  # a longer literal is a table: its first, middle and last entries stand for the others


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One error: where it is, and what was there before."""

    file: str  # without .py, below src/saint
    number: int  # among those of the file
    line: int
    lines: tuple[int, int]  # first and last line of the statement, or of its head
    importing: bool  # the line runs when the module is imported
    text: str  # the line
    column: int  # in that text
    before: str
    after: str
    key: str

    @property
    def path(self) -> Path:
        return SOURCE / f"{self.file}.py"

    @property
    def module(self) -> str:
        return "saint." + self.file.removesuffix("/__init__").replace("/", ".") if self.file != "__init__" else "saint"

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.before} -> {self.after}"


@dataclasses.dataclass(frozen=True)
class _Place:
    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    statement: ast.stmt
    importing: bool

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def _unread(node: ast.AST) -> bool:
    """Messages, annotations, assertions: nothing that a test should look at letter by letter."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.AnnAssign(value=None) | ast.Assign(targets=[ast.Name(id="__all__")]) | ast.keyword(arg="help"):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name))) if name in _TOLD:
            return True
        case ast.Subscript(value=ast.Name(id=name)):  # dict[str, int], Float[Tensor, "B N"], but not TABLE["x"]
            return name in _TYPE_NAMES or (name[0].isupper() and not name.isupper())
        case ast.If(test=test):
            return ast.unparse(test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.keyword) and node.arg in _UNREAD


def _places(node: ast.AST, statement: ast.stmt | None = None, importing: bool = True) -> Iterator[_Place]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment", "bases"):
            continue
        inside = field == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _unread(child):
                continue
            around = child if isinstance(child, ast.stmt) else statement
            if around is not None:
                yield _Place(node, field, index, child, around, importing and not inside)
            yield from _places(child, around, importing and not inside)


def _head(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of what runs first of a statement: all of a simple one, what stands in front of a body."""
    first, last = statement.lineno, statement.end_lineno or statement.lineno
    match statement:
        case ast.Match(cases=[case, *_]):
            last = case.pattern.lineno - 1
        case ast.AST(body=[body, *_]):
            last = body.lineno - 1
    return first, max(first, last)


def _without(node: ast.AST, field: str, *indices: int) -> ast.AST:
    other = copy.deepcopy(node)
    for index in sorted(indices, reverse=True):
        del getattr(other, field)[index]
    return other


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _entries(count: int) -> list[int]:
    return list(range(count)) if count <= _MOST else [0, count // 2, count - 1]


def _not(node: ast.expr) -> ast.expr:
    return (
        node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else ast.UnaryOp(ast.Not(), node)
    )


def _is_key(place: _Place) -> bool:
    """Whether a string names an entry, a setting or a case, and is not read by anybody."""
    match place.parent:
        case ast.Subscript() | ast.MatchValue():
            return True
        case ast.Compare():
            return place.node.value != ""  # type: ignore[attr-defined]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in _KEYED and place.field == "args"
    return False


def _changes(place: _Place) -> Iterator[ast.AST]:
    """What may stand in a place."""
    node, parent = place.node, place.parent
    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                other = copy.deepcopy(node)
                other.ops[index] = _COMPARE[type(op)]()
                yield other
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield _with(node, op=_ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for index in range(len(values)):
                yield values[1 - index] if len(values) == 2 else _without(node, "values", index)
        case ast.UnaryOp(op=ast.Not()) if not isinstance(parent, (ast.If, ast.IfExp)):
            yield node.operand
        case ast.UnaryOp(op=ast.USub() | ast.Invert()):
            yield node.operand
        case ast.IfExp():
            yield ast.IfExp(_not(node.test), node.body, node.orelse)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
            if isinstance(parent, ast.keyword) and parent.arg in ("dim", "axis") and value:
                yield ast.Constant(0)
        case ast.Constant(value=str(value)) if _is_key(place):
            yield ast.Constant(value + "_")
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in _TYPES:
            yield _with(node, attr=_TYPES[name])
        case ast.Slice(lower=None, upper=bound, step=None) if bound is not None:
            yield ast.Slice(bound, None)
        case ast.Slice(lower=bound, upper=None, step=None) if bound is not None:
            yield ast.Slice(None, bound)
        case ast.Return(value=None | ast.Constant(value=None)):
            if not isinstance(parent, ast.FunctionDef) or parent.body[-1] is not node:  # there it is all the same
                yield ast.Pass()
        case ast.Return(value=value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.If(test=test, orelse=orelse):
            yield _with(node, test=_not(test))
            if len(orelse) == 1 and isinstance(orelse[0], ast.If):  # elif
                yield _with(node, orelse=orelse[0].orelse)
        case ast.comprehension(ifs=ifs):
            for index in range(len(ifs)):
                yield _without(node, "ifs", index)
        case ast.Set(elts=elts) | ast.List(elts=elts, ctx=ast.Load()) if len(elts) > 1:
            yield from (_without(node, "elts", index) for index in _entries(len(elts)))
        case ast.Tuple(elts=elts, ctx=ast.Load()) if len(elts) > 1:  # not what is unpacked: that is no small error
            if not isinstance(parent, (ast.Return, ast.Assign, ast.Yield)) or place.importing:
                yield from (_without(node, "elts", index) for index in _entries(len(elts)))
        case ast.Dict(keys=keys):
            for index in _entries(len(keys)):
                yield _without(_without(node, "keys", index), "values", index)
        case ast.Expr(value=ast.Call()) | ast.Delete(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript()]) | ast.AugAssign(target=ast.Subscript() | ast.Attribute()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"))]) | ast.AnnAssign(target=ast.Attribute()):
            if (
                not isinstance(parent, ast.FunctionDef) or parent.name != "__init__"
            ):  # not there at all is no small error
                yield ast.Pass()
    if isinstance(node, ast.Call):
        yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    name = ast.unparse(node.func).rpartition(".")[2]
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"
    if name in _NAMES and (field == "attr" or {name, _NAMES[name]} <= vars(builtins).keys()):
        yield _with(node, func=_with(node.func, **{field: _NAMES[name]}))
    if name in _FINITE:
        other = _with(node, func=_with(node.func, **{field: _FINITE[name]}))
        opposite = ast.Not() if ast.unparse(node.func).startswith(("math.", name)) else ast.Invert()
        yield other if name == "isinf" else ast.UnaryOp(opposite, other)  # type: ignore[arg-type]
    if name in _DROPPED and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        yield node.func.value
    if name == "to" and [ast.unparse(argument) for argument in node.args] == ["torch.float32"] and not node.keywords:
        yield node.func.value  # type: ignore[attr-defined]
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    if len(node.args) >= 2 and name not in _SYMMETRIC | _UNLIKE and not starred:
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _UNREAD:
            yield _without(node, "keywords", index)


def _words(node: ast.AST) -> str:
    match node:
        case ast.If(test=test, orelse=[ast.If(test=other), *_]):
            return f"if {ast.unparse(test)}: ... elif {ast.unparse(other)}: ..."
        case ast.If(test=test, orelse=orelse):
            return f"if {ast.unparse(test)}: ..." + (" else: ..." if orelse else "")
        case ast.Slice() | ast.comprehension():
            return ast.unparse(node).strip()
    return " ".join(ast.unparse(node).split())


def _told(before: str, after: str, width: int = 100) -> tuple[str, str]:
    """Both texts; of long ones what differs, and some of what is around it."""
    if max(len(before), len(after)) <= width:
        return before, after
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - width // 2)
    cut = [text[start : start + width] for text in (before, after)]
    return "..." * (start > 0) + cut[0] + "...", "..." * (start > 0) + cut[1] + "..."


def each(file: str, text: str) -> Iterator[tuple[Mutant, ast.Module]]:
    """Every mutant, and the tree while the error is in it."""
    tree, number, seen = ast.parse(text), 0, set()
    listing = text.splitlines()
    for place in _places(tree):
        line = getattr(place.node, "lineno", place.statement.lineno)
        for other in _changes(place):
            before, after = _told(_words(place.node), _words(other))
            if before == after or (id(place.node), after) in seen:
                continue
            seen.add((id(place.node), after))
            place.put(ast.copy_location(other, place.statement if not hasattr(place.node, "lineno") else place.node))
            digest = hashlib.sha256(f"{file}\n{text}\n{number}\n{after}".encode()).hexdigest()[:16]
            heads = _head(place.statement)
            where = listing[line - 1].strip()
            column = getattr(place.node, "col_offset", 0) - (len(listing[line - 1]) - len(listing[line - 1].lstrip()))
            yield Mutant(file, number, line, heads, place.importing, where, column, before, after, digest), tree
            place.put(place.node)
            number += 1


def files(package: str) -> list[str]:
    """Files of a package of saint; those beside the packages are "root"."""
    found = (path.relative_to(SOURCE).as_posix().removesuffix(".py") for path in SOURCE.rglob("*.py"))
    return sorted(file for file in found if _home(file) == package)


def packages() -> list[str]:
    return sorted({_home(path.relative_to(SOURCE).as_posix()) for path in SOURCE.rglob("*.py")})


def _home(file: str) -> str:
    """The folder of saint that a file lies in, of the lab the folder in that."""
    folders = file.split("/")[:-1]
    return "/".join(folders[: 2 if folders[:1] == ["lab"] else 1]) or "root"


def mutants(file: str) -> list[Mutant]:
    """All mutants of ``src/saint/<file>.py``, in the order of the source."""
    text = (SOURCE / f"{file}.py").read_text(encoding="utf-8")
    return [mutant for mutant, _ in each(file, text)]


def code(mutant: Mutant) -> CodeType:
    """The module with the error in it; every line has the number that it has in the file."""
    text = mutant.path.read_text(encoding="utf-8")
    for found, tree in each(mutant.file, text):
        if found.number == mutant.number:
            assert found == mutant, f"{mutant.file}.py has changed"
            return compile(ast.fix_missing_locations(tree), str(mutant.path), "exec")
    raise LookupError(str(mutant))


def sample(names: list[str], size: int, seed: int) -> tuple[list[Mutant], int]:
    """A fair sample over all mutants of some files, and how many there are. A larger one begins with the smaller one."""
    found = [mutant for name in sorted(names) for mutant in mutants(name)]
    random.Random(seed).shuffle(found)
    return found[:size], len(found)
