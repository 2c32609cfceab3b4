"""Lines and machines of volunteers, drawn from stated distributions: assumptions, until others are known.

Sessions last as measured in 18 traces of file sharing, by a Weibull distribution of shape 0.55 to 0.75: many
short ones, few very long ones (Zhang, Iosup, Epema, The Peer-to-Peer Trace Archive, Delft PDS-2010-003,
table 14). A stream carries at most MSS / RTT * sqrt(3 / 2 p) with a loss of p (Mathis et al., 1997). Round
trips are log-normal around 45 ms; computing takes a log-normal time, by which machines differ for good, and
rounds a little.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

MBIT: Final = 1e6 / 8

SEGMENT_BYTES: Final = 1448
STREAMS: Final = 4
"""Beside each other to one holder, as `blob_client` has them."""

RTT_S, RTT_SIGMA = 0.045, 0.5
COMPUTE_SIGMA, ROUND_SIGMA = 0.3, 0.05
SESSION_SHAPE: Final = 0.6
SESSION_S: Final = 4 * 3600.0
"""Mean."""


@dataclass(frozen=True, slots=True)
class Kind:
    """`share` of the peers; bytes per second; `reachable`: how many of them others can dial."""

    share: float
    up: float
    down: float
    loss: float
    reachable: float


KINDS: Final = (
    Kind(0.25, 10 * MBIT, 50 * MBIT, 1e-3, 0.1),
    Kind(0.45, 20 * MBIT, 100 * MBIT, 2e-4, 0.3),
    Kind(0.22, 100 * MBIT, 300 * MBIT, 1e-4, 0.4),
    Kind(0.08, 1000 * MBIT, 1000 * MBIT, 1e-6, 1.0),
)
"""DSL and mobile, cable, fibre, and machines in a data centre."""

HOME: Final = (Kind(1.0, 20 * MBIT, 100 * MBIT, 2e-4, 0.3),)
"""Everybody has a cable, 20 Mbit/s up."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`compute_s`: of a round's work, usually."""

    up: float
    down: float
    rtt_s: float
    is_reachable: bool
    compute_s: float


def draw(kinds: tuple[Kind, ...], compute_s: float, made: random.Random) -> Machine:
    """One volunteer, whose round of work takes `compute_s` in the median."""
    (kind,) = made.choices(kinds, [kind.share for kind in kinds])
    rtt_s = RTT_S * made.lognormvariate(0.0, RTT_SIGMA)
    most = STREAMS * SEGMENT_BYTES / rtt_s * math.sqrt(1.5 / kind.loss)
    return Machine(
        min(kind.up, most),
        min(kind.down, most * 4),
        rtt_s,
        made.random() < kind.reachable,
        compute_s * made.lognormvariate(0.0, COMPUTE_SIGMA),
    )


_SESSION_SCALE_S: Final = SESSION_S / math.gamma(1 + 1 / SESSION_SHAPE)


def session_s(made: random.Random) -> float:
    """How long a volunteer stays that comes."""
    return made.weibullvariate(_SESSION_SCALE_S, SESSION_SHAPE)


def rest_of_session_s(made: random.Random) -> float:
    """How long one still stays that is there at some moment of a long run, where those who stay long are
    met more often: a part of a session that is drawn by its length."""
    whole_s = _SESSION_SCALE_S * made.gammavariate(1 + 1 / SESSION_SHAPE, 1.0) ** (1 / SESSION_SHAPE)
    return float(made.random() * whole_s)
