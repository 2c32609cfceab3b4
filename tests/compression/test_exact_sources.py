"""What the sources of exact arithmetic must not contain: operations that fuse, or that draw other noise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = sorted([*ROOT.glob("compression/**/*.py"), *ROOT.glob("optim/**/*.py")])
KERNELS = [path for path in SOURCES if path.stem.endswith("_triton")]

FORBIDDEN = {
    "fast mathematics": r"fastmath\s*=\s*(True|\{)",
    "fused operations": r"\.(addcmul|addcdiv|lerp|addmm|addmv|baddbmm)_?\(|_foreach_",
    "sums with a factor": r"\.(add|sub)_?\([^()]*(\([^()]*\)[^()]*)*alpha\s*=",
    "noise of torch": r"torch\.(randn?|randint|randperm|bernoulli|normal|manual_seed)\b|\.normal_\(",
    "reciprocal square roots": r"\brsqrt",
    "accumulating scatters": r"accumulate\s*=\s*True|\.(index_add|scatter_add)_?\(",
}
LOCAL = {
    "optim/parts/gradients.py": {"add_to"},
    "optim/inner/schedule_free.py": {"_move"},
    "optim/gossip/private.py": {"_add"},
}
"""Functions of local work, which may be sloppy: gradients that are not sent yet, inner optimizers,
a peer's own noise."""

TRITON = {
    "approximate division (tl.div_rn)": r"[^/]/(?!/)[^/]",
    "approximate functions (tl.sqrt_rn)": r"\b(sqrt|exp2?|log2?|sin|cos|erf|sigmoid|softmax|fdiv)\(",
    "products of shorter floats": r"\btl\.dot\((?!.*input_precision=\"ieee\")",
    "sums in an order of their own": r"\batomic_",
    "fused operations": r"\bfma\(",
    "short floats (their bits, widened by integer arithmetic)": r"\btl\.(bfloat16|float8)",
}
"""In functions that Triton compiles; the interpreter hides all of this. (Of bfloat16 that of 3.7 adds
the bit patterns, and it truncates float32 to it. float16 is numpy's, and rounds.)"""

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


CAUGHT_IN_TRITON = [
    "x = a / b",
    "x = tl.sqrt(a)",
    "x = tl.math.exp(a)",
    "x = tl.dot(a, b)",
    'x = tl.dot(a, b, input_precision="tf32")',
    "tl.atomic_add(p, x)",
    "x = tl.fma(a, b, c)",
    "x = tl.load(p.to(tl.pointer_type(tl.bfloat16)))",
    "x = a.to(tl.float8e4nv)",
]
PASSES_IN_TRITON = [
    "x = tl.div_rn(a, b)",
    "x = tl.sqrt_rn(a)",
    "x = a // b",
    'x = tl.dot(a, b, input_precision="ieee")',
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
    code = without_functions(path.read_text(), LOCAL.get(path.relative_to(ROOT).as_posix(), set()))
    assert {why: lines for why, p in FORBIDDEN.items() if (lines := lines_with(p, code))} == {}


def test_nothing_is_cast_to_float8() -> None:
    """torch 2.13 makes 448 of infinity in e4m3. Values of float8 are a task's own, and stay what they are."""
    files = [
        p for top in ("compression", "optim", "coordinator", "node") for p in ROOT.glob(f"{top}/**/*.py")
    ]
    naming = [p.relative_to(ROOT).as_posix() for p in files if lines_with(r"torch\.float8", p.read_text())]
    assert naming == ["node/snapshots/format.py"]  # its table of types


def test_there_are_sources() -> None:
    assert {"noise.py", "dct_topk.py", "spsa.py"} <= {p.name for p in SOURCES}


# ------------------------------------------------------------------------------------------- Triton


def compiled(code: str) -> list[str]:
    """The functions that Triton compiles, statement by statement, without comments and docstrings."""
    statements = []
    for f in ast.walk(ast.parse(code)):
        if isinstance(f, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in f.decorator_list):
            for s in f.body:
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)):
                    statements += ast.unparse(s).replace("'", '"').splitlines()
    return statements


def launches(code: str) -> list[ast.Call]:
    """kernel[grid](...)"""
    calls = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call))
    return [c for c in calls if isinstance(c.func, ast.Subscript)]


def is_exact(launch: ast.Call) -> bool:
    return any(k.arg is None and ast.unparse(k.value) == "EXACT" for k in launch.keywords)


def test_the_patterns_catch_what_triton_compiles() -> None:
    for line in CAUGHT_IN_TRITON:
        assert any(lines_with(p, line) for p in TRITON.values()), line
    for line in PASSES_IN_TRITON:
        assert not any(lines_with(p, line) for p in TRITON.values()), line
    kernel = '@triton.jit(debug=True)\ndef f(x):\n    """a / b"""\n    y = x / 2  # why\n'
    plain = "\ndef g(x):\n    return x / 2\n"
    assert compiled(kernel + plain) == ["y = x / 2"]
    assert [is_exact(c) for c in launches("f[(1,)](x, **EXACT)\ng[n](x)")] == [True, False]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_triton_kernels(path: Path) -> None:
    code = path.read_text()
    statements = "\n".join(compiled(code))
    assert statements
    assert {why: lines for why, p in TRITON.items() if (lines := lines_with(p, statements))} == {}
    assert launches(code) or path.stem in ("tables_triton", "words_triton")
    assert all(map(is_exact, launches(code)))
