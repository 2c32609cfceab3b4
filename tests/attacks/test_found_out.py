"""Bad peers are found out by the audits of others: from then on nothing of theirs weighs anything."""

from __future__ import annotations

import pytest

from tests.attacks.swarms import UNMEASURED, swarm
from thinwire.node.bench.attacks.bad_peers import ATTACKS, HONEST

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

N_ROUNDS = 16
ALWAYS = (("audits.rate", 1.0), *UNMEASURED)
"""Every offer is audited; by default it is one of hundreds, which takes as many more rounds."""


@pytest.mark.parametrize("attack", ["flipped-1e3", "inverted", "random", "empty", "copied-nearly"])
def test_a_bad_peer_is_found_out(attack: str) -> None:
    outcome = swarm("decoupled", ATTACKS[attack], N_ROUNDS, settings=ALWAYS)
    assert outcome.found_after is not None


def test_an_honest_one_in_its_place_is_not() -> None:
    assert swarm("decoupled", HONEST, N_ROUNDS, settings=ALWAYS).found_after is None
