"""How much one peer may say, and how many lines of log it can cause."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import wait_until
from thinwire.coordinator.entry.rates import (
    FIRST_SESSIONS,
    MAX_PEERS,
    MESSAGES,
    SESSIONS,
    STATES,
    STRANGE_SESSIONS,
    Bucket,
    PeerRates,
    Rate,
)
from thinwire.coordinator.observe.quiet_log import EVERY_S, LINES, LINES_OF_A_KIND, QuietLog
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    GenesisBody,
    Heartbeat,
    Hello,
    NodeState,
    Refused,
    Report,
    State,
    Welcome,
)
from thinwire.coordinator.protocol.p2p import start_p2p
from thinwire.coordinator.protocol.streams import FROM_COORDINATOR, SESSION, Meter, Stream
from thinwire.coordinator.server_thread import ServerThread

BEAT = Heartbeat(round=0, sent_bytes=1, received_bytes=1, payload_bytes=1)
TRAINS = State(state=NodeState.TRAINING)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), max_size=60))
def test_no_bucket_gives_more_than_its_rate(takes: list[tuple[float, float]]) -> None:
    rate, now_s, taken = Rate(2.0, 10.0), 0.0, 0.0
    bucket = Bucket(rate, now_s)
    for wait_s, n in takes:
        now_s += wait_s
        taken += n if bucket.take(n, now_s) else 0.0
        assert taken <= rate.burst + rate.per_s * now_s + 1e-6


def test_what_an_honest_node_sends_is_never_too_much() -> None:
    """Rounds of 5 ms with three reports each, for an hour; then a break, and a thousand rounds to report."""
    rates, now_s = PeerRates(), 0.0
    for round_ in range(20_000):
        now_s += 0.005
        for _ in range(4):
            assert rates.message("a", BEAT, 4500 if round_ % 4 == 0 else 100, now_s) is None
    for _ in range(20):  # a coordinator that comes and goes
        now_s += 0.25
        assert rates.session("a", now_s)
        assert rates.message("a", TRAINS, 20, now_s) is None
    for _ in range(3000):
        assert rates.message("a", BEAT, 100, now_s) is None


def test_each_limit_is_of_one_peer_and_of_all_its_sessions() -> None:
    rates = PeerRates()
    assert [rates.session("a", 0.0) for _ in range(int(SESSIONS.burst) + 1)][-2:] == [True, False]
    said = [rates.message("a", TRAINS, 20, 0.0) for _ in range(int(STATES.burst) + 1)]
    assert said[-2:] == [None, "words about what it does"]
    said = [rates.message("b", BEAT, 20, 0.0) for _ in range(int(MESSAGES.burst) + 1)]
    assert said[-2:] == [None, "messages"]
    assert rates.message("c", BEAT, 2**30, 0.0) == "bytes of messages"
    assert rates.message("c", TRAINS, 20, 0.0) is None
    assert rates.message("a", TRAINS, 20, 1.0) is None, "it fills up again"


def test_sessions_of_who_has_done_no_work_are_few_all_together_but_the_first_ones_of_each() -> None:
    rates, n_strangers, seconds = PeerRates(), 200, 60
    asked = [(f"s{n}", 2.0 * t) for t in range(seconds // 2) for n in range(n_strangers)]
    opened = sum(rates.session(peer, now_s, has_worked=False) for peer, now_s in asked)
    firsts = n_strangers * (FIRST_SESSIONS.burst + 1)
    assert opened <= firsts + STRANGE_SESSIONS.burst + STRANGE_SESSIONS.per_s * seconds
    newcomer = [rates.session("new", seconds, has_worked=False) for _ in range(int(FIRST_SESSIONS.burst))]
    assert all(newcomer), "whatever others do"
    assert rates.session("s1", seconds, has_worked=True)


def test_buckets_of_many_identities_are_forgotten_and_those_in_use_are_not() -> None:
    rates = PeerRates()
    for _ in range(int(STATES.burst)):
        rates.message("busy", TRAINS, 20, 1000.0)
    for n in range(2 * MAX_PEERS):
        rates.session(f"{n}", 0.0)
    assert len(rates._peers) <= MAX_PEERS
    assert rates.message("busy", TRAINS, 20, 1000.0) is not None


# --------------------------------------------------------------------------------------------------- log


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def quiet() -> tuple[QuietLog, list[str], list[float]]:
    handler, log, now = Lines(), logging.Logger("test"), [0.0]
    log.addHandler(handler)
    return QuietLog(log, lambda: now[0]), handler.lines, now


Quiet = tuple[QuietLog, list[str], list[float]]


def test_lines_beyond_the_first_are_counted_and_told_once(quiet: Quiet) -> None:
    log, lines, now = quiet
    said = [log.say(logging.INFO, "a", "offer", "line %d", n) for n in range(LINES + 12)]
    assert said == [True] * LINES + [False] * 12
    assert log.say(logging.INFO, "a", "another kind", "other")
    assert log.say(logging.INFO, "b", "offer", "other peer")
    now[0] = EVERY_S - 0.1
    log.flush()
    assert len(lines) == LINES + 2
    now[0] = EVERY_S + 0.1
    log.flush()
    assert lines[LINES + 2 :] == ["a: offer: ... and 12 more"]
    assert log.say(logging.INFO, "a", "offer", "again")
    now[0] = 10 * EVERY_S
    log.flush()
    assert lines[-1] == "again"


def test_many_identities_do_not_fill_the_log(quiet: Quiet) -> None:
    log, lines, now = quiet
    for n in range(5000):
        log.say(logging.INFO, f"{n}", "admitted", "admitted %d", n)
    assert len(lines) == LINES_OF_A_KIND
    now[0] = EVERY_S + 1
    log.flush()
    assert lines[-1] == f"others: admitted: ... and {5000 - LINES_OF_A_KIND} more"
    assert log.say(logging.INFO, "new", "admitted", "one more")


# ------------------------------------------------------------------------------------------------- for real


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


Speak = Callable[[Callable[[Stream], object]], None]


@pytest.fixture
def coordinator(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey, stack: ExitStack
) -> ServerThread:
    state = tmp_path / "coordinator"
    state.mkdir()
    save(key, state / "key")
    return stack.enter_context(ServerThread(state, make_genesis(min_peers=1)))


def flood(coordinator: ServerThread, key: Ed25519PrivateKey, messages: list[State] | list[Report]) -> bool:
    """Sends all of them in a session of its own, as quickly as it can. Whether the session was ended."""

    async def run() -> bool:
        host, ticket = await start_p2p(key), coordinator.ticket
        try:
            await host.dial(ticket.peer_id, ticket.addresses, 5)
            reader, writer = await host.open_stream(ticket.peer_id, SESSION)
            stream = Stream(reader, writer, Meter())
            hello = Hello(
                version=PROTOCOL_VERSION,
                run_id=ticket.run_id,
                token=ticket.token,
                head_round=None,
                head_digest=None,
                addresses=(),
                agent="test",
            )
            await stream.send_message(hello)
            first = await stream.receive_message(FROM_COORDINATOR)
            if isinstance(first, Refused):
                return True
            assert isinstance(first, Welcome)
            said = asyncio.create_task(_until_refused(stream))
            try:
                for message in messages:
                    await stream.send_message(message)
                await stream.send_message(State(state=NodeState.LEAVING))
            except OSError:
                return True
            return await said
        finally:
            await host.close()

    return asyncio.run(run())


async def _until_refused(stream: Stream) -> bool:
    """False: the goodbye was answered."""
    try:
        while True:
            message = await stream.receive_message(FROM_COORDINATOR)
            if type(message).__name__ in ("Refused", "Head"):
                return isinstance(message, Refused)
    except (EOFError, OSError):
        return True


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_a_loop_of_states_is_ended_and_makes_a_handful_of_lines(
    coordinator: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "thinwire.coordinator")
    key = new_key()
    states = [State(state=state) for _ in range(5000) for state in (NodeState.TRAINING, NodeState.JOINING)]
    began_s = time.monotonic()
    assert flood(coordinator, key, states)
    wait_until(lambda: coordinator.status()["rejected"] == {"rate": 1}, 20, str)
    assert flood(coordinator, key, states), "the next session has no more"
    mine = [record for record in caplog.records if peer_id_of(key.public_key())[:8] in record.getMessage()]
    assert len(mine) < 16
    assert time.monotonic() - began_s < 60


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_a_thousand_rounds_to_report_are_heard(coordinator: ServerThread) -> None:
    reports = [Report(round=0, snapshot=bytes(32), snapshot_bytes=1) for _ in range(3000)]
    assert not flood(coordinator, new_key(), reports)
    assert "rate" not in coordinator.status()["rejected"]
