"""Whether the CPU kernels lie compiled in numba's cache; see `compiling`. Loads no torch."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

KERNELS: Final = "THINWIRE_KERNELS"
"""The environment's choice among implementations; see compression/numerics/noise.py."""

_MARK: Final = "thinwire-compiled"


def is_compiled() -> bool:
    """Whether the kernels of this version lie compiled in numba's cache, or none are in use."""
    mark = mark_path()
    if mark is None:
        return True
    try:
        return mark.read_text() == stamp(mark.parent)
    except OSError:
        return False


def mark_path() -> Path | None:
    """Where it is noted what was compiled; None: numba is missing, not in use or has no cache."""
    if find_spec("numba") is None or os.environ.get(KERNELS, "auto") not in ("auto", "numba"):
        return None
    try:
        from ...compression.cpu.fingerprint_cpu import cache_folder
    except RuntimeError:  # numba's word for a cache that can be kept nowhere
        return None
    return cache_folder() / _MARK


def stamp(cache: Path) -> str:
    """What the compiled kernels depend on, as numba has it: versions, and when each source was changed."""
    sources = sorted(Path(__file__).parents[2].glob("*/*/*_cpu.py"))
    stamps = [f"{path.name} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in sources]
    text = "\n".join([sys.version, version("numba"), version("llvmlite"), str(cache), *stamps])
    return hashlib.sha256(text.encode()).hexdigest()
