"""Quantities in words for people."""

from __future__ import annotations

import math


def human_bytes(n: float) -> str:
    """1234567 -> '1.2 MB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_loss(loss: float, unit: str, bytes_per_token: float | None = None) -> str:
    """2.31 -> '2.310 nats/token (0.793 bits/byte)', where it is known how many bytes of text a token is."""
    text = f"{loss:.3f} {unit}"
    if unit != "nats/token" or not bytes_per_token:
        return text
    return f"{text} ({loss / math.log(2) / bytes_per_token:.3f} bits/byte)"


def bytes_beside_ddp(payload: float, sent: float | None, ddp: float | None) -> str:
    """Bytes per peer and round: payloads, all that was sent, and what data-parallel training would send."""
    parts = [f"{human_bytes(payload)} payload"]
    if sent:
        parts.append(f"{human_bytes(sent)} all sent")
    if ddp:
        times = f"{_times(ddp / payload)} the payload" + (f", {_times(ddp / sent)} all sent" if sent else "")
        parts.append(f"data-parallel {human_bytes(ddp)}: {times}")
    return ", ".join(parts)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"
