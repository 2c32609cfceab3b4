"""How the product's modules import each other, read from their sources: `make lint` runs this module.

import-linter has no contract against circles among modules, nor does it mind how an import is written. Here
every import counts, those inside of functions and those for type checkers included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("compression", "coordinator", "optim", "node")
MAX_MODULES = 20
"""In one folder."""


@dataclass(frozen=True)
class Import:
    """`from target import ...` in line `line` of a module; `target` without the `thinwire.` before it."""

    line: int
    target: str


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of the product's modules below `root`."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def absolute(path: Path) -> list[int]:
    """Lines that import the product by its absolute name, which editors cannot follow in a plain clone."""
    found = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom))
    return [n.lineno for n in found if any(name.startswith("thinwire") for name in _names(n))]


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [node.module or ""]


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    """What the module imports of the product; a target that is no module is named as it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = name.split(".")[: -node.level]
            base = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                yield Import(node.lineno, inner if inner in known else base)


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A way from a module back to itself, each importing the next; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(reversed(e.args[1]))
    return []


def faults(root: Path) -> Iterator[str]:
    """What is wrong below `root`, for people to read; nothing if all is well."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        for line in absolute(path):
            yield f"{path.relative_to(root)}:{line}: the product imports itself relatively (CONTRIBUTING.md)"
        found = list(imports(name, path, known))
        for each in found:
            if each.target not in known:
                yield f"{path.relative_to(root)}:{each.line}: there is no module {each.target}"
        graph[name] = {each.target for each in found if each.target in known}
    if way := circle(graph):
        yield f"a circle of imports, lazy ones included: {' -> '.join(way)}"
    for folder in sorted({path.parent for path in known.values()}):
        n = len(list(folder.glob("*.py")))
        if n > MAX_MODULES:
            yield f"{folder.relative_to(root)}: {n} modules, more than {MAX_MODULES}: make a room of some"


def main() -> int:
    found = list(faults(ROOT))
    for fault in found:
        print(fault, file=sys.stderr)  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
