"""Find the small faults that can be planted in a module's source.

Each changes one operator, constant or statement. None is planted in annotations, decorators,
docstrings, f-strings, and calls of `log`, nor in `zip`'s `strict`: a fault there changes no answer.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
SWAPPED_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    source: the whole module with the fault. scope: the function or class that it is in. code: its
    line.
    """

    module: str
    line: int
    scope: str
    code: str
    before: str
    after: str
    source: str

    @property
    def identity(self) -> str:
        """Return a name that outlives changes elsewhere in the module."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        place = "" if self.code.startswith(before) else f" in {self.code}"
        return f"{self.module}:{self.scope}: {before} -> {after}{place}"


def find_mutants(module: str, source: str) -> list[Mutant]:
    """Return every mutant of a module in the order of its source.

    Raises SyntaxError for source that is not Python.
    """
    lines = source.splitlines()
    mutants = []
    for node, scope, after in _walk(ast.parse(source), ""):
        code, changed = lines[node.lineno - 1].strip(), _replaced(source, node, after)
        mutants.append(Mutant(module, node.lineno, scope, code, ast.unparse(node), after, changed))
    return mutants


def _replaced(source: str, node: ast.expr | ast.stmt, after: str) -> str:
    """Return the source with a node's text replaced; an expression stays one in parentheses."""
    lines = source.encode().splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = after if isinstance(node, ast.stmt) else f"({after})"
    content = source.encode()
    return (content[:start] + text.encode() + content[end:]).decode()


Found = tuple[ast.expr | ast.stmt, str, str]


def _walk(node: ast.AST, scope: str) -> Iterator[Found]:
    """Yield (node, scope, its replacement's text) for every fault in a node and below it."""
    if _is_skipped(node):
        return
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        scope = f"{scope}.{node.name}".lstrip(".")
    if isinstance(node, ast.expr):
        yield from ((node, scope, ast.unparse(changed)) for changed in _changed_expressions(node))
    if isinstance(node, ast.stmt):
        yield from ((node, scope, after) for after in _changed_statements(node))
    for condition in _conditions(node):
        yield condition, scope, f"not ({ast.unparse(condition)})"
    for child in _children(node):
        yield from _walk(child, scope)


def _is_skipped(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Compare(left=ast.Name(id="__name__"))):
            return True
        case ast.keyword(arg="strict"):
            return True
    return False


def _children(node: ast.AST) -> Iterator[ast.AST]:
    unread = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name not in unread:
            yield from (
                each
                for each in (value if isinstance(value, list) else [value])
                if isinstance(each, ast.AST)
            )


def _conditions(node: ast.AST) -> list[ast.expr]:
    """Return the conditions to negate.

    A loop's is not among them, because its negation nearly always hangs, and no comparison, which
    is flipped.
    """
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            conditions = [test]
        case ast.comprehension(ifs=ifs):
            conditions = ifs
        case _:
            return []
    return [
        each for each in conditions if not isinstance(each, ast.Compare) and not _is_negation(each)
    ]


def _is_negation(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _changed_expressions(node: ast.expr) -> Iterator[ast.expr]:
    changed = copy.copy(node)  # each change replaces one of its fields
    match node, changed:
        case ast.Compare(ops=ops), ast.Compare():
            for i, operator in enumerate(ops):
                for other in COMPARISONS[type(operator)]:
                    changed.ops = [*ops[:i], other(), *ops[i + 1 :]]
                    yield changed
        case ast.BinOp(op=operator), ast.BinOp() if type(operator) in ARITHMETIC and not _is_text(
            node
        ):
            changed.op = ARITHMETIC[type(operator)]()
            yield changed
        case ast.BoolOp(op=operator), ast.BoolOp():
            changed.op = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield changed
        case ast.UnaryOp(op=ast.Not(), operand=operand), _:
            yield operand
        case ast.Constant(value=bool() | int() | float() as value), ast.Constant():
            changed.value = _changed_constant(value)
            yield changed
        case ast.Call(func=ast.Name(id=name)), ast.Call() if name in SWAPPED_CALLS:
            changed.func = ast.Name(SWAPPED_CALLS[name])
            yield changed


def _changed_constant(value: float) -> float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) or value == 0 else 2 * value


def _is_text(node: ast.BinOp) -> bool:
    """Return whether an operand is text, of which every fault is an error at once."""
    sides = [
        side.value if isinstance(side, ast.Constant) else side for side in (node.left, node.right)
    ]
    return any(isinstance(side, str | bytes | ast.JoinedStr) for side in sides)


def _changed_statements(node: ast.stmt) -> Iterator[str]:
    """Yield `pass` for what can be left out, and the opposite of `+=`."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.Continue() | ast.Delete():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case ast.AugAssign(op=operator):
            yield "pass"
            if type(operator) in ARITHMETIC:
                changed = copy.copy(node)  # each change replaces one of its fields
                changed.op = ARITHMETIC[type(operator)]()
                yield ast.unparse(changed)
