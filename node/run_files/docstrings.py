"""Docstrings of fields, which Python does not keep: they are read from the source of a class."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from itertools import pairwise


def meanings(kind: type) -> Mapping[str, str]:
    """Field -> the docstring below it, in one line; of the class and of those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if owner.__module__.partition(".")[0] != "thinwire":
            continue
        (body,) = (n.body for n in ast.parse(inspect.getsource(owner)).body if isinstance(n, ast.ClassDef))
        for before, after in pairwise(body):
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
                found |= {before.target.id: text} if (text := _text(after)) else {}
    return found


def _text(node: ast.stmt) -> str:
    match node:
        case ast.Expr(ast.Constant(str(text))):
            return " ".join(text.split())
    return ""
