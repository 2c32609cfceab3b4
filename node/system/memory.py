"""How much memory this process has taken, and what of it goes back."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path


def peak_bytes() -> int:
    """Resident, of this program so far. What getrusage says begins with what the process that started it had:
    it is taken where the kernel says nothing better."""
    try:
        fields = Path("/proc/self/status").read_text().split("VmHWM:", 1)[1].split(maxsplit=1)
        return int(fields[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """What was freed and can be had again, where the C library keeps it (glibc): 11 MB once torch and numba
    are loaded, in a millisecond."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
