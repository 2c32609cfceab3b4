"""The coordinator's metrics, as a scrape shows them."""

from __future__ import annotations

from typing import get_args

from tests.support.coordinator_status import scrape, seat_of, status_of
from tests.support.prometheus import check_conventions, series, value
from thinwire.coordinator.observe.metrics import with_trust
from thinwire.coordinator.quorum.checking import Reason


def test_a_scrape_shows_the_status() -> None:
    text = scrape(status_of())
    check_conventions(text)
    assert value(text, "thinwire_swarm_round") == 7
    assert value(text, "thinwire_swarm_commits_total") == 7
    assert value(text, "thinwire_swarm_last_commit_timestamp_seconds") == 1_700_000_000.5
    assert value(text, "thinwire_swarm_loss") == 2.25
    assert value(text, "thinwire_swarm_held_out_loss") == 2.5
    assert value(text, "thinwire_swarm_held_out_round") == 5
    assert value(text, "thinwire_swarm_snapshot_round") == 5
    assert value(text, "thinwire_swarm_noise_scale_samples") == 4096
    for state, n in {"training": 2, "joining": 0, "gone": 1}.items():
        assert value(text, "thinwire_swarm_peers", state=state) == n
    assert value(text, "thinwire_swarm_offers_total", result="counted") == 15
    assert value(text, "thinwire_swarm_offers_total", result="missed") == 3
    assert value(text, "thinwire_swarm_payload_bytes_total") == 1500
    assert value(text, "thinwire_swarm_compression_ratio") == 250
    assert value(text, "thinwire_swarm_fingerprint_mismatches_total") == 1
    for why, n in {"complete": 2, "deadline": 1, "enough": 0, "hung": 0}.items():
        assert value(text, "thinwire_swarm_rounds_closed_total", reason=why) == n
    assert value(text, "thinwire_swarm_joins_total", kind="new") == 3
    assert value(text, "thinwire_swarm_joins_total", kind="returned") == 0
    assert value(text, "thinwire_swarm_leaves_total", reason="connection_lost") == 1
    assert value(text, "thinwire_swarm_leaves_total", reason="said_so") == 0
    assert value(text, "thinwire_coordinator_ledger_bytes") == 40960
    assert value(text, "thinwire_coordinator_disk_free_bytes") == 10**10
    assert value(text, "thinwire_coordinator_kept_payload_bytes") == 900
    assert value(text, "thinwire_coordinator_rejected_total", reason="late_offer") == 2
    assert value(text, "thinwire_coordinator_rejected_total", reason="token") == 0
    assert value(text, "thinwire_coordinator_received_bytes_total", kind="payload") == 30


def test_what_peers_are_found_to_be() -> None:
    """All together; and each at its own target, where its own words about that are left out."""
    status = status_of()
    text = scrape(status)
    assert value(text, "thinwire_swarm_farthest_peer_ratio") == 1.5  # the one of 99 is gone
    assert value(text, "thinwire_swarm_condemned_peers") == 1
    assert value(text, "thinwire_swarm_audits_total", result="passed") == 9
    assert value(text, "thinwire_swarm_audits_total", result="failed") == 3
    assert value(text, "thinwire_swarm_empty_offers_total") == 6
    said = b"""# HELP thinwire_round Last round
# TYPE thinwire_round gauge
thinwire_round 7.0
# HELP thinwire_peer_size_ratio Tiny, believe me
# TYPE thinwire_peer_size_ratio gauge
thinwire_peer_size_ratio 0.01
 thinwire_peer_condemned 0.0
thinwire_peer_audits_total{result="passed"} 1e9"""
    first, second, _ = (with_trust(said, peer).decode() for peer in status["peers"])
    for target in (first, second):
        check_conventions(target)
        assert value(target, "thinwire_round") == 7
        assert target.count("# TYPE thinwire_peer_condemned") == 1
        assert value(target, "thinwire_peer_audits_total", result="passed") == 3
        assert value(target, "thinwire_peer_offers_total", result="empty") == 2
    assert value(first, "thinwire_peer_size_ratio") == 1.5
    assert value(first, "thinwire_peer_clipped_ratio") == 0.25
    assert value(first, "thinwire_peer_rejected_total", reason="samples") == 2
    assert value(second, "thinwire_peer_rejected_total", reason="samples") == 0
    assert value(second, "thinwire_peer_condemned") == 1
    assert "thinwire_peer_size_ratio" not in second


def test_round_durations_are_a_histogram() -> None:
    text = scrape(status_of())
    name = "thinwire_swarm_round_duration_seconds"
    assert value(text, f"{name}_bucket", le="0.025") == 0
    assert value(text, f"{name}_bucket", le="0.05") == 1  # a bound belongs to what is below it
    assert value(text, f"{name}_bucket", le="0.25") == 2
    assert value(text, f"{name}_bucket", le="300.0") == 2
    assert value(text, f"{name}_bucket", le="+Inf") == value(text, f"{name}_count") == 3
    assert value(text, f"{name}_sum") == 1000.25


def test_a_run_that_has_not_begun_shows_what_there_is() -> None:
    nothing = {"loss": None, "held_out": [], "last_commit_ms": None, "snapshot": None, "round": 0}
    text = scrape(status_of(0, payload_bytes_per_peer_round=None, ddp_bytes_per_peer_round=None, **nothing))
    check_conventions(text)
    assert value(text, "thinwire_swarm_commits_total") == 0
    assert not [
        name for name, _ in series(text) if "loss" in name or name.endswith("_ratio") or "last_commit" in name
    ]


def test_the_number_of_peers_does_not_change_the_series() -> None:
    assert series(scrape(status_of(200))) == series(scrape(status_of(3)))


def test_a_seat_among_several() -> None:
    text = scrape(status_of())
    check_conventions(text)
    roles = {"leads": 1, "follows": 0, "looks_on": 0, "rests": 0}
    assert {role: value(text, "thinwire_seat_role", state=role) for role in roles} == roles
    assert value(text, "thinwire_seat_committee_seats") == 3
    assert value(text, "thinwire_seat_needed_seats") == 2
    assert value(text, "thinwire_seat_reachable_seats") == 2
    assert value(text, "thinwire_seat_lag_rounds") == 0
    assert value(text, "thinwire_seat_farthest_lag_rounds") == 2
    assert value(text, "thinwire_seat_missing_payloads") == 4
    assert value(text, "thinwire_seat_elections_total") == 1
    assert value(text, "thinwire_seat_leaderless_seconds_total") == 2
    name = "thinwire_seat_refused_votes_total"
    refused = {reason: value(text, name, reason=reason) for reason in get_args(Reason)}
    assert {reason: n for reason, n in refused.items() if n} == {"payload": 3, "work": 1}
    name = "thinwire_seat_seal_duration_seconds"
    assert value(text, f"{name}_bucket", le="0.025") == 2
    assert value(text, f"{name}_count") == 3


def test_what_only_the_leader_knows_is_not_counted_twice() -> None:
    """Sums over all coordinators are those of the run; a seat that has nothing yet says so, and no more."""
    text = scrape(status_of(seat=seat_of("follows")))
    check_conventions(text)
    assert value(text, "thinwire_seat_role", state="follows") == 1
    assert value(text, "thinwire_seat_lag_rounds") == 2
    assert value(text, "thinwire_swarm_round") == 7
    once = ("thinwire_swarm_peers", "thinwire_swarm_offers", "thinwire_swarm_joins", "thinwire_swarm_payload")
    assert not any(f"# TYPE {name}" in text for name in once)
    beginning = {"run": "r", "round": 0, "rounds": 9, "state": "catching up", "peers": []}
    text = scrape({**beginning, "seat": seat_of("looks on", lag=9)})
    assert value(text, "thinwire_seat_lag_rounds") == 9
    assert "thinwire_swarm" not in text
