"""SIGTERM while a process is starting: nothing that could be told was there yet, and it ends all the same."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.coordinator import coordinate
from thinwire.node.founding.child import Child
from thinwire.node.ranks.join import join
from thinwire.node.run_node import Options
from thinwire.node.system.stopping import Stop, stop_on_signals

RUN = "[task]\nlayers = 1\nwidth = 16\nheads = 2\ncontext = 16\nheld_out_bytes = 1024\n"


def test_a_coordinator_that_was_stopped_before_it_served_gives_no_ticket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    state = tmp_path / "state"
    stop = Stop(signal.SIGTERM)
    for _ in range(2):  # the new run that it had made is in order, and can be gone on with
        coordinate(
            run_file=tmp_path / "run.toml",
            state=state,
            host="127.0.0.1",
            port=0,
            announce=(),
            overrides={},
            founder=Child(None, stop),
            ticket_file=tmp_path / "ticket",
            rotate_token=False,
            ban=(),
            http=None,
            stop=stop,
        )
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "ticket").exists()
    assert (state / "ledger.db").exists()


def test_a_node_that_was_stopped_before_it_trained_calls_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        ticket = Ticket(
            peer_id=peer_id_of(new_key().public_key()),
            addresses=(f"/ip4/127.0.0.1/tcp/{coordinator.getsockname()[1]}",),
            run_id=bytes(32),
            token="none",
        )
        options = Options(
            ticket=ticket.line(),
            data=None,
            import_path=None,
            state=tmp_path / "node",
            device="cpu",
            threads=None,
            host="127.0.0.1",
            port=0,
            announce=(),
            max_upload=None,
            patience_s=1.0,
            http=None,
            save=None,
            ranks=None,
            precision="auto",
            activation_checkpointing=False,
            cpu_offload=False,
            restart=0,
        )
        assert join(options, Stop(signal.SIGTERM)) is None
        coordinator.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody is waiting to be let in
            coordinator.accept()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(number: signal.Signals) -> None:
    """SIGINT in a script's background job, SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(number)
            assert not stop.is_set()
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_the_first_signal_stops_cleanly_the_second_one_at_once(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_children_of_tests_begin_with_the_signals_that_they_rely_on() -> None:
    """Also where the tests run in a background job, or under nohup: see `pytest_configure` in conftest."""
    script = "import signal; print(*(int(signal.getsignal(s) is signal.SIG_IGN) for s in (1, 2, 3, 15)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "0", "0"]
