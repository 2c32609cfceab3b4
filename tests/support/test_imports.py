"""The check of imports finds what it is there for."""

from __future__ import annotations

from pathlib import Path

from tests.support.imports import MAX_MODULES, faults


def house(root: Path, **files: str) -> Path:
    """`node__a="..."` is the text of node/a.py."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_relative_imports_in_one_direction_are_fine(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        node__links__base="from ...compression.errors import BadPayload\nfrom .. import config\n",
        node__config="",
        compression__errors="class BadPayload(Exception): ...\n",
    )
    assert list(faults(root)) == []


def test_a_circle_through_a_lazy_import_is_found(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        node__a="from .b import f\n",
        node__b="def f():\n    from .c import g\n    return g\n",
        node__c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a\n",
        node__d="from .a import f\n",
    )
    (fault,) = faults(root)
    start, *way = fault.removeprefix("a circle of imports, lazy ones included: ").split(" -> ")
    assert way[-1] == start
    assert " ".join(way * 2).count("node.a node.b node.c") >= 1


def test_absolute_and_dangling_imports_are_found(tmp_path: Path) -> None:
    root = house(
        tmp_path, node__a="import os\nfrom thinwire.node.b import f\n\nfrom .c import g\n", node__b=""
    )
    assert list(faults(root)) == [
        "node/a.py:2: the product imports itself relatively (CONTRIBUTING.md)",
        "node/a.py:4: there is no module node.c",
    ]


def test_a_crowded_folder_is_found(tmp_path: Path) -> None:
    crowd = {f"optim__m{i}": "" for i in range(MAX_MODULES + 1)}
    (fault,) = faults(house(tmp_path, **crowd))
    assert fault.startswith("optim: 21 modules")
