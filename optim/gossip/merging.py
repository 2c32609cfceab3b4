"""In which rounds peers' models become the reference model, and who takes part. The same for all: pure.

merge_every = R        after rounds R, 2 R, ... and after the last one
merge_every = "end"    once, at 99.7% of the rounds ("A single merging suffices"), and after the last one
participation = S      each peer takes part with this probability, which its seed of the round decides; in the
                       last round all do

A peer counts by what it has done since the merge that it last went on from, be it in many rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ...compression.base import Turn
from ...compression.errors import ConfigError

END: Final = "end"

_PER_MILLE: Final = 997
"""Of the rounds, before which nothing is merged with `END`."""


_MOST_MISSED: Final = 1000
"""Merges."""


def check_merge_every(value: object) -> None:
    """Raises ConfigError."""
    if value == END or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**24):
        return
    raise ConfigError(f'merge_every = {value!r}: rounds, a whole number from 1 on, or "{END}"')


def is_merge(merge_every: int | str, round_: int, n_rounds: int) -> bool:
    """Whether that round merges. `n_rounds`: of the run; 0: not known."""
    if round_ == n_rounds:
        return True
    if merge_every == END:
        return n_rounds > 0 and round_ == _single(n_rounds)
    return round_ % int(merge_every) == 0


def first_merge(merge_every: int | str, n_rounds: int) -> int:
    """The round after which the reference model is no longer what it was in the beginning."""
    if merge_every == END:
        return _single(n_rounds)
    return min(int(merge_every), n_rounds) if n_rounds else int(merge_every)


def last_merge(merge_every: int | str, round_: int, n_rounds: int) -> int:
    """The last round up to this one that merged; 0: none, the reference model is untrained."""
    if round_ and round_ == n_rounds:
        return round_
    if merge_every == END:
        return _single(n_rounds) if 0 < _single(n_rounds) <= round_ else 0
    return round_ - round_ % int(merge_every)


def is_full(participation: float, turn: Turn) -> bool:
    """Whether everybody takes part in the turn's merge."""
    return participation == 1.0 or turn.round == turn.n_rounds


def takes_part(participation: float, turn: Turn, seed: int) -> bool:
    """Whether a peer with this seed of the round does."""
    return is_full(participation, turn) or seed < int(participation * 2.0**64)


def last_taken(
    merge_every: int | str, participation: float, all_take: bool, turn: Turn, seed_of: Callable[[int], int]
) -> int:
    """The last merge before the turn's that a peer with these seeds went on from; 0: there was none. A run
    that was made longer is taken as if it always had been. After many merges without the peer that is enough.
    """
    round_ = turn.round
    for _ in range(_MOST_MISSED):
        round_ = last_merge(merge_every, round_ - 1, turn.n_rounds)
        if round_ == 0 or all_take or takes_part(participation, replace(turn, round=round_), seed_of(round_)):
            break
    return round_


def _single(n_rounds: int) -> int:
    return -(-n_rounds * _PER_MILLE // 1000)
