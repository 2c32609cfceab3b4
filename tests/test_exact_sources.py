"""What the sources of exact arithmetic must not contain: operations that fuse, or that draw other noise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("compression/*.py"), *ROOT.glob("optim/*.py")])

FORBIDDEN = {
    "fast mathematics": r"fastmath\s*=\s*(True|\{)",
    "fused operations": r"\.(addcmul|addcdiv|lerp|addmm|addmv|baddbmm)_?\(|_foreach_",
    "sums with a factor": r"\.(add|sub)_?\([^()]*(\([^()]*\)[^()]*)*alpha\s*=",
    "noise of torch": r"torch\.(randn?|randint|randperm|bernoulli|normal|manual_seed)\b|\.normal_\(",
    "reciprocal square roots": r"\brsqrt",
    "accumulating scatters": r"accumulate\s*=\s*True|\.(index_add|scatter_add)_?\(",
}
LOCAL = {"gradients.py": {"add_to"}}
"""Functions of local work (design: section 6, rule 1), which may be sloppy: gradients not sent yet."""

CAUGHT = [
    "@njit(fastmath=True)",
    "x.addcmul_(a, b)",
    "torch._foreach_add(a, b)",
    "theta.add_(update, alpha=-lr)",
    "theta.sub_(f(x), alpha=lr)",
    "torch.randn(3)",
    "x.normal_()",
    "x.rsqrt()",
    "x.index_add_(0, i, v)",
]


def lines_with(pattern: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


def without_functions(code: str, names: set[str]) -> str:
    """The code with the lines of these functions left out; every name must be there."""
    found = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {f.name for f in found} == names
    hidden = {i for f in found for i in range(f.lineno, (f.end_lineno or f.lineno) + 1)}
    return "\n".join(line for i, line in enumerate(code.splitlines(), 1) if i not in hidden)


def test_the_patterns_catch() -> None:
    for line in CAUGHT:
        assert any(lines_with(p, line) for p in FORBIDDEN.values()), line


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sources(path: Path) -> None:
    code = without_functions(path.read_text(), LOCAL.get(path.name, set()))
    assert {why: lines for why, p in FORBIDDEN.items() if (lines := lines_with(p, code))} == {}


def test_there_are_sources() -> None:
    assert {"noise.py", "dct_topk.py", "spsa.py"} <= {p.name for p in SOURCES}
