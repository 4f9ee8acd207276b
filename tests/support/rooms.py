"""The rooms of the Python layer: which module imports which, and how large each room is."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import hornbeam

ROOT = Path(hornbeam.__file__).parent
#: From the bottom to the top; a module imports from its own room and from those before it.
ORDER = ("_core", "errors", "base", "values", "seam", "flows", "formats", "training", "faces")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def room(module: str) -> str:
    """The room of a module; what stands outside of the rooms is a face."""
    name = module.partition(".")[0]
    return name if name in ORDER else "faces"


def imported(module: str) -> Iterator[str]:
    """What a module imports, also inside functions; not what only type checkers see."""
    todo: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        todo += ast.iter_child_nodes(node)


def own(module: str) -> set[str]:
    """Modules of hornbeam that a module imports."""
    found = set()
    for name in imported(module):
        if name.partition(".")[0] == "hornbeam":
            inside = name.partition(".")[2]
            known = inside in MODULES or inside.partition(".")[0] == "_core"
            found.add(inside if known else inside.rpartition(".")[0])
    return found - {"", module}


def graph() -> str:
    """Which room imports which, as docs/design.md draws it; `errors`, which all rooms import, is left out."""
    arrows = {(room(module), room(other)) for module in MODULES if module for other in own(module)}
    drawn = sorted((ORDER.index(a), ORDER.index(b)) for a, b in arrows if a != b and "errors" not in (a, b))
    return "\n".join(["flowchart TD", *(f"    {ORDER[a]} --> {ORDER[b]}" for a, b in reversed(drawn))])


def lines(path: Path) -> int:
    """Lines of code: without comments, docstrings and blank lines."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - skipped)


def sizes() -> dict[str, int]:
    """Lines of code of each room."""
    found = dict.fromkeys(ORDER[1:], 0)
    for module, path in MODULES.items():
        found[room(module)] += lines(path)
    return found
