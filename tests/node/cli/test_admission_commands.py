"""`thinwire invite`, `identity` and the bans of `thinwire run`, as people give them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import TASK
from tests.support.waiting import wait_until
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.status import fetch_status
from thinwire.node.system.folder import IDENTITY_NAME, NodeFolder

Here = Callable[..., tuple[int, str, str]]

RUN = f"""
[run]
name = "guarded"
rounds = 100000
min_peers = 1
{TASK}[strategy]
name = "decoupled"
[network]
heartbeat_s = 0.5
[admission]
mode = "invited"
"""


def test_identity_is_that_of_the_node_that_would_start(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    code, first, _ = here("identity")
    assert (code, here("identity")[1]) == (0, first)
    node = tmp_path / "thinwire" / "node-0"
    assert first.strip() == peer_id_of(load_or_create(node / IDENTITY_NAME).public_key())
    running = NodeFolder(node)
    code, second, _ = here("identity")
    assert (code, second != first) == (0, True)
    assert here("identity", str(node))[1] == first, "of a node that runs, too"
    running.close()
    assert here("identity", str(tmp_path / "other"))[0] == 0
    assert (tmp_path / "other" / IDENTITY_NAME).stat().st_mode & 0o777 == 0o600


def test_a_coordinator_has_no_identity_of_a_node(here: Here, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").touch()
    code, _, err = here("identity", str(tmp_path))
    assert (code, "a coordinator's state folder" in err) == (2, True), err
    assert not (tmp_path / IDENTITY_NAME).exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("invite", "nowhere", "--name", "lab-7"), "is not the state folder of a coordinator"),
        (("invite", ".", "--name", "lab-7", "--expires", "soon"), "--expires soon: write it as"),
        (("invite", ".", "--name", "lab-7", "--expires", "0"), "--expires 0: write it as 12h, 7d"),
        (("run", ".", "rotate-token", "now"), "rotate-token takes nothing else"),
        (("run", ".", "ban", "x", "--rounds", "3"), "ban takes neither --rounds"),
        (("run", ".", "ban", ""), "ban takes peer ids"),
    ],
    ids=["no folder", "no time", "no time at all", "rotate what", "ban how", "ban whom"],
)
def test_what_cannot_be_is_said(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = here(*args)
    assert code == 2
    assert text in err


@pytest.mark.swarm
@pytest.mark.timeout(400)
def test_a_run_for_the_invited(thinwire: Callable[..., Any], here: Here, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    state = str(tmp_path / "state")
    where = ("--host", "127.0.0.1", "--state", "state", "--ticket-file", "ticket")
    coordinator = thinwire("coordinator", "run.toml", *where)
    ticket = coordinator.first_line()
    join = ("--threads", "1", "--host", "127.0.0.1")
    open_one = thinwire("join", ticket, *join, "--state", "node-a")
    assert open_one.wait(200) == 2
    assert "this run takes invited peers only" in open_one.stderr()

    code, invited, err = here("invite", state, "--name", "lab-7", "--expires", "7d")
    assert (code, "lets in one identity, for 7d" in err) == (0, True), err
    node = thinwire("join", invited.strip(), *join, "--state", "node-b")
    node.wait_for("round 3/", 100)
    second = thinwire("join", invited.strip(), *join, "--state", "node-c")
    assert second.wait(60) == 2
    assert "the invitation lab-7 lets in 1 identity, which has come with it" in second.stderr()

    status = fetch_status(ticket)
    assert status["rejected"] == {"uninvited": 2}
    (peer,) = [peer for peer in status["peers"] if peer["state"] == "training"]
    assert peer["invitation"].startswith("lab-7#")
    assert here("run", state, "ban", peer["peer_id"])[:2] == (
        0,
        f"{peer['peer_id']} is banned: it is not let in any more\n",
    )
    assert node.wait(60) == 2
    assert "this peer was banned from the run" in node.stderr()
    code, new, err = here("run", state, "rotate-token")
    assert (code, Ticket.parse(new).token != Ticket.parse(ticket).token) == (0, True), err
    wait_until(lambda: (tmp_path / "ticket").read_text() == new, 20, coordinator.stderr)
    status = fetch_status(new)
    assert json.loads(json.dumps(status["admission"])) == {"mode": "invited", "banned": [peer["peer_id"]]}
    assert any("is banned" in change for change in status["changes"])
    assert here("run", state, "unban", peer["peer_id"])[0] == 0
    again = thinwire("join", invited.strip(), *join, "--state", "node-b")
    again.wait_for("round ", 100)
