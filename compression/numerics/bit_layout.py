"""Small integers packed side by side: value i takes bits [i w, (i + 1) w), low bits first."""

from __future__ import annotations

from typing import Final

MAX_WIDTH: Final = 32


def n_bytes(n: int, width: int) -> int:
    """Bytes that `n` values of `width` bits take."""
    return (n * width + 7) // 8
