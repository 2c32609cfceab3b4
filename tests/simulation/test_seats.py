"""Several coordinators, with all that is theirs on disk, under generated schedules; see `seats`.

THINWIRE_SIMULATION=5000 runs as many other ones.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.seats import BUGS, run

LONGER = int(os.environ.get("THINWIRE_SIMULATION", "0"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings of what has been done to the coordinators."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.timeout(0 if LONGER else 300)
def test_one_run_under_many_coordinators() -> None:
    happened: Counter[str] = Counter()
    for seed in range(1000, 1000 + LONGER) if LONGER else range(14):
        try:
            happened += run(seed)
        except AssertionError as e:
            raise AssertionError(f"seed {seed}: {e}") from e
    for what in ("sealed", "reigns", "fuses", "crashes", "committees", "restored"):
        assert happened[what] > 0, f"{what} did not occur: {happened}"


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str) -> None:
    assert any(is_found(seed, bug) for seed in range(10))


def is_found(seed: int, bug: str) -> bool:
    try:
        run(seed, bug)
    except AssertionError:
        return True
    return False
