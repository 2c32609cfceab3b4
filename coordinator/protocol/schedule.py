"""The learning-rate factor of each round: host arithmetic with + - * / only, rounded once to float32."""

from __future__ import annotations

import struct

from .settings import ScheduleSection


def float32_bits(x: float) -> int:
    """The bits of `x` rounded to the nearest float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", x))[0]
    return bits


def float32_of_bits(bits: int) -> float:
    """The inverse of `float32_bits`."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def lr_factor(schedule: ScheduleSection, round_: int, n_rounds: int) -> float:
    """Factor of round `round_` (from 1): r/warmup in the warm-up, then 1 or the line down to `final_factor`.

    `linear` is 1 in the last round of the warm-up and `final_factor` in the last round of the run.
    """
    warmup = schedule.warmup_rounds
    if round_ < warmup:
        return round_ / warmup
    if schedule.name == "constant" or n_rounds <= warmup:
        return 1.0
    share = (min(round_, n_rounds) - warmup) / (n_rounds - warmup)
    return 1.0 - (1.0 - schedule.final_factor) * share


def lr_factor_bits(schedule: ScheduleSection, round_: int, n_rounds: int) -> int:
    """float32 bits of `lr_factor`: what records of the ledger carry."""
    return float32_bits(lr_factor(schedule, round_, n_rounds))
