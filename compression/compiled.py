"""How numba's kernels are compiled, kept on disk and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import numba
from llvmlite import binding
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache

_LOOKED_AT: Final = "0.68."
"""What is here stands on private parts of numba: of other versions its own way is taken."""


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit(cache=True, nogil=True)`, whose kernels are loaded without what only compiling takes."""
    if not numba.__version__.startswith(_LOOKED_AT):
        return numba.njit(cache=True, nogil=True)(function)
    kernel: Any = numba.njit(nogil=True)(function)
    if not config.DISABLE_JIT:  # type: ignore[attr-defined]
        kernel._cache = _Kept(function)  # type: ignore[no-untyped-call]
    return kernel


class _Unread(CompileResultCacheImpl):
    """A loaded kernel runs by its machine code. LLVM's code of it lies beside that, for others that are
    compiled with it inside: it is read when one is, as it takes fourteen times its bytes in memory."""

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        (name, kind, (machine_code, llvm_code)), names, *rest = payload
        target_context.codegen()._engine._defined_symbols |= {
            names.llvm_func_name,
            names.llvm_cpython_wrapper_name,
        }
        code = name, kind, (machine_code, _no_code())
        kernel = super().rebuild(target_context, (code, names, *rest))  # type: ignore[no-untyped-call]
        kernel.library._get_module_for_linking = partial(binding.parse_bitcode, llvm_code)
        return kernel


@cache
def _no_code() -> bytes:
    """As LLVM writes it."""
    code: bytes = binding.parse_assembly("").as_bitcode()
    return code


class _Kept(FunctionCache):
    """numba's own prepares itself to compile before it looks for a kernel on disk: 200 modules, and LLVM's
    optimizer for a few functions of its runtime, 30 MB and 0.3 s. The compiler does it again where none is
    found. What a loaded kernel calls are the runtime's functions in C, by name."""

    _impl_class = _Unread

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _name_runtime()
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]


@cache
def _name_runtime() -> None:
    """As `numba.core.runtime.rtsys.initialize` does it."""
    from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]

    for name, address in _nrt_python.c_helpers.items():
        binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)
