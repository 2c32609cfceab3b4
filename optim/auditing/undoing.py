"""Whether an offer from other data undoes what the run's text teaches: from batches that no peer has had.

Other data may ask for something else than the text does, and a turned payload looks like data that ask for
the opposite. What decides is how far: turned payloads lead away about as far as honest ones lead there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from .evidence import Evidence

CLEAR: Final = 0.3
"""What the median of others' offers has at least: below it, chance decides where payloads point."""

AWAY: Final = 0.5
"""In medians: so far leads away what fails, farther than chance does."""

SUSPECT_AWAY: Final = 0.75
"""In medians: so far, whatever chance does, if it is a suspect's."""

THERE: Final = 0.1
"""In medians: what leads there so far has passed. In between nothing can be said: noise leads nowhere."""


@dataclass(frozen=True, slots=True)
class Undoing:
    """`theirs`: where the offer leads, from -1 to 1; `usual`: where others' lead. `has_failed`: None, nothing
    can be said."""

    theirs: float
    usual: float
    has_failed: bool | None


def undoing(theirs: Evidence, others: Sequence[Evidence], is_suspect: bool) -> Undoing:
    """`others`: of offers of the same round that were made from the run's text, one at least; `is_suspect`:
    the payloads of the offer's peer have kept pointing away from those of the others."""
    usual, found = median(other.where_sent for other in others), theirs.where_sent
    has_failed = None
    if usual >= CLEAR:
        least = max(AWAY * usual, theirs.by_chance)
        if is_suspect:
            least = min(least, SUSPECT_AWAY * usual)
        if found <= -least:
            has_failed = True
        elif found >= THERE * usual:
            has_failed = False
    return Undoing(found, usual, has_failed)
