"""Several coordinators from the command line: real processes over libp2p; the one that leads is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.conftest import Here, Program, Start
from tests.support.small_run import TASK
from tests.support.waiting import wait_until
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket

pytestmark = [pytest.mark.swarm, pytest.mark.usefixtures("own_temp_folder"), pytest.mark.timeout(200)]

RUN = '[run]\nname = "small"\nrounds = 100000\nmin_peers = 1\n' + TASK
HERE = ("--host", "127.0.0.1", "--linger", "0")


def test_one_becomes_three_the_leader_is_killed_and_the_recovery_key_ends_it(
    thinwire: Start, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    first = thinwire("coordinator", "run.toml", "--state", "0", "--ticket-file", "ticket", *HERE)
    first.first_line()
    monkeypatch.chdir(tmp_path)  # for what runs in this process
    node = thinwire("join", "@ticket", "--threads", "1")
    node.wait_for("round 2/")
    code, said, err = here("run", "0", "seats", "3")
    assert code == 0, err
    assert "--replica" in said
    seat_ticket = tmp_path / "0" / "seat-ticket"
    wait_until(seat_ticket.exists, 20, first.stderr)
    assert seat_ticket.stat().st_mode & 0o777 == 0o600
    seats = {
        str(n): thinwire("coordinator", "--replica", "0/seat-ticket", "--state", str(n), *HERE)
        for n in (1, 2)
    }
    seats["0"] = first
    for n in ("1", "2"):
        seats[n].wait_for("the coordinators are now")
    wait_until(lambda: (tmp_path / "ticket").read_text().startswith("tw2-"), 60, first.stderr)
    assert len(Ticket.parse((tmp_path / "ticket").read_text()).seats) == 3
    leader = _leader(seats)
    ids = {n: peer_id_of(load_or_create(tmp_path / n / "key").public_key()) for n in seats}
    seats.pop(leader).process.send_signal(signal.SIGKILL)
    node.wait_for("connected again")
    assert _leader(seats, but=leader) != leader
    code, said, err = here("status", "@ticket", "--json")
    assert code == 0, err
    seat = json.loads(said)["seat"]
    assert len(seat["seats"]) == 3
    assert seat["leader"] in [one["peer_id"] for one in seat["seats"]]
    assert seat["role"] == "leads"
    for what in ("replace", "remove"):
        code, said, err = here("run", _leader(seats), what, ids[leader])
        assert code == 0, err
        assert "noted" in said
    node.wait_for("2 of 2 must sign")
    (lost, _), (last, alive) = seats.items()
    seats[lost].process.send_signal(signal.SIGKILL)
    node.wait_for(f"--state {last} --recover")
    alive.process.send_signal(signal.SIGTERM)
    assert alive.wait(20) == 128 + signal.SIGTERM, alive.stderr()
    recover = ("--restored", "--recover", "--recovery-key", "0/recovery-key", "--recover-wait", "2s")
    left = thinwire("coordinator", "--state", last, *recover, *HERE)
    left.wait_for("the run's recovery key has named another committee")
    left.wait_for("this coordinator leads now")
    code, _, err = here("run", last, "stop")
    assert code == 0, err
    assert node.wait(60) == 0, node.stderr()
    assert left.wait(70) == 0, left.stderr()
    assert "Traceback" not in left.stderr() + node.stderr()


def _leader(seats: dict[str, Program], but: str = "") -> str:
    """Whose log says last that it leads."""

    def found() -> list[str]:
        leads = "this coordinator leads now"
        ends = "this coordinator does not lead any more"
        return [n for n, p in seats.items() if n != but and p.stderr().count(leads) > p.stderr().count(ends)]

    wait_until(lambda: len(found()) == 1, 60, lambda: "\n".join(p.stderr() for p in seats.values()))
    return found()[0]
