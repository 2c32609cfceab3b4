"""Quantities in words, and the one line that says how a run stands."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from thinwire.node.cli.view import headline, live_view, swarm_table
from thinwire.node.units import bytes_beside_ddp, human_loss

STATUS: dict[str, Any] = {
    "run": "r",
    "round": 7,
    "rounds": 20,
    "state": "training",
    "loss": 2.5,
    "held_out": [[0, 5.5], [5, 2.0]],
    "round_s": 0.5,
    "loss_unit": "nats/token",
    "bytes_per_token": 4.0,
    "payload_bytes_per_peer_round": 1000.0,
    "sent_bytes_per_peer_round": 4000.0,
    "ddp_bytes_per_peer_round": 200_000.0,
}


def test_a_loss_says_its_unit_and_what_it_is_of_the_text() -> None:
    assert human_loss(1.5, "nats/byte") == "1.500 nats/byte"
    assert human_loss(0.25, "nats/example", 4.0) == "0.250 nats/example"
    assert human_loss(math.log(2) * 6, "nats/token", 4.0) == "4.159 nats/token (1.500 bits/byte)"
    assert human_loss(2.0, "nats/token") == "2.000 nats/token"


def test_all_that_was_sent_stands_beside_the_payload() -> None:
    assert bytes_beside_ddp(1000, 4000, 20_000) == (
        "1.0 kB payload, 4.0 kB all sent, data-parallel 20.0 kB: 20x the payload, 5.0x all sent"
    )
    assert bytes_beside_ddp(1000, None, 20_000) == "1.0 kB payload, data-parallel 20.0 kB: 20x the payload"
    assert bytes_beside_ddp(1000, 4000, 0) == "1.0 kB payload, 4.0 kB all sent"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "held-out 2.000 nats/token (0.721 bits/byte)"),
        ({"loss_unit": "nats/byte", "bytes_per_token": None}, "held-out 2.000 nats/byte ·"),
        ({"state": "waiting", "waits_for": 2}, "round 7/20 (waiting for 2 more peers) ·"),
        (
            {},
            "per peer and round: 1.0 kB payload, 4.0 kB all sent, data-parallel 200.0 kB: 200x the pay",
        ),
    ],
)
def test_the_headline_has_units_and_all_bytes(changes: dict[str, Any], part: str) -> None:
    assert part in headline({**STATUS, **changes})


def test_a_status_of_an_older_coordinator_is_shown() -> None:
    new = ("loss_unit", "bytes_per_token", "sent_bytes_per_peer_round")
    line = headline({key: value for key, value in STATUS.items() if key not in new})
    assert "held-out 2.000 nats ·" in line
    assert line.endswith("1.0 kB payload, data-parallel 200.0 kB: 200x the payload")


PEER: dict[str, Any] = {
    "index": 0,
    "peer_id": "12D3KooWabcdef",
    "state": "training",
    "round": 1234,
    "loss": 2.5,
    "offers_counted": 1234,
    "offers_missed": 5,
    "sent_bytes": 123_400_000,
    "fingerprint": "72ca26f13cf21561",
    "fingerprint_round": 1230,
}


def table_of(width: int, **changes: Any) -> str:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(swarm_table({**STATUS, "peers": [{**PEER, **changes}], "mismatches": 0}))
    return shown.get().split("all sent")[-1]


def test_what_is_found_of_a_peer_is_shown_once_there_is_something() -> None:
    found = {"audits_passed": 2, "audits_failed": 3, "condemned_until": 1500, "rejected": {"samples": 7}}
    told = table_of(160, size=900.0, clipped=0.5, **found)
    for part in (
        "900.0x (50% clipped)",
        "2+3 (weight 0 to 1500)",
        "refused",
        "weighs nothing until round 1500",
    ):
        assert part in told
    quiet = table_of(160, size=1.0, clipped=0.0, audits_passed=0, audits_failed=0, rejected={})
    assert "1.0x" in quiet
    assert "refused" not in table_of(160, rejected={"late_offer": 2}), "to be late is no breach of trust"
    assert not any(word in quiet for word in ("refused", "audits", "far from"))
    assert "is far from the others: its payloads are 900.0 times the median" in table_of(160, size=900.0)
    assert "dropped every batch of 2000" in table_of(160, offers_empty=2000)
    narrow = table_of(60, size=1.0, **found)
    assert "1.0x" in narrow
    assert "refused" not in narrow


@pytest.mark.parametrize(
    ("width", "there", "missing"),
    [
        (110, ("missed", "sent", "123.4 MB", "@1230"), ()),
        (80, ("counted", "sent", "72ca26f13cf21561 @1230"), ("missed",)),
        (40, ("peer", "state", "round", "loss", "0 …abcdef  training"), ("sent", "fingerprint", "72ca")),
    ],
)
def test_a_narrow_terminal_has_whole_columns(
    width: int, there: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    table = table_of(width)
    assert all(part in table for part in there)
    assert not any(part in table for part in missing)


def test_who_left_at_the_end_has_the_round_of_its_last_fingerprint() -> None:
    """It says how far it is once a second, and leaves sooner after its last rounds."""
    assert " 1230 " in table_of(160, state="gone", round=1190).replace("@1230", "")


def test_a_run_without_peers_says_what_to_do() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(swarm_table({**STATUS, "peers": [], "mismatches": 0}))
    assert "thinwire join TICKET" in shown.get()


def test_a_state_folder_does_not_know_what_was_sent() -> None:
    console = Console(width=110)
    with console.capture() as shown:
        console.print(swarm_table({**STATUS, "peers": [PEER], "mismatches": 0, "folder": "x"}))
    assert "123.4 MB" not in shown.get()


A, B, C = (f"12D3KooW{name}" for name in ("abcdefghijklmn", "bcdefghijklmno", "cdefghijklmnop"))


def test_without_a_terminal_there_are_lines_and_each_note_once() -> None:
    out, notes = StringIO(), list[str]()
    with live_view(Console(file=out, width=300), notes) as show:
        show(STATUS, False)
        show(STATUS, False)
        notes.append("node-1 was killed")
        show(STATUS, False)
        show(STATUS, True)
    line = headline(STATUS)
    assert out.getvalue().splitlines() == [line, "node-1 was killed", line]


def seats_of(leader: str | None, **changes: Any) -> str:
    """What a terminal shows where A says how three coordinators are."""
    seats = [
        {"peer_id": A, "role": "leads" if leader == A else "follows", "reachable": True, "head": 9, "lag": 0},
        {"peer_id": B, "role": "follows", "reachable": True, "head": 7, "lag": 2},
        {"peer_id": C, "role": "not reachable", "reachable": False, "head": None, "lag": None},
    ]
    seat = {
        "peer_id": A,
        "role": seats[0]["role"],
        "leader": leader,
        "since_ms": 1_700_000_000_000,
        "head": 9,
    }
    seat |= {"lag": 0, "waits_for": "", "seats": seats, "elections": 3, "wanted": 3, "onlookers": []}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(swarm_table({**STATUS, "peers": [PEER], "mismatches": 0, "seat": seat | changes}))
    return shown.get()


def test_of_several_coordinators_it_is_shown_who_leads_and_how_far_the_others_are() -> None:
    told = seats_of(A)
    assert "coordinator …ijklmn leads, 2 of 3 reachable" in told.splitlines()[0]
    assert "12D3KooWabcdefghijklmn leads since 2023-11-1" in told.replace("12D3KooW..ijklmn", A)
    assert "3 elections since" in told
    rows = [line.split() for line in told.splitlines() if line.startswith("12D3KooW")]
    assert [row[1:] for row in rows] == [
        ["leads", "9", "0"],
        ["follows", "7", "2"],
        ["not", "reachable", "-", "-"],
    ]
    onlooker = {"peer_id": C, "lacks": "3 payloads", "wants_seat": True}
    assert "looks on, lacks 3 payloads" in seats_of(A, onlookers=[onlooker])
    assert "5 are wanted, 2 more to come" in seats_of(A, wanted=5)


def test_without_a_majority_a_banner_says_what_training_waits_for() -> None:
    why = "1 of 3 coordinators reachable; training waits until 2 are. Missing: B, C"
    told = seats_of(None, waits_for=why)
    assert told.count(why) == 1
    assert "nobody leads" in told
    assert "training waits: the coordinators elect who leads" in seats_of(
        None, waits_for="the coordinators elect who leads"
    )


def test_a_coordinator_that_follows_does_not_say_who_is_connected() -> None:
    state = PEER["state"]
    assert state in seats_of(A)
    told = seats_of(B)
    assert f" {state} " not in told
    assert "12D3KooW..ijklmn follows, at round 9; 12D3KooW..jklmno leads. It knows the ledger" in told


def test_a_single_coordinator_is_not_made_much_of() -> None:
    only = [{"peer_id": A, "role": "leads", "reachable": True, "head": 9, "lag": 0}]
    told = seats_of(A, seats=only, wanted=0)
    assert "coordinator" not in told
