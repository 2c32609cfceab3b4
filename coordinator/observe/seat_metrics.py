"""What a coordinator says of itself as one of several: `thinwire_seat_*`, from a status's `seat`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..quorum.checking import Reason
from .families import complete, counter, gauge, histogram, labelled

ROLES: Final = ("leads", "follows", "looks on", "rests")


def seat_metrics(seat: Mapping[str, Any]) -> Iterator[Metric]:
    """Also of one that orders its run alone: a committee of one."""
    roles = {role.replace(" ", "_"): float(seat["role"] == role) for role in ROLES}
    words = "1 for what this coordinator does as one of several, 0 for the rest"
    yield labelled(GaugeMetricFamily, "seat_role", words, "state", roles)
    yield gauge("seat_committee_seats", "Coordinators that order the run together", len(seat["seats"]))
    yield gauge("seat_needed_seats", "How many of them must sign a round", seat["need"])
    yield gauge(
        "seat_reachable_seats",
        "How many of them are reachable from here, this one among them",
        sum(each["reachable"] for each in seat["seats"]),
    )
    yield gauge("seat_lag_rounds", "Rounds that others have and this one has not", seat["lag"])
    known = [each["lag"] for each in seat["seats"] if each["lag"] is not None]
    yield gauge(
        "seat_farthest_lag_rounds",
        "Rounds that the slowest of the reachable ones lacks, as far as this one knows",
        max(known, default=0),
    )
    yield gauge("seat_missing_payloads", "Payloads that it has still to fetch", seat["payloads_missing"])
    yield counter("seat_elections", "Elections since it was started, as it has seen them", seat["elections"])
    words = "Seconds since it was started in which it knew of nobody who leads"
    yield counter("seat_leaderless_seconds", words, seat["leaderless_s"])
    refused = complete(seat["refused"], get_args(Reason))
    words = "Votes that it has not given, or not at once, each record once: payload is usual, the rest is not"
    yield labelled(CounterMetricFamily, "seat_refused_votes", words, "reason", refused)
    words = "From the proposal of a record to its seal, of those that this one has proposed"
    yield histogram("seat_seal_duration_seconds", words, seat["seals"], seat["seals_s"])
