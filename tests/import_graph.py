"""The import graph of a package, hidden imports included, and the circles in it.

An edge leads from the importing module to

* the module it names: ``import a.b``, ``from a import b`` (to ``a.b`` where that is a module, else
  to ``a``), at the top of a file, inside a function, or under ``TYPE_CHECKING``;
* the module that ``import_module("a.b")`` or ``__import__("a.b")`` names; where an f-string begins
  with a literal, to every module whose name begins so;
* any module whose dotted name stands in the file as a string: an entry of a table of commands or of
  a package that imports lazily;
* the packages around the imported module, because their ``__init__`` runs first. Packages around
  the importing module are left out: they are being imported already, and a package that gathers
  the names of its modules would otherwise be a circle.
"""

import ast
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Import", "circles", "import_graph", "imports", "is_inside", "modules_below"]

IMPORTERS = ("import_module", "__import__")
Graph = dict[str, dict[str, int]]  # module -> what it imports -> the line


class Import(NamedTuple):
    """A module that a file imports; `name` is None where the file does not say which."""

    name: str | None
    line: int


def modules_below(folder: Path) -> dict[str, Path]:
    """Module name -> file, of the package in `folder`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_inside(module: str, package: str) -> bool:
    """Whether `module` is `package` or below it."""
    return module == package or module.startswith(package + ".")


def imports(source: str, modules: Collection[str]) -> Iterator[Import]:
    """What a file imports, at any depth; `modules` are the names that strings are compared with."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_import(node, modules)
        elif isinstance(node, ast.Call) and _is_importer(node.func):
            yield from _dynamic(node, modules)
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            if node.value in modules and "." in str(node.value):
                yield Import(node.value, node.lineno)
        elif _is_importer(node) and id(node) not in called:
            yield Import(None, node.lineno)  # the function under another name


def _from_import(node: ast.ImportFrom, modules: Collection[str]) -> Iterator[Import]:
    if node.level:
        yield Import(None, node.lineno)
        return
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield Import(inner if inner in modules else node.module, node.lineno)
        if alias.name in IMPORTERS and alias.asname:
            yield Import(None, node.lineno)


def _is_importer(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return name in IMPORTERS


def _dynamic(call: ast.Call, modules: Collection[str]) -> Iterator[Import]:
    argument = call.args[0] if call.args else None
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    if not isinstance(first, ast.Constant) or first.value.startswith("."):
        yield Import(None, call.lineno)
    elif argument is first:
        yield Import(first.value, call.lineno)
    else:
        begins = [name for name in modules if name.startswith(first.value)]
        yield from (Import(name, call.lineno) for name in begins or [None])


def import_graph(modules: Mapping[str, Path], dispatchers: Mapping[str, str | None]) -> Graph:
    """Who imports whom, among `modules`.

    Args:
        modules: name -> file.
        dispatchers: the modules that may import a name that they compute, and the package whose
            modules that name may be; None where the names stand in the file as strings.

    Raises:
        ValueError: another module imports a name that is not written out.
    """
    graph: Graph = {}
    for module, path in modules.items():
        edges = graph.setdefault(module, {})
        for name, line in imports(path.read_text(encoding="utf-8"), modules):
            if name is None and module not in dispatchers:
                raise ValueError(
                    f"{module}, line {line}: imports a name that is not written out (computed, or "
                    "relative); write the full name, or list the module as a dispatcher"
                )
            package = dispatchers.get(module) if name is None else None
            targets = [found for found in modules if package and is_inside(found, package)]
            for target in [name] if name else targets:
                for found in _modules_run(target, module, modules):
                    edges.setdefault(found, line)
    return graph


def _modules_run(target: str, importer: str, modules: Collection[str]) -> Iterator[str]:
    """`target`, or the module that defines it, and the packages around it that run first."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    if target and target != importer:
        yield target
    while target := target.rpartition(".")[0]:
        if target in modules and not is_inside(importer, target):
            yield target


def circles(graph: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The shortest circle through each module that lies on one, as ``a:12 -> b:3 -> a``: the line
    of `a` that imports `b`, and so on. The shortest are first.
    """
    found = {}
    for start in sorted(graph):
        circle = _shortest_circle(graph, start)
        if circle:
            steps = zip(circle, [*circle[1:], start], strict=True)
            text = " -> ".join(f"{module}:{graph[module][target]}" for module, target in steps)
            found.setdefault(frozenset(circle), f"{text} -> {start}")
    return [found[modules] for modules in sorted(found, key=len)]


def _shortest_circle(graph: Mapping[str, Mapping[str, int]], start: str) -> list[str]:
    before = {start: None}
    waiting = deque([start])
    while waiting:
        module = waiting.popleft()
        for target in graph[module]:
            if target == start:
                circle = [module]
                while (module := before[module]) is not None:
                    circle.append(module)
                return circle[::-1]
            if target not in before:
                before[target] = module
                waiting.append(target)
    return []
